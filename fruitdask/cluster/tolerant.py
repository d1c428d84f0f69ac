"""Dask's clusters, with a workaround for a bug."""

from typing import Any

from distributed import LocalCluster


class Tolerant:
    """Ignores the removal of a worker that is unknown to the cluster, because it died while it registered.

    Dask raises a KeyError, stops listening for workers, and raises it again when the cluster is closed.
    """

    scheduler_info: Any

    def _update_worker_status(self, op: str, msg: Any) -> None:
        """Note that a worker has been added or removed."""
        if op != "remove" or msg in self.scheduler_info["workers"]:
            super()._update_worker_status(op, msg)  # type: ignore[misc]


class TolerantLocalCluster(Tolerant, LocalCluster):
    """Processes on this machine."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]

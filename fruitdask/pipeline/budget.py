"""Time and money: seconds per stage, and the limits on hours and dollars, which count across interruptions."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fruitdask.cluster import describe_workers, list_usage, open_client
from fruitdask.cluster.cloud.prices import PRICES_OF, Cost, Usage, compute_cost
from fruitdask.core.config import CloudClusterConfig, ClusterConfig, EC2ClusterConfig, LimitsConfig
from fruitdask.core.memory import return_freed_memory
from fruitdask.errors import ConfigError, LimitError
from fruitdask.store.schema import CostRecord
from fruitdask.worker.fetch import Stopwatch

_REMEDY = "results so far are kept; raise the limit and run again to resume"


class Clock(Stopwatch):
    """Wall-clock seconds per stage of a run."""

    def __init__(self) -> None:
        super().__init__()
        self._start = time.perf_counter()

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds so far, to the millisecond."""
        return {stage: round(seconds, 3) for stage, seconds in super().seconds.items()}

    def describe(self) -> dict[str, float]:
        """Return the seconds of each stage, and in total."""
        return self.seconds | {"total": self.total_seconds}

    @property
    def total_seconds(self) -> float:
        """Seconds since the run began."""
        return round(time.perf_counter() - self._start, 3)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block to a stage, which begins without the memory that earlier ones have freed."""
        return_freed_memory()
        with super().measure(stage):
            yield


class Budget:
    """The limits of a run, and what it has spent."""

    def __init__(
        self,
        limits: LimitsConfig,
        cluster: ClusterConfig,
        *,
        region: str,
        spent: CostRecord | None,
        elapsed_seconds: float,
    ) -> None:
        self._limits, self._cluster = limits, cluster
        self._before = spent or CostRecord(dollars=0.0, instances={})
        self._start = time.monotonic() - elapsed_seconds
        self._client: Any = None
        self._hour = compute_cluster_cost(cluster, _list_hour(cluster, region))
        if limits.max_cost is not None and self._hour.unpriced:
            raise ConfigError(
                f"limits.max_cost needs a price for {', '.join(self._hour.unpriced)}, and none is known; set it in US "
                "dollars per hour: cluster.hourly_prices: {TYPE: PRICE}"
            )

    @property
    def spent_dollars(self) -> float:
        """US dollars spent so far, before interruptions too."""
        return self._before.dollars + compute_cluster_cost(self._cluster, self._list_usage()).dollars

    def describe_cluster(self, client: Any) -> dict[str, float]:
        """Return the number of workers, and the dollars spent so far if the cluster has a known price."""
        is_priced = self._hour.dollars and not self._hour.unpriced
        return describe_workers(client) | ({"dollars": round(self.spent_dollars, 4)} if is_priced else {})

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since this command started."""
        return time.monotonic() - self._start

    @contextmanager
    def open_client(self) -> Iterator[Any]:
        """Open a client of the cluster; its instances terminate themselves when a limit is reached."""
        self.check()
        with open_client(self._limit_lifetime()) as self._client:
            yield self._client

    def check(self) -> None:
        """Stop a run that has reached a limit."""
        max_hours, max_cost = self._limits.max_hours, self._limits.max_cost
        hours = self.elapsed_seconds / 3600
        if max_hours is not None and hours >= max_hours:
            raise LimitError(f"the run has taken {hours:.2g} hours, and limits.max_hours is {max_hours:g}; {_REMEDY}")
        if max_cost is not None and self.spent_dollars >= max_cost:
            raise LimitError(
                f"the run's instances have cost ${self.spent_dollars:.2f}, and limits.max_cost is ${max_cost:g}; "
                f"{_REMEDY}"
            )

    def describe(self) -> CostRecord | None:
        """Return the cost record of the manifest; None for a cluster that costs nothing."""
        groups: dict[str, list[Usage]] = defaultdict(list)
        for usage in self._list_usage():
            groups[f"spot {usage.instance_type}" if usage.is_spot else usage.instance_type].append(usage)
        instances = {name: dict(figures) for name, figures in self._before.instances.items()}
        for name, usages in groups.items():
            figures = instances.setdefault(name, {"seconds": 0.0, "dollars": 0.0})
            figures["seconds"] = round(figures["seconds"] + sum(usage.billed_seconds for usage in usages), 1)
            figures["dollars"] = round(figures["dollars"] + compute_cluster_cost(self._cluster, usages).dollars, 6)
        if not instances:
            return None
        prices_of = describe_prices(self._cluster)
        unpriced: dict[str, Any] = {"without_price": self._hour.unpriced} if self._hour.unpriced else {}
        return CostRecord(dollars=round(self.spent_dollars, 6), instances=instances, prices_of=prices_of, **unpriced)

    def _list_usage(self) -> list[Usage]:
        """List the instances of this command, terminated ones included."""
        return [] if self._client is None else list_usage(self._client)

    def _limit_lifetime(self) -> ClusterConfig:
        """Limit the lifetime of instances, because a run may hang; all of them are assumed to cost from the first
        second.
        """
        limits, cluster = self._limits, self._cluster
        if not isinstance(cluster, CloudClusterConfig):
            return cluster
        seconds = [cluster.max_lifetime]
        if limits.max_hours is not None:
            seconds.append(3600 * limits.max_hours - self.elapsed_seconds)
        if limits.max_cost is not None:
            seconds.append(3600 * (limits.max_cost - self.spent_dollars) / self._hour.dollars)
        return cluster.model_copy(update={"max_lifetime": min(seconds)})


def compute_cluster_cost(cluster: ClusterConfig, usages: Iterable[Usage]) -> Cost:
    """Compute what the machines of a cluster cost; of volumes and public addresses, only EC2's have known prices."""
    if isinstance(cluster, EC2ClusterConfig):
        has_address = not cluster.use_private_ip
        return compute_cost(usages, cluster.hourly_prices, volume_gb=cluster.filesystem_size, has_address=has_address)
    return compute_cost(usages, cluster.hourly_prices) if isinstance(cluster, CloudClusterConfig) else Cost(0.0)


def describe_prices(cluster: ClusterConfig) -> str:
    """Describe where the prices of a cluster come from."""
    if not isinstance(cluster, EC2ClusterConfig):
        return "configuration"
    return f"configuration, else {PRICES_OF}" if cluster.hourly_prices else PRICES_OF


def _list_hour(cluster: ClusterConfig, region: str) -> list[Usage]:
    """List one hour of use of all machines of a cluster."""
    if not isinstance(cluster, CloudClusterConfig):
        return []
    scheduler_type, worker_type = cluster.types
    workers = [Usage(worker_type, cluster.spot, region, 3600)] * cluster.max_workers
    return [Usage(scheduler_type, False, region, 3600), *workers]

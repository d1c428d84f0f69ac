"""Machines of runs, as clouds describe them."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

_ENDING = ("shutting-down", "terminated", "Deleting")


@dataclass(frozen=True)
class Instance:
    """A machine of a run, or a part of a deleted one."""

    id: str
    run_id: str
    role: str
    instance_type: str
    is_spot: bool
    region: str
    state: str
    #: When it was launched, with a time zone.
    launched_at: datetime
    tags: dict[str, str] = field(repr=False)

    @property
    def age_seconds(self) -> float:
        """Seconds since its launch."""
        return (datetime.now(UTC) - self.launched_at).total_seconds()

    @property
    def is_ending(self) -> bool:
        """Whether it is ending or has ended, and no longer costs anything."""
        return self.state in _ENDING


def find_role(name: str) -> str:
    """Find the role of a machine by the name that dask-cloudprovider gives it."""
    return "scheduler" if name.endswith("-scheduler") else "worker"

"""The machines of a run: requests, launches, and their states in the cloud."""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """The state of a machine, as the cloud describes it."""

    is_alive: bool
    description: str
    #: Its public address, if it has one.
    address: str | None = None


_UNKNOWN = State(True, "not known to the cloud yet")


@dataclass
class Launch:
    """The launch of a machine, and its end."""

    size: str
    is_spot: bool
    started: float
    ended: float | None = None


class Fleet:
    """The machines of a run."""

    def __init__(self, start_timeout_seconds: float) -> None:
        self.launches: dict[str, Launch] = {}
        self.requests: set[asyncio.Future[Any]] = set()
        self.has_asked = False
        self.is_ending = False
        self.changed = asyncio.Event()
        self.error: Exception | None = None
        self._seen: dict[str, State] = {}
        self._deadline = time.monotonic() + start_timeout_seconds

    @property
    def is_late(self) -> bool:
        """Whether the start has timed out."""
        return time.monotonic() > self._deadline

    async def request(self, asking: Any) -> Any:
        """Await a request for a machine; a cancellation does not cancel the request, whose outcome must be known."""
        if self.is_ending:
            asking.close()
            raise asyncio.CancelledError
        request = asyncio.ensure_future(asking)
        self.has_asked = True
        self.requests.add(request)

        def finish(done: "asyncio.Future[Any]") -> None:
            self.requests.discard(done)
            if not done.cancelled():
                # Retrieve the error, because nothing may be awaiting the request any more.
                done.exception()

        request.add_done_callback(finish)
        return await asyncio.shield(request)

    def note_launch(self, machine_id: str, *, name: str, size: str, is_spot: bool) -> None:
        """Record that the cloud has launched a machine."""
        logger.info("launched %s (%s) as %s", machine_id, size, name)
        self.launches[machine_id] = Launch(size, is_spot, time.time())
        self.changed.set()

    def note_end(self, machine_id: str) -> None:
        """Record that a machine has ended."""
        launch = self.launches.get(machine_id)
        if launch is not None and launch.ended is None:
            launch.ended = time.time()
            logger.info("%s has ended", machine_id)

    def note_states(self, states: Mapping[str, State]) -> None:
        """Record the states of all machines."""
        before, self._seen = self._seen, dict(states)
        for machine_id, state in states.items():
            if machine_id not in before or before[machine_id].description != state.description:
                logger.info("%s is %s", machine_id, state.description)
            if not state.is_alive:
                self.note_end(machine_id)

    def find_state(self, machine_id: str) -> State:
        """Find the state of a machine; one that the cloud does not list yet has not ended."""
        return self._seen.get(machine_id, _UNKNOWN)

    def list_running(self) -> list[str]:
        """List the machines that have not ended, as far as is known."""
        return [machine_id for machine_id, launch in self.launches.items() if launch.ended is None]

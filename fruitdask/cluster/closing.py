"""Closes a cluster without being interrupted by a second Ctrl-C."""

import logging
import threading
from contextlib import ExitStack

logger = logging.getLogger(__name__)


def close_uninterrupted(stack: ExitStack) -> None:
    """Run all cleanups in a thread that a second Ctrl-C does not interrupt; raise that interruption afterwards."""
    done = threading.Event()
    failures: list[BaseException] = []
    interruptions: list[BaseException] = []

    def close() -> None:
        try:
            stack.close()
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=close, name="end of the cluster").start()
    while not done.is_set():
        try:
            done.wait()
        except (KeyboardInterrupt, SystemExit) as error:
            logger.warning("the cluster is being closed; please wait")
            interruptions.append(error)
    # Failures come first: machines that could not be terminated cost money.
    if failures or interruptions:
        raise (failures + interruptions)[0]

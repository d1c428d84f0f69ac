"""The guard of scripts: without it, each new process runs the script again first."""

import multiprocessing
import os
import sys
from multiprocessing import process
from multiprocessing.context import BaseContext

from fruitdask.errors import ScriptError

#: Exit code of a process that was running its parent's script again.
_EXIT_CODE = 77


def leave_imported_script() -> None:
    """Exit quietly if this process is running its parent's script again; the parent reports it."""
    # Python sets this while a new process imports its parent's main module, and refuses to start processes meanwhile.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(_EXIT_CODE)


def forget_missing_script() -> None:
    """Forget the name of a script that is not a file, such as <stdin>: each new process would try to import it."""
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if script is not None and not os.path.exists(os.path.join(getattr(process, "ORIGINAL_DIR", None) or "", script)):
        del main.__file__


def check_exit_code(exit_code: int | None) -> None:
    """Raise an error if a process ended because it was running the script again."""
    if exit_code == _EXIT_CODE:
        script = getattr(sys.modules["__main__"], "__file__", "the script")
        raise ScriptError(
            f'{script}: put the calls of fruitdask below if __name__ == "__main__": '
            "(each process that fruitdask starts imports this script first)"
        )


def check_script(method: str) -> None:
    """Start an empty process to check that the script can be imported."""
    if multiprocessing.current_process().daemon:
        # Daemons cannot start processes.
        return
    context: BaseContext = multiprocessing.get_context(method)
    probe = context.Process(target=_do_nothing)  # type: ignore[attr-defined]
    probe.start()
    probe.join()
    check_exit_code(_EXIT_CODE if probe.exitcode > 0 else None)


def _do_nothing() -> None:
    """Do nothing."""

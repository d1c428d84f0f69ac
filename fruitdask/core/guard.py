"""The guard of scripts: without it, each process that is started for a script runs the script again before anything else."""

import multiprocessing
import os
import sys
from multiprocessing import process
from multiprocessing.context import BaseContext

from fruitdask.errors import ScriptError

#: How a process ends that found itself running the script of its parent again.
_EXIT_CODE = 77


def leave_imported_script() -> None:
    """End this process quietly if it was started for a script and is running that script again; the parent says why."""
    # Python sets this while a new process imports the main module of its parent, and refuses to start further processes meanwhile.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(_EXIT_CODE)


def forget_missing_script() -> None:
    """Take away the name of a script that is not a file, such as <stdin>, which each new process would try to import."""
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if script is not None and not os.path.exists(os.path.join(getattr(process, "ORIGINAL_DIR", None) or "", script)):
        del main.__file__


def check_exit_code(exit_code: int | None) -> None:
    """Find out whether a process ended because it was running the script again."""
    if exit_code == _EXIT_CODE:
        raise _describe_script()


def check_script(method: str) -> None:
    """Start a process that has nothing to do, to find out whether the script can be imported."""
    if multiprocessing.current_process().daemon:
        # Such a process may not start others.
        return
    context: BaseContext = multiprocessing.get_context(method)
    probe = context.Process(target=_do_nothing)  # type: ignore[attr-defined]
    probe.start()
    probe.join()
    if probe.exitcode > 0:
        raise _describe_script()


def _describe_script() -> ScriptError:
    """Say what the script lacks."""
    script = getattr(sys.modules["__main__"], "__file__", "the script")
    return ScriptError(
        f'{script}: put the calls of fruitdask below if __name__ == "__main__": '
        "(each process that fruitdask starts imports this script first)"
    )


def _do_nothing() -> None:
    """Do nothing."""

"""What commands share: options, errors as sentences and exit codes, rows of names and values."""

import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import click

from fruitdask import errors

if TYPE_CHECKING:
    from rich.console import Console

_INTERRUPTED = 130
#: The exit code of the first class that an error belongs to; 1 for the others.
_EXIT_CODES: tuple[tuple[type[errors.FruitdaskError], int], ...] = (
    (errors.TooManyFailuresError, 3),
    (errors.ResidencyError, 4),
    (errors.LimitError, 4),
    (errors.ClusterStartError, 5),
    (errors.DamageError, 1),
    (errors.PartitionError, 1),
    (errors.WeightsUnavailableError, 1),
    (errors.EngineError, 1),
    (errors.FruitdaskError, 2),
)
_LOG_FORMAT = "%(asctime)s %(name)s: %(message)s"

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a setting, for example --set model.pooling=max. Repeatable.",
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Delete earlier results in the output folder and start again."
)
verbose_option = click.option("--verbose", "-v", is_flag=True, help="Log what happens inside, and show tracebacks.")
config_argument = click.argument("config", type=click.Path(dir_okay=False))


@contextmanager
def reported(*, verbose: bool = False, again: str = "run the same command again") -> Iterator[None]:
    """
    Turn an error into one sentence and an exit code; an interruption is told how to go on.

    Parameters
    ----------
    verbose : bool
        Whether to log what happens inside, and to show tracebacks.
    again : str
        What to do after an interruption.

    Yields
    ------
    None
        Control, once.
    """
    if verbose:
        logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    # Where a terminal's Ctrl-C raises KeyboardInterrupt, a service manager's request to end would kill: clusters must be closed then too.
    previous = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except errors.FruitdaskError as error:
        from fruitdask.storage import hide_secrets

        if verbose:
            click.echo(hide_secrets(traceback.format_exc()), err=True)
        click.echo(f"fruitdask: {hide_secrets(str(error))}", err=True)
        sys.exit(next(code for kind, code in _EXIT_CODES if isinstance(error, kind)))
    except KeyboardInterrupt:
        click.echo(f"fruitdask: interrupted; {again}", err=True)
        sys.exit(_INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end(signum: int, frame: object) -> NoReturn:
    """Leave by an exception, which closes what is open on its way."""
    raise SystemExit(128 + signum)


def print_rows(rows: dict[str, str], console: "Console") -> None:
    """
    Print names and values, those that there are.

    Parameters
    ----------
    rows : dict[str, str]
        Values by name; an empty value is left out.
    console : rich.console.Console
        Where to.
    """
    from rich.markup import escape

    for name, value in rows.items():
        if value:
            console.print(f"[bold]{name:>18}[/bold]  {escape(value)}", highlight=False, soft_wrap=True)

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
    (errors.OutageError, 1),
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
    """Turn an error into one sentence and an exit code; an interruption is told how to go on."""
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(_HarmlessFormatter(_LOG_FORMAT))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Where a terminal's Ctrl-C raises KeyboardInterrupt, a service manager's request to end would kill: clusters must be closed then too.
    previous = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except errors.FruitdaskError as error:
        if verbose:
            click.echo(_make_harmless(traceback.format_exc()), err=True)
        # Sentences about settings have a line each; of other messages a name of others may hold the line break.
        sentences = str(error).split("\n") if isinstance(error, errors.SettingsError) else [str(error)]
        for sentence in sentences:
            click.echo(f"fruitdask: {show(_make_harmless(sentence))}", err=True)
        sys.exit(next(code for kind, code in _EXIT_CODES if isinstance(error, kind)))
    except ValueError as error:
        # Dask reads its files when it is imported.
        if not str(error).startswith("A dask config file"):
            raise
        click.echo(f"fruitdask: {show(_make_harmless(' '.join(str(error).split())))}; correct or delete it", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo(f"fruitdask: interrupted; {again}", err=True)
        sys.exit(_INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, previous)


class _HarmlessFormatter(logging.Formatter):
    """Lines of a log without secrets and without commands to the terminal, whoever wrote them."""

    def format(self, record: logging.LogRecord) -> str:
        return _make_harmless(super().format(record))


def _make_harmless(text: str) -> str:
    """Take secrets out of lines of text, and what a terminal would obey."""
    from fruitdask.core.escaping import escape_controls
    from fruitdask.core.storage import hide_secrets

    return escape_controls(hide_secrets(text), keeps_lines=True)


def show(text: str) -> str:
    """Make a name or a message of others ready for the terminal."""
    from fruitdask.core.escaping import escape_controls

    return escape_controls(text)


def _end(signum: int, frame: object) -> NoReturn:
    """Leave by an exception, which closes what is open on its way."""
    raise SystemExit(128 + signum)


def print_rows(rows: dict[str, str], console: "Console") -> None:
    """Print names and values, those that there are."""
    from rich.markup import escape

    from fruitdask.core.escaping import escape_controls

    for name, value in rows.items():
        if value:
            console.print(
                f"[bold]{name:>18}[/bold]  {escape(escape_controls(value, keeps_lines=True))}",
                highlight=False,
                soft_wrap=True,
            )

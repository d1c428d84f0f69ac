"""Shared parts of commands: options, errors as sentences and exit codes, rows of names and values."""

import errno
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fruitdask import errors

if TYPE_CHECKING:
    from fruitdask.core.config import Config

_INTERRUPTED = 130
#: Exit codes by class of error: the first match counts.
_EXIT_CODES: tuple[tuple[Any, int], ...] = (
    (errors.TooManyFailuresError, 3),
    ((errors.ResidencyError, errors.LimitError), 4),
    (errors.ClusterStartError, 5),
    ((errors.DamageError, errors.OutageError, errors.PartitionError), 1),
    ((errors.WeightsUnavailableError, errors.EngineError), 1),
    (errors.FruitdaskError, 2),
)
#: Columns before the value of a row, and rows that are never wrapped.
_INDENT, _PLACES = 20, ("results", "report", "table", "failures")
#: Ends of the names of configuration files.
_ENDINGS = (".yaml", ".yml")
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
model_option = click.option("--model", metavar="NAME", help="The network, short for --set model.name=NAME.")
weights_option = click.option(
    "--weights", metavar="FILE", help="Its weights or a model of your own, short for --set model.weights=FILE."
)
verbose_option = click.option("--verbose", "-v", is_flag=True, help="Log internal steps, and show tracebacks.")
config_argument = click.argument("config", metavar="CONFIG_OR_RESULTS")
results_argument = click.argument("results", required=False)
#: A command that starts from photographs takes a folder too.
photographs_argument = click.argument("config", metavar="PHOTOS_OR_CONFIG")


@contextmanager
def reported(*, verbose: bool = False, again: str = "run the same command again") -> Iterator[None]:
    """Turn an error into one sentence and an exit code; after an interruption, advise how to resume."""
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(_SafeFormatter(_LOG_FORMAT))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Like Ctrl-C, a service manager or a terminal that closes must close clusters; nohup ignores the latter.
    names = ("SIGTERM", "SIGHUP") if os.name == "posix" else ("SIGTERM",)
    ending = [each for each in map(signal.Signals.__getitem__, names) if signal.getsignal(each) != signal.SIG_IGN]
    previous = {each: signal.signal(each, _end) for each in ending}
    try:
        yield
    except errors.FruitdaskError as error:
        if verbose:
            click.echo(_clean(traceback.format_exc()), err=True)
        # A SettingsError has one sentence per line; a line break in another message is part of a name.
        sentences = str(error).split("\n") if isinstance(error, errors.SettingsError) else [str(error)]
        for sentence in sentences:
            _tell(show(_clean(sentence)))
        sys.exit(next(code for kinds, code in _EXIT_CODES if isinstance(error, kinds)))
    except ValueError as error:
        # Dask reads its files when it is imported.
        if not str(error).startswith("A dask config file"):
            raise
        _tell(f"{show(_clean(' '.join(str(error).split())))}; correct or delete it")
        sys.exit(2)
    except OSError as error:
        if (cause := _explain_system(error)) is None:
            raise
        _tell(cause)
        sys.exit(1)
    except KeyboardInterrupt:
        _tell(f"interrupted; {again}")
        sys.exit(_INTERRUPTED)
    finally:
        for each, earlier in previous.items():
            signal.signal(each, earlier)


def _explain_system(error: OSError) -> str | None:
    """Explain an error that concerns neither input nor output; None for others."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left where this command prints, or for temporary files; make room there and run again"
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current folder was deleted; change to another one and run again"
    return None


def _tell(sentence: str) -> None:
    """Write a sentence to standard error; on a terminal, wrap it between words."""
    n_columns = get_terminal_size().columns if sys.stderr.isatty() else None
    click.echo("\n".join(_break(f"fruitdask: {sentence}", n_columns)), err=True)


def _break(line: str, n_columns: int | None) -> list[str]:
    """Wrap a line between words, if there is a width."""
    return [line] if n_columns is None else wrap(line, n_columns, break_long_words=False, break_on_hyphens=False)


class _SafeFormatter(logging.Formatter):
    """Log lines without secrets and control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return _clean(super().format(record))


def _clean(text: str) -> str:
    """Hide secrets and escape control characters, except line breaks."""
    from fruitdask.core.storage import hide_secrets

    return show(hide_secrets(text), keeps_lines=True)


def show(text: str, *, keeps_lines: bool = False) -> str:
    """Escape the control characters of a text for the terminal."""
    from fruitdask.core.escaping import escape_controls

    return escape_controls(text, keeps_lines=keeps_lines)


def _end(signum: int, frame: object) -> NoReturn:
    """Exit by an exception, so that everything open is closed."""
    raise SystemExit(128 + signum)


def override_model(model: str | None, weights: str | None) -> tuple[str, ...]:
    """Turn the options --model and --weights into overrides."""
    given = {"model.name": model, "model.weights": weights}
    return tuple(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None)


def load(config: str, overrides: tuple[str, ...], results: str | None = None) -> "Config":
    """Load the configuration of a command: a file, or photographs without one."""
    from fruitdask.core.config import load_config

    sections = describe_photographs(config, results)
    if sections is None and not config.endswith(_ENDINGS) and not Path(config).exists():
        raise errors.ConfigError(f"{config}: there is no such folder, archive or configuration file; check the path")
    if sections is None and results is not None:
        overrides += (f"output.url={json.dumps(results, ensure_ascii=False)}",)
    return load_config(sections or config, overrides=overrides)


def describe_photographs(place: str, results: str | None = None) -> dict[str, Any] | None:
    """Describe a run that is given only photographs; None for a file, or a place that is missing."""
    from fruitdask.core.config import describe_place

    sections = describe_place(place, results)
    if sections is not None and (written := _find_config(place)):
        # Their figures are images too.
        raise errors.ConfigError(
            f"{place}: expected photographs or a configuration file, found the results of a run; to run it again, name "
            f"{written}"
        )
    return sections


def _find_config(place: str) -> Path | None:
    """Find the place of the configuration in a local folder of results; None for anything else."""
    if not Path(place).is_dir():
        return None
    from fruitdask.store.layout import CONFIG, EXPLORATION, MANIFEST

    has_results = any(Path(place, name).exists() for name in (MANIFEST, EXPLORATION))
    return Path(place, CONFIG) if has_results else None


def _find_results(place: str) -> str:
    """Find the results beside a local folder of photographs; anything else is returned as it is."""
    from fruitdask.core.config import describe_place

    sections = describe_place(place) if Path(place).is_dir() and not _find_config(place) else None
    beside = sections["output"]["url"] if sections is not None else place
    return beside if _find_config(beside) else place


def prepare_cluster(config: "Config") -> None:
    """Prepare a local cluster while this process imports."""
    if config.cluster.kind != "local":
        return
    from fruitdask.cluster import prepare_local

    # The process that it starts inherits this, and would end with a traceback while it imports: a terminal sends Ctrl-C
    # to all processes.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        prepare_local()
    finally:
        signal.signal(signal.SIGINT, previous)


def load_results(place: str, overrides: tuple[str, ...], *, sections: tuple[str, ...] | None = None) -> "Config":
    """Load a configuration from its file, or from a folder or URL of results; `sections` limits what is read there."""
    from fruitdask.core.config import load_config
    from fruitdask.core.storage import Location
    from fruitdask.pipeline.config import read_config

    place = _find_results(place)
    if sections is None and (written := _find_config(place)) and written.is_file():
        # The results may have been moved.
        return load_config(written, overrides=(f"output.url={json.dumps(place, ensure_ascii=False)}", *overrides))
    tree = None if Path(place).is_file() else read_config(Location(place.rstrip("/")), sections=sections)
    return load_config(tree, overrides=overrides) if tree is not None else load(place, overrides)


def find_output(output: str) -> tuple[str, dict[str, Any]]:
    """Find the results that a folder, a URL, a configuration file or photographs name, and their storage options."""
    if not Path(output).is_file():
        return _find_results(output), {}
    config = load(output, ())
    return config.output.url, dict(config.output.storage_options)


def format_fraction(value: float) -> str:
    """Format a fraction as a percentage: like on the page, never 100 % below 1, nor 0 % above 0.

    >>> [format_fraction(value) for value in (1, 0.9997, 0.5, 0.0003, 0)]
    ['100.0%', '99.9%', '50.0%', '0.1%', '0.0%']
    """
    return f"{value if value in (0, 1) else min(max(value, 0.001), 0.999):.1%}"


def print_rows(rows: dict[str, str], *above: Any) -> None:
    """Print `above`, then names and values; skip empty values."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    for each in above:
        console.print(each)
    # Other programs read whole lines, and people copy paths and URLs.
    n_columns = max(console.width - _INDENT, _INDENT) if console.is_terminal else None
    for name, value in rows.items():
        if value:
            text = _indent(show(value, keeps_lines=True), None if name in _PLACES else n_columns)
            console.print(f"[bold]{name:>18}[/bold]  {escape(text)}", highlight=False, soft_wrap=True)


def _indent(text: str, n_columns: int | None) -> str:
    """Align the lines of a value with its first one, after wrapping them between words if there is a width."""
    lines = [part for line in text.split("\n") for part in _break(line.strip(), n_columns)]
    return ("\n" + " " * _INDENT).join(lines)

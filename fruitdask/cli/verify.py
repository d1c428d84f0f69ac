"""The command that reads results again and says what is damaged."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fruitdask.cli.common import print_rows, reported, verbose_option

if TYPE_CHECKING:
    from fruitdask.pipeline.verify import Verification


@click.command()
@click.argument("output")
@click.option("--repair", is_flag=True, help="Take away or restore what is damaged, so that the next run mends it.")
@verbose_option
def verify(output: str, repair: bool, verbose: bool) -> None:
    """Read all results in OUTPUT again and name everything that is damaged, missing, or does not agree.

    OUTPUT is a folder or URL, or the configuration file that names it, for its storage options. No image is read, no cluster started; of a
    run that is not finished, what is done is verified. The exit code is 0 where all is well, or was repaired, and 1 where it is not.

    With --repair the next fruitdask run computes what is damaged again and nothing else. Let no run be at work in OUTPUT meanwhile.
    """
    from rich.console import Console

    from fruitdask.core.progress import choose_progress

    with reported(verbose=verbose):
        url, options = _find_output(output)
        from fruitdask.pipeline.verify import verify as verify_output

        found = verify_output(url, storage_options=options, repair=repair, progress=choose_progress())
        _print(found, output, Console())
    sys.exit(0 if found.is_well or found.is_repaired and found.can_be_mended else 1)


def _find_output(output: str) -> tuple[str, dict[str, Any]]:
    """Find the folder, and the options to reach it."""
    if not Path(output).is_file():
        return output, {}
    from fruitdask.core.config import load_config

    config = load_config(output)
    return config.output.url, dict(config.output.storage_options)


def _print(found: "Verification", output: str, console: Any) -> None:
    """Print what was found, and what to do."""
    from fruitdask.core.storage import hide_secrets

    for fault in found.faults:
        click.echo(hide_secrets(str(fault)))
    rows = {
        "verified": f"{found.n_images:,} images in {found.n_partitions:,} partitions",
        "faults": f"{len(found.faults):,}" if found.faults else "none",
        "note": "; ".join(found.notes),
        "next": _advise(found, output),
        "results": hide_secrets(found.output.url),
    }
    print_rows(rows, console)


def _advise(found: "Verification", output: str) -> str:
    """Say what to do about faults."""
    if found.is_well:
        return ""
    if not found.can_be_mended:
        return "fruitdask run with --overwrite, or the folder from a backup"
    run = "fruitdask run with its configuration"
    return run if found.is_repaired else f"fruitdask verify {shlex.quote(output)} --repair, then {run}"

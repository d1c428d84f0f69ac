"""The command that verifies results and repairs damaged ones."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fruitdask.cli.common import find_output, print_rows, reported, verbose_option

if TYPE_CHECKING:
    from fruitdask.pipeline.verify import Verification


@click.command()
@click.argument("output")
@click.option("--repair", is_flag=True, help="Delete or restore damaged results, so that the next run repairs them.")
@verbose_option
def verify(output: str, repair: bool, verbose: bool) -> None:
    """Report what is damaged, missing or inconsistent in OUTPUT.

    Reads all results, but no image, and starts no cluster. OUTPUT is a folder or URL, or the configuration file of the
    run, which also gives storage options. Verifies what an unfinished run has stored so far. The exit code is 0 if
    there is no fault, or all were repaired, and 1 otherwise.

    After --repair, the next fruitdask run computes only the damaged results again. No run may use OUTPUT meanwhile.
    """
    from fruitdask.core.progress import choose_progress

    with reported(verbose=verbose):
        url, options = find_output(output)
        from fruitdask.pipeline.verify import verify as verify_output

        found = verify_output(url, storage_options=options, repair=repair, progress=choose_progress())
        _print(found, output)
    sys.exit(0 if found.is_well or found.is_repaired and found.can_be_mended else 1)


def _print(found: "Verification", output: str) -> None:
    """Print the faults, and what to do."""
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
    print_rows(rows)


def _advise(found: "Verification", output: str) -> str:
    """Advise what to do about faults."""
    if found.is_well:
        return ""
    if not found.can_be_mended:
        return "fruitdask run with --overwrite, or restore the folder from a backup"
    run = f"fruitdask run {shlex.quote(output)}" if Path(output).is_file() else "fruitdask run with its configuration"
    return run if found.is_repaired else f"fruitdask verify {shlex.quote(output)} --repair, then {run}"

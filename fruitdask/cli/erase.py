"""The command that erases images from results."""

from typing import TYPE_CHECKING

import click

from fruitdask.cli.common import config_argument, load_results, print_rows, reported, set_option, show, verbose_option

if TYPE_CHECKING:
    from fruitdask.core.config import Config
    from fruitdask.pipeline.erase import Erasure


@click.command()
@config_argument
@click.option(
    "--path",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Path of an image, relative to input.url, or a pattern such as 'pear_1/*' or '*/IMG_20*'. Repeatable.",
)
@click.option(
    "--paths", "table", metavar="FILE", help="CSV or Parquet table (path, label), such as the page's selected.csv."
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@set_option
@verbose_option
def erase(
    config: str, patterns: tuple[str, ...], table: str | None, yes: bool, overrides: tuple[str, ...], verbose: bool
) -> None:
    """Erase images from results.

    Deletes their rows, names, features and thumbnails, and computes the results of the run again without them.

    The image files are not deleted: delete them, or exclude them with
    input.exclude or input.exclude_from.
    """
    from fruitdask.core.progress import choose_progress

    if not patterns and table is None:
        raise click.UsageError("expected the images to erase: --path PATTERN, or --paths FILE")
    again = "run the same command again; if it finds no such image, they are erased, and fruitdask run resumes"
    with reported(verbose=verbose, again=again):
        loaded = load_results(config, overrides)
        from fruitdask.core.labels import read_paths
        from fruitdask.pipeline.erase import carry_out, plan_erasure

        patterns += read_paths(table, "--paths") if table is not None else ()
        plan = plan_erasure(loaded, patterns)
        question = f"Erase {plan.n_erased:,} of {plan.n_images:,} images from {loaded.output.url}?"
        if not yes:
            click.confirm(question, abort=True)
        print_rows(_describe(carry_out(plan, progress=choose_progress()), loaded))


def _describe(erasure: "Erasure", config: "Config") -> dict[str, str]:
    """Describe what was erased and what is left to do."""
    from fruitdask.core.storage import Location

    n_left, n_in_input = erasure.n_images - erasure.n_erased, erasure.n_in_input
    remedy = "delete them, or add them to input.exclude"
    rows = {"erased": f"{erasure.n_erased:,} of {erasure.n_images:,} images"}
    again = f"computed again from the {n_left:,} remaining images"
    if erasure.unmatched:
        rows["not found"] = f"{len(erasure.unmatched):,} paths or patterns, such as {show(erasure.unmatched[0])}"
    rows["results"] = again if erasure.result else "fruitdask run resumes without them"
    if n_in_input is None:
        rows["input"] = f"could not be listed; if they are there, {remedy}"
    elif n_in_input:
        rows["input"] = f"{n_in_input:,} of them are still there; before the next run, {remedy}"
    if erasure.keeps_versions and Location(config.output.url).is_azure:
        rows["older versions"] = (
            "the account keeps deleted blobs or older versions for some time; delete them in the portal, or let a "
            f"lifecycle rule delete those below {config.output.url}"
        )
    elif erasure.keeps_versions:
        rows["older versions"] = (
            f"the bucket keeps them; also delete those below {config.output.url} (aws s3api delete-objects with their "
            "VersionId, or a lifecycle rule with NoncurrentVersionExpiration)"
        )
    return rows

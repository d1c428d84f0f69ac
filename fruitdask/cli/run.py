"""Commands that compute results: run, explore, report."""

import time
from pathlib import Path

import click

from fruitdask.cli.common import (
    config_argument,
    load,
    load_results,
    model_option,
    override_model,
    overwrite_option,
    photographs_argument,
    prepare_cluster,
    reported,
    results_argument,
    set_option,
    verbose_option,
    weights_option,
)
from fruitdask.cli.summary import print_exploration, print_summary


@click.command()
@photographs_argument
@results_argument
@model_option
@weights_option
@set_option
@overwrite_option
@click.option("--retry-failed", is_flag=True, help="Retry images that failed in earlier runs.")
@click.option("--log-json", metavar="FILE", help="Append the progress to a file, as lines of JSON.")
@verbose_option
def run(
    config: str,
    results: str | None,
    model: str | None,
    weights: str | None,
    overrides: tuple[str, ...],
    overwrite: bool,
    retry_failed: bool,
    log_json: str | None,
    verbose: bool,
) -> None:
    """Compute features, reduce them, and write tables and a page.

    PHOTOS_OR_CONFIG is a folder, an archive or a URL of photographs, or a configuration file. RESULTS is the folder or
    URL of the results, by default beside the photographs: PHOTOS-results.

    Run it again after an interruption, or after images were added, changed or removed: it reuses stored results.
    """
    from fruitdask.core.json_log import JsonLog
    from fruitdask.core.progress import choose_progress

    started = time.perf_counter()
    overrides = override_model(model, weights) + overrides + ("output.overwrite=true",) * overwrite
    again = "stored results are kept, run the same command again to resume" + ", without --overwrite" * overwrite
    with reported(verbose=verbose, again=again):
        loaded = load(config, overrides, results)
        progress = choose_progress() if log_json is None else JsonLog(choose_progress(), Path(log_json))
        prepare_cluster(loaded)
        from fruitdask.pipeline.run import run as run_pipeline

        result = run_pipeline(loaded, retry_failed=retry_failed, progress=progress)
        print_summary(result, waited_seconds=time.perf_counter() - started)


@click.command()
@photographs_argument
@results_argument
@set_option
@overwrite_option
@verbose_option
def explore(config: str, results: str | None, overrides: tuple[str, ...], overwrite: bool, verbose: bool) -> None:
    """Explore the images without a network.

    PHOTOS_OR_CONFIG and RESULTS are those of fruitdask run.

    Images per class, sizes, colours, differences within classes, duplicates, and files that contain positions or names.
    """
    from fruitdask.core.progress import choose_progress

    overrides += ("output.overwrite=true",) if overwrite else ()
    with reported(verbose=verbose):
        loaded = load(config, overrides, results)
        prepare_cluster(loaded)
        from fruitdask.pipeline.explore import carry_out
        from fruitdask.store.exploration import open_exploration

        print_exploration(carry_out(loaded, open_exploration, progress=choose_progress()), loaded)


@click.command()
@config_argument
@set_option
def report(config: str, overrides: tuple[str, ...]) -> None:
    """Draw figures and page again from stored results.

    Needs no cluster and no images. Uses the settings in the sections plots and report of a configuration file, or of
    the configuration in a folder of results.
    """
    with reported():
        loaded = load_results(config, overrides, sections=("output", "plots", "report", "privacy"))
        from fruitdask.pipeline.report import render_report

        click.echo(f"Wrote {render_report(loaded).location.url}")

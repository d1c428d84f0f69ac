"""Commands that compute results: run, explore, report."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    print_rows,
    reported,
    results_argument,
    set_option,
    show,
    verbose_option,
    weights_option,
)

if TYPE_CHECKING:
    from rich.table import Table

    from fruitdask.core.config import Config
    from fruitdask.pipeline.results import RunResult
    from fruitdask.store.exploration import Exploration

_SHOWN_CLASSES = 24
#: What metadata hold, by its name in the counts.
_METADATA = {"exif": "camera data", "gps": "positions", "serial": "serial numbers", "name": "names"}


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
        from fruitdask.pipeline.explore import explore as explore_images

        _print_exploration(explore_images(loaded, progress=choose_progress()), loaded)


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


def print_summary(result: "RunResult", *, waited_seconds: float) -> None:
    """Print the results of a run, their location, and how long the command took."""
    from fruitdask.core.listing import format_left_out
    from fruitdask.pipeline.changes import format_changes
    from fruitdask.store import FAILURES

    manifest, counts = result.manifest, result.manifest["counts"]
    n_images, n_ok, n_vanished = manifest["n_images"], counts["by_status"].get("ok", 0), counts.get("vanished", 0)
    is_done = result.n_computed == 0 and not result.changes
    above = [f"All {n_images:,} images were already done: nothing to compute."] if is_done else []
    seconds, is_default = result.seconds, manifest["config"]["input"].get("extensions") is None
    rows = {
        "images": f"{n_ok:,} ok, {n_images - n_ok:,} failed"
        + (f", {n_vanished:,} of them no longer in the input" if n_vanished else ""),
        "failures": result.output.child(FAILURES).url if n_ok < n_images else "",
        "left out": format_left_out(manifest.get("left_out", {}), is_default=is_default),
        "since the last run": format_changes(result.changes),
        "model": _format_model(manifest["model"]),
        "seconds": ", ".join(f"{stage} {value:.1f}" for stage, value in {**seconds, "total": waited_seconds}.items()),
        "workers' time": _format_shares(manifest) if result.n_computed else "",
        "speed": (
            f"{result.n_computed / seconds['featurize']:.1f} images/s while featurizing"
            if result.n_computed and "featurize" in seconds
            else ""
        ),
        "cost": _format_cost(manifest.get("cost")),
        "explained variance": _format_explained(manifest.get("pca")),
        "same class": _format_quality(result.quality),
        "to check": _format_issues(manifest.get("issues")),
        **_describe_findings(_read_findings(result)),
        "results": result.output.url,
        "report": result.report.location.url if manifest["config"]["report"]["enabled"] else "",
    }
    print_rows(rows, *above, _build_class_table(counts["by_class"]))


def _print_exploration(found: "Exploration", config: "Config") -> None:
    """Print the results of an exploration and their location."""
    from rich.markup import escape
    from rich.table import Table

    from fruitdask.core.listing import format_left_out
    from fruitdask.store import EXPLORED_IMAGES, PAGE

    table = Table("class", "images", "median px", "difference", "near duplicates", title=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, row in found.classes.head(_SHOWN_CLASSES).iterrows():
        size = f"{row['width_px_median']:.0f} x {row['height_px_median']:.0f}" if row["n_ok"] else "-"
        has_pairs = row["n_ok"] > 1
        difference = f"{row['mean_squared_difference']:.4f} ± {row['standard_error']:.4f}" if has_pairs else "-"
        table.add_row(
            escape(show(str(label))), f"{row['n_images']:,}", size, difference, f"{row['n_near_duplicates']:,}"
        )
    if len(found.classes) > _SHOWN_CLASSES:
        table.add_row(f"... and {len(found.classes) - _SHOWN_CLASSES} more classes")
    summary = found.summary
    n_failed = summary["n_images"] - summary["n_ok"]
    rows = {
        "images": f"{summary['n_ok']:,} readable, {n_failed:,} not",
        "failures": f"{config.output.url.rstrip('/')}/{EXPLORED_IMAGES}.csv" if n_failed else "",
        "left out": format_left_out(summary.get("left_out", {}), is_default=config.input.extensions is None),
        **_describe_findings(summary),
        "results": config.output.url,
        "report": f"{config.output.url.rstrip('/')}/{PAGE}" if config.report.enabled else "",
    }
    print_rows(rows, table)


def _read_findings(result: "RunResult") -> dict[str, Any]:
    """Read the counts of the exploration of a run; empty if it did not explore."""
    from fruitdask.store import read_exploration_manifest

    explored = read_exploration_manifest(result.output) if result.manifest["config"]["explore"]["enabled"] else None
    return explored.dump() if explored is not None and explored.is_complete else {}


def _describe_findings(summary: dict[str, Any]) -> dict[str, str]:
    """Describe the counts of an exploration."""
    if not summary:
        return {}
    return {
        "duplicates": _format_groups(summary["duplicates"]),
        "near duplicates": _format_groups(summary["near_duplicates"]),
        "files that contain": ", ".join(f"{_METADATA[kind]} {count:,}" for kind, count in summary["metadata"].items()),
        "compared": _describe_size(summary),
    }


def _describe_size(summary: dict[str, Any]) -> str:
    """Say why images were compared at a smaller size, if they were."""
    if "compared_px" not in summary:
        return ""
    return f"at {summary['compared_px']} px instead of {summary['input_px']}, as very many classes alternate"


def _format_groups(groups: dict[str, int]) -> str:
    """Describe the numbers of duplicate images and groups."""
    if not groups["n_images"]:
        return "none"
    n_across = groups["n_groups_across_classes"]
    across = f", {n_across:,} of them across classes" if n_across else ""
    return f"{groups['n_images']:,} images in {groups['n_groups']:,} groups{across}"


def _build_class_table(by_class: dict[str, dict[str, int]]) -> "Table":
    """Build the table of images by class; if there are many, prefer classes with failures."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("class", "ok", "failed")
    for column in table.columns[1:]:
        column.justify = "right"
    shown = sorted(by_class, key=lambda label: -by_class[label]["failed"])[:_SHOWN_CLASSES]
    for label in sorted(shown):
        counts = by_class[label]
        style = "red" if counts["failed"] else None
        table.add_row(escape(show(label)), f"{counts['ok']:,}", f"{counts['failed']:,}", style=style)
    if len(by_class) > len(shown):
        table.add_row(f"... and {len(by_class) - len(shown)} more classes", "", "")
    return table


def _format_model(model: dict[str, Any]) -> str:
    """Describe the network and the layer of the features."""
    layer = f"layer {model['layer']}, " if model.get("layer") else ""
    return f"{model['name']}, {layer}{model['n_features']} features, {model['engine']}"


def _format_shares(manifest: dict[str, Any]) -> str:
    """Describe how workers spent their time, the largest share first."""
    seconds = manifest["seconds"]
    spent = dict(seconds.get("worker", {}))
    if not spent:
        return ""
    # Partitions overlap a little, so the sum of the stages may exceed the elapsed time.
    whole = max(seconds.get("featurize", 0.0) * manifest["cluster"]["n_threads"], sum(spent.values()))
    spent["idle"] = whole - sum(spent.values())
    shares = sorted(spent.items(), key=lambda item: -item[1])
    return ", ".join(f"{stage} {value / whole:.0%}" for stage, value in shares) if whole else ""


def _format_cost(cost: dict[str, Any] | None) -> str:
    """Format the cost of a run's instances, including those of interrupted attempts."""
    if cost is None:
        return ""
    hours = sum(figures["seconds"] for figures in cost["instances"].values()) / 3600
    unknown = f", without {', '.join(cost['without_price'])}" if "without_price" in cost else ""
    return f"${cost['dollars']:.2f} for {hours:.2f} hours of instances, by prices of {cost['prices_of']}{unknown}"


def _format_explained(pca: dict[str, Any] | None) -> str:
    """Format the variance explained by the first components and by all, and the number of images of an earlier fit."""
    if pca is None:
        return ""
    ratios = pca["explained_variance_ratio"]
    first = " + ".join(f"{ratio:.1%}" for ratio in ratios[:4])
    fit = f", as fitted to {pca['fit']['n_images']:,} images" if pca.get("is_kept") else ""
    return f"{first}{' + ...' if len(ratios) > 4 else ''} = {sum(ratios):.1%} by {len(ratios)} components{fit}"


def _format_issues(record: dict[str, Any] | None) -> str:
    """Describe how many photographs to check there are of each kind."""
    from fruitdask.analysis.issues import KINDS
    from fruitdask.store import ISSUES_CSV

    if record is None:
        return ""
    counts = {kind: record["by_kind"][kind] for kind in KINDS if record["by_kind"].get(kind)}
    shown = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts.items())
    return f"{shown} (see fruitdask check, {ISSUES_CSV} and the report)" if shown else "nothing"


def _format_quality(quality: dict[str, Any] | None) -> str:
    """Describe how many of the nearest neighbours have the class of an image, and what that was measured on."""
    grouped = (quality or {}).get("grouped")
    neighbors = (grouped or quality or {}).get("neighbors", {})
    if quality is None or neighbors["agreement"] is None:
        return "unknown: no class has images of two groups (input.group_from)" if grouped else ""
    text = f"{neighbors['agreement']:.1%} of the {neighbors['k']} nearest neighbours"
    if grouped:
        return f"{text} in other groups ({quality['neighbors']['agreement']:.1%} with those of its own group)"
    if series := quality.get("series"):
        text += (
            "; flattered, for consecutive images look alike: set input.group_from, " f"such as '{series['pattern']}'"
        )
    return text

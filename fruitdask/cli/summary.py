"""What the commands print about results: one table of classes, and rows of figures."""

from typing import TYPE_CHECKING, Any

from fruitdask.cli.common import format_fraction, print_rows, show

if TYPE_CHECKING:
    from rich.table import Table

    from fruitdask.core.config import Config
    from fruitdask.pipeline.results import RunResult
    from fruitdask.store.exploration import Exploration

_SHOWN_CLASSES = 24
#: Fewest images for which the cost per million is shown.
_FEWEST_PRICED = 10_000
#: Advice on speed needs this many seconds of featurizing, and this share of them in one stage.
_LONG_SECONDS, _LIMITING_SHARE = 60.0, 0.4
#: Kinds of metadata in words, by their names in the counts.
_METADATA = {"exif": "camera data", "gps": "positions", "serial": "serial numbers", "name": "names"}


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
    shares = _compute_shares(manifest) if result.n_computed else {}
    rows = {
        "images": f"{n_ok:,} ok, {n_images - n_ok:,} failed"
        + (f", {n_vanished:,} of them no longer in the input" if n_vanished else ""),
        "failures": result.output.child(FAILURES).url if n_ok < n_images else "",
        "left out": format_left_out(manifest.get("left_out", {}), is_default=is_default),
        "since the last run": format_changes(result.changes),
        "model": _format_model(manifest["model"]),
        "seconds": ", ".join(f"{stage} {value:.1f}" for stage, value in {**seconds, "total": waited_seconds}.items()),
        "workers' time": ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items()),
        "speed": (
            f"{result.n_computed / seconds['featurize']:.1f} images/s while featurizing"
            if result.n_computed and "featurize" in seconds
            else ""
        ),
        "to go faster": _advise(shares, manifest),
        "cost": _format_cost(manifest.get("cost"), n_images=manifest["n_images"]),
        "explained variance": _format_explained(manifest.get("pca")),
        "same class": _format_quality(result.quality),
        "to check": _format_issues(manifest.get("issues")),
        **_describe_findings(_read_findings(result)),
        "results": result.output.url,
        "report": result.report.location.url if manifest["config"]["report"]["enabled"] else "",
    }
    print_rows(rows, *above, _build_class_table(counts["by_class"]))


def print_exploration(found: "Exploration", config: "Config") -> None:
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
        error = f" ± {row['standard_error']:.4f}" if row["n_ok"] > 2 else ""
        difference = f"{row['mean_squared_difference']:.4f}{error}" if row["n_ok"] > 1 else "-"
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
    return f"at {summary['compared_px']} px instead of {summary['input_px']}, to save memory: many classes alternate"


def _format_groups(groups: dict[str, int]) -> str:
    """Describe the numbers of duplicate images and groups."""
    if not groups["n_images"]:
        return "none"
    n_across = groups["n_groups_across_classes"]
    across = f", {n_across:,} of them across classes" if n_across else ""
    return f"{groups['n_images']:,} images in {groups['n_groups']:,} group{'s' * (groups['n_groups'] != 1)}{across}"


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


def _compute_shares(manifest: dict[str, Any]) -> dict[str, float]:
    """Compute the share of the workers' time that each stage took, the largest first."""
    seconds = manifest["seconds"]
    spent = dict(seconds.get("worker", {}))
    # Partitions overlap a little, so the sum of the stages may exceed the elapsed time.
    whole = max(seconds.get("featurize", 0.0) * manifest["cluster"]["n_threads"], sum(spent.values()))
    if not spent or not whole:
        return {}
    spent["idle"] = whole - sum(spent.values())
    return {stage: value / whole for stage, value in sorted(spent.items(), key=lambda item: -item[1])}


def _advise(shares: dict[str, float], manifest: dict[str, Any]) -> str:
    """Say which stage limited a long run, and how to speed it up; empty if no stage dominated."""
    limit, share = next(iter(shares.items()), ("", 0.0))
    if share < _LIMITING_SHARE or manifest["seconds"]["featurize"] < _LONG_SECONDS:
        return ""
    is_exact = manifest["config"]["featurize"]["decode"] == "exact"
    is_tensorflow = manifest["model"]["engine"] == "tensorflow"
    advice = {
        "fetch": "reading files took longest: raise featurize.concurrent_reads, or compute where the images are",
        "decode": f"decoding took longest: {'set featurize.decode: fast, or ' * is_exact}use more cores",
        "predict": "the network took longest: "
        f"{'install fruitdask[openvino] where there is no GPU, or ' * is_tensorflow}use more cores",
        "explore": "exploring took longest: set explore.enabled: false, or use more cores",
        "write": "writing took longest: compute in the region of the output",
        "idle": "workers waited longest: lower featurize.images_per_partition, or use fewer workers",
    }
    return advice.get(limit, "")


def _format_cost(cost: dict[str, Any] | None, *, n_images: int) -> str:
    """Format the cost of a run's instances, including those of interrupted attempts."""
    if cost is None:
        return ""
    hours = sum(figures["seconds"] for figures in cost["instances"].values()) / 3600
    unknown = f", without {', '.join(cost['without_price'])}" if "without_price" in cost else ""
    # The start of the instances costs more than few images do.
    each = f" (${1e6 * cost['dollars'] / n_images:.2f} per million images)" if n_images >= _FEWEST_PRICED else ""
    return f"${cost['dollars']:.2f} for {hours:.2f} hours of instances{each}, by prices of {cost['prices_of']}{unknown}"


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
    """Describe how many of the nearest neighbours share the class of an image, and among which images."""
    grouped = (quality or {}).get("grouped")
    neighbors = (grouped or quality or {}).get("neighbors", {})
    if quality is None or neighbors["agreement"] is None:
        return "unknown: no class has images of two groups (input.group_from)" if grouped else ""
    by_chance = f" (by chance {format_fraction(chance)})" if (chance := neighbors.get("chance")) is not None else ""
    text = f"{format_fraction(neighbors['agreement'])}{by_chance} of the {neighbors['k']} nearest neighbours"
    if grouped:
        own = format_fraction(quality["neighbors"]["agreement"])
        return f"{text} in other groups ({own} with those of its own group)"
    if series := quality.get("series"):
        text += (
            f"; too high, because consecutive images look alike: set input.group_from, such as '{series['pattern']}'"
        )
    return text

"""What the sections of the page say, as plain data.

Each function returns the view of one section, or None where its data is missing.
"""

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import yaml

from fruitdask.analysis.classifier import UNKNOWN_LABEL
from fruitdask.analysis.issues import KINDS
from fruitdask.cluster.regions import EU_REGIONS, LOCAL, UNKNOWN
from fruitdask.core.config import Config
from fruitdask.core.escaping import format_csv
from fruitdask.core.listing import format_left_out
from fruitdask.core.storage import hide_secrets
from fruitdask.report.formats import format_count, format_time
from fruitdask.report.tables import Counts
from fruitdask.report.thumbnails import Thumbnails
from fruitdask.store import EXPLORED_IMAGES, FAILURES, ISSUES_CSV
from fruitdask.store.exploration import Exploration

#: View of a section: what the template shows, under the names that it uses.
View = dict[str, Any]

#: Pictures of examples in all: about 1 KB each.
_MAX_EXAMPLES = 1_200
_MAX_GROUPS, _MAX_GROUP_PICTURES = 6, 8
_MAX_FAILURES = 50
#: Issues of each kind with pictures, and issues in the list that the page carries: about 100 bytes each.
_MAX_ISSUES, _MAX_LISTED_ISSUES = 12, 2_000
_MAX_CONFUSIONS = 10
_MEANINGS = {
    "unreadable": "The file is no image that can be decoded: it is damaged, cut short, or something else under an "
    "image's name.",
    "too_large": "The image has more pixels than featurize.max_pixels allows, or a side of more than 65,535.",
    "missing": "The file was there when the images were listed, but not when it was read.",
    "unreachable": "The storage did not deliver the file, even after several attempts.",
    "not_finite": "The network returned NaN or infinity for it.",
    "crashed": "Each process that worked on it died: it needs too much memory, or crashes a decoder.",
}
_STAGES = {
    "list": "List the images",
    "start": "Start the cluster and build the network",
    "featurize": "Turn images into features",
    "explore": "Compare images",
    "reduce": "PCA, t-SNE and quality",
    "write": "Write the results",
    "check": "Find photographs to check",
    "total": "All together",
}
_WORKER_STAGES = {
    "load": "Load the network",
    "fetch": "Read the files",
    "decode": "Decode and resize",
    "explore": "Look at the images",
    "predict": "Run the network",
    "write": "Write features",
}
_SCALES = {
    "signed": ("−1 (black) to 1 (white)", 4.0),
    "unit": ("0 (black) to 1 (white)", 1.0),
    "bytes": ("0 (black) to 255 (white)", 65_025.0),
}
_METADATA = {
    "exif": "camera data (EXIF)",
    "gps": "a GPS position",
    "serial": "a serial number of a camera or lens",
    "name": "a name of an owner or author",
}

_PLACES = {
    "input": "Photographs from",
    "manifest": "Their list from",
    "weights": "Network from",
    "output": "Results to",
    "cluster": "Computers",
}
_STATED = {"controller": "who is responsible", "purpose": "the purpose", "keep_until": "how long the results are kept"}
_IN_TRANSIT = {
    "TLS": "encrypted (TLS)",
    "one machine": "data did not leave one machine",
    "none": "not encrypted",
}


def count_images(
    manifest: Mapping[str, Any] | None, results: pd.DataFrame | None, exploration: Exploration | None
) -> Counts:
    """Count images by class, from the best source there is."""
    if by_class := (manifest or {}).get("counts", {}).get("by_class"):
        ok, failed = (Counter({label: each[key] for label, each in by_class.items()}) for key in ("ok", "failed"))
        return Counts(ok_by_class=ok, failed_by_class=failed)
    counts = Counts()
    table = results if results is not None else exploration.images if exploration else None
    if table is not None:
        counts.add(table)
    return counts


def describe_summary(
    config: Config,
    *,
    counts: Counts,
    manifest: Mapping[str, Any] | None,
    exploration: Exploration | None,
    quality: Mapping[str, Any] | None,
) -> View:
    """Describe what was run on what, where and when, with the key figures."""
    manifest = manifest or {}
    model, pca = manifest.get("model"), manifest.get("pca")
    is_whole = manifest.get("n_computed") == manifest.get("n_images")
    return {
        "input": show_place(config.input.url),
        "output": show_place(config.output.url),
        "n_images": counts.n_images,
        "n_classes": len(counts.by_class()),
        "n_failed": counts.n_failed,
        "left_out": _say_left_out(config, manifest, exploration),
        "finished": manifest.get("finished") or (exploration.summary.get("finished") if exploration else None),
        "version": manifest.get("fruitdask") or (exploration.summary.get("fruitdask") if exploration else None),
        "model": model,
        "cluster": manifest.get("cluster"),
        "seconds": manifest.get("seconds", {}).get("total") if is_whole else None,
        "quality": describe_agreement(quality) if quality else None,
        "explained": sum(pca["explained_variance_ratio"][:2]) if pca else None,
        "duplicates": exploration.summary.get("duplicates") if exploration else None,
        "near_share": _share_near_duplicates(exploration),
        "metadata": exploration.summary.get("metadata") if exploration else None,
    }


def _say_left_out(config: Config, manifest: Mapping[str, Any], exploration: Exploration | None) -> str:
    """Name which files of the input are not images, or are not taken for other reasons."""
    summary: Mapping[str, Any] = manifest or (exploration.summary if exploration else {})
    return format_left_out(summary.get("left_out", {}), is_default=config.input.extensions is None)


def _share_near_duplicates(exploration: Exploration | None) -> float:
    """Find the share of the images that look nearly the same as another one."""
    found = exploration.summary.get("near_duplicates") if exploration else None
    return found["n_images"] / len(exploration.images) if exploration and found else 0.0


def describe_data(counts: Counts, exploration: Exploration | None) -> View | None:
    """Describe the images: how many of each class, and their sizes."""
    n_images = {label: each["ok"] + each["failed"] for label, each in counts.by_class().items()}
    if not n_images:
        return None
    most = max(n_images.values())
    rows: list[View] = [
        {"label": label, "n_images": n, "n_failed": counts.failed_by_class[label], "share": n / most}
        for label, n in n_images.items()
    ]
    if exploration is None:
        return {"rows": rows, "has_sizes": False}
    medians = exploration.classes[["bytes_median", "width_px_median", "height_px_median"]].astype(object)
    # A class without a readable image has no median, and one that is new since the exploration no row.
    medians = medians.reindex(list(n_images)).where(lambda table: table.notna(), None)
    medians.columns = medians.columns.str.removesuffix("_median")
    for row, values in zip(rows, medians.to_numpy(), strict=True):
        row |= dict(zip(medians.columns, values, strict=True))
    return {"rows": rows, "has_sizes": True, "bytes_total": int(exploration.classes["bytes_total"].sum())}


def describe_examples(exploration: Exploration, thumbnails: Thumbnails, *, per_class: int) -> list[View]:
    """Choose pictures of each class: its mean image, the most and the least typical image, and some more."""
    classes = exploration.classes
    per_class = min(per_class, max(0, _MAX_EXAMPLES // max(1, len(classes)) - 3))
    with_picture = exploration.images.iloc[exploration.thumbnail_rows].groupby("label")["path"].agg(list)
    pictures: dict[str, list[View]] = {label: [] for label in classes.index}
    for label, has_mean, mean in zip(classes.index, classes["mean_red"].notna(), exploration.means, strict=True):
        if has_mean and (picture := thumbnails.encode_pixels(mean)):
            pictures[label].append({"kind": "mean", "picture": picture, "path": ""})
    chosen = [
        [(label, *each) for each in _choose_examples(row, with_picture.get(label, []), per_class)]
        for label, row in classes.iterrows()
    ]
    # One picture of each class in turn, so that a spent budget affects all classes alike.
    for label, kind, path in filter(None, chain.from_iterable(zip_longest(*chosen))):
        if picture := thumbnails.encode(path):
            pictures[label].append({"kind": kind, "picture": picture, "path": path})
    return [{"label": label, "pictures": shown} for label, shown in pictures.items() if shown]


def _choose_examples(row: pd.Series, paths: list[str], n_examples: int) -> list[tuple[str, str]]:
    """Choose images of a class, with captions: the typical ones, and others evenly spread."""
    most, least = row["most_typical"], row["least_typical"]
    others = [path for path in paths if path not in (most, least)]
    places = np.linspace(0, len(others) - 1, min(n_examples, len(others))).round().astype(int)
    return [("most typical", most), ("least typical", least), *(("", others[place]) for place in places)]


def describe_colours(classes: pd.DataFrame) -> list[View]:
    """Read the palettes of classes.

    >>> describe_colours(pd.DataFrame({"palette": ["#f0f0f0 0.712, #b03020 0.103"]}, index=["apple"]))
    [{'label': 'apple', 'colours': [('#f0f0f0', 0.712), ('#b03020', 0.103)]}]
    """
    rows = []
    for label, palette in classes["palette"].items():
        found = re.findall(r"(#[0-9a-fA-F]{6}) ([0-9.]+)", str(palette))
        if found:
            rows.append({"label": label, "colours": [(colour, float(share)) for colour, share in found]})
    return rows


def describe_differences(exploration: Exploration) -> View | None:
    """Describe how much images of one class differ."""
    classes = exploration.classes.dropna(subset=["mean_squared_difference"])
    if classes.empty:
        return None
    names = ["mean_squared_difference", "standard_error", "pair_q05", "pair_q50", "pair_q95"]
    rows = [{"label": label, **{name: classes.at[label, name] for name in names}} for label in classes.index]
    scale, largest = _SCALES[exploration.summary.get("scale", "signed")]
    by_size = classes["mean_squared_difference"].sort_values()
    return {
        "rows": rows,
        "scale": scale,
        "largest": largest,
        "input_px": exploration.summary.get("input_px"),
        "most": (by_size.index[-1], by_size.iloc[-1]),
        "least": (by_size.index[0], by_size.iloc[0]),
    }


def describe_duplicates(exploration: Exploration, thumbnails: Thumbnails) -> list[View]:
    """Describe exact and near duplicates, with a few groups of each."""
    kinds = {"duplicate_group": "duplicates", "near_duplicate_group": "near_duplicates"}
    return [
        exploration.summary[key]
        | {"kind": key, "groups": _choose_groups(exploration.images, column, thumbnails)}
        | {"bits": exploration.summary.get("near_duplicate_bits")}
        for column, key in kinds.items()
        if key in exploration.summary
    ]


def _choose_groups(images: pd.DataFrame, column: str, thumbnails: Thumbnails) -> list[View]:
    """Choose the groups to show: those across classes first, large ones before small ones."""
    members = images.loc[images[column].notna(), ["path", "label", column]]
    sizes = members.groupby(column).agg(n_labels=("label", "nunique"), n_images=("path", "size"))
    chosen = sizes.sort_values(["n_labels", "n_images"], ascending=False, kind="stable").head(_MAX_GROUPS)
    groups = []
    for number, row in chosen.iterrows():
        group = members[members[column] == number]
        shown = sorted(group["path"], key=lambda path: path not in thumbnails.paths)[:_MAX_GROUP_PICTURES]
        groups.append(
            {
                "n_images": int(row["n_images"]),
                "labels": sorted(group["label"].unique()),
                "pictures": [{"path": path, "picture": thumbnails.encode(path)} for path in shown],
            }
        )
    return groups


def describe_issues(issues: pd.DataFrame, thumbnails: Thumbnails) -> View:
    """Describe the photographs to check: some of each kind, with the image that each conflicts with, and the list."""
    kinds = []
    for kind, meaning in KINDS.items():
        found = issues[issues["kind"] == kind]
        shown = found.head(_MAX_ISSUES).to_dict("records")
        for issue in shown:
            issue["pictures"] = [
                {"path": path, "picture": thumbnails.encode(path)} for path in (issue["path"], issue["other"]) if path
            ]
        if shown:
            kinds.append({"name": kind.replace("_", " "), "meaning": meaning, "n_images": len(found), "rows": shown})
    csv = format_csv(issues.head(_MAX_LISTED_ISSUES)).encode()
    return {
        "kinds": kinds,
        "n_images": issues["path"].nunique(),
        "n_listed": min(len(issues), _MAX_LISTED_ISSUES),
        "csv": base64.b64encode(csv).decode("ascii"),
        "file": ISSUES_CSV,
    }


def describe_predictions(predictions: pd.DataFrame, thumbnails: Thumbnails) -> View:
    """Describe predicted labels, with the images of each label that were most difficult to label."""
    usable = predictions[predictions["status"] == "ok"]
    rows = []
    for label, found in usable.sort_values("probability").groupby("label"):
        shown = found.head(_MAX_ISSUES)[["path", "probability"]].to_dict("records")
        rows.append(
            {
                "label": label,
                "n_images": len(found),
                "probability": found["probability"].mean(),
                "pictures": [each | {"picture": thumbnails.encode(each["path"])} for each in shown],
            }
        )
    # What is unlike everything known comes first.
    rows.sort(key=lambda row: (row["label"] != UNKNOWN_LABEL, row["label"]))
    return {"rows": rows, "n_images": len(predictions), "n_failed": len(predictions) - len(usable)}


def describe_quality(quality: Mapping[str, Any]) -> View:
    """Describe how well the features separate the classes."""
    judged = quality.get("grouped") or quality
    silhouettes, neighbors = judged["silhouette"], judged["neighbors"]
    labels = sorted({*silhouettes["by_class"], *neighbors["by_class"]})
    return {
        **describe_agreement(quality),
        "n_images": quality["n_images"],
        "n_images_with_features": quality["n_images_with_features"],
        "metric": quality["metric"],
        "silhouette": silhouettes["mean"],
        "rows": [
            {
                "label": label,
                "silhouette": silhouettes["by_class"].get(label),
                "agreement": neighbors["by_class"].get(label),
            }
            for label in labels
        ],
        "confusions": _list_confusions(neighbors["confusion"]),
        "n_components": [
            (float(share), n) for share, n in quality.get("explained_variance", {}).get("n_components", {}).items()
        ],
    }


def describe_agreement(quality: Mapping[str, Any]) -> View:
    """Describe how often neighbours have the class of an image, between groups if they are known."""
    grouped = quality.get("grouped")
    neighbors = (grouped or quality)["neighbors"]
    return {
        "k": neighbors["k"],
        "agreement": neighbors["agreement"],
        "agreement_in_groups": quality["neighbors"]["agreement"],
        "n_groups": grouped and grouped["n_groups"],
        "classes_of_one_group": grouped["classes_of_one_group"] if grouped else [],
        "series": quality.get("series"),
    }


def _list_confusions(confusion: Mapping[str, Any]) -> list[View]:
    """List the pairs of classes that are confused most often."""
    share = np.array(confusion["share"], float)
    if not share.size:
        return []
    np.fill_diagonal(share, 0)
    places = np.argsort(-np.nan_to_num(share), axis=None, kind="stable")[:_MAX_CONFUSIONS]
    pairs = [divmod(int(place), share.shape[1]) for place in places]
    labels = confusion["labels"]
    return [{"label": labels[i], "other": labels[j], "share": share[i, j]} for i, j in pairs if share[i, j] > 0]


def describe_failures(failures: pd.DataFrame) -> View | None:
    """Describe the failed images, by reason."""
    if failures.empty:
        return None
    reasons = [
        {"status": status, "meaning": _MEANINGS.get(str(status), ""), "n_images": int(n)}
        for status, n in failures["status"].value_counts().items()
    ]
    ordered = failures.assign(order=failures["status"].map({each["status"]: n for n, each in enumerate(reasons)}))
    rows = ordered.sort_values("order", kind="stable").head(_MAX_FAILURES)
    return {
        "n_images": len(failures),
        # A run has a table of failures; an exploration lists them among its images.
        "file": FAILURES if "attempts" in failures else f"{EXPLORED_IMAGES}.csv",
        "reasons": reasons,
        "rows": [
            _map_texts(hide_secrets, row) for row in rows[["path", "label", "status", "error"]].to_dict("records")
        ],
    }


def describe_performance(manifest: Mapping[str, Any], *, n_images: int) -> View | None:
    """Describe the seconds of the stages, and their images per second.

    After an interruption, the stages that compute features count only the images of the last attempt.
    """
    seconds, n_computed = manifest.get("seconds", {}), manifest.get("n_computed", n_images)
    of_all = dict.fromkeys(("list", "explore", "reduce", "write", "check"), n_images)
    stages, worker_stages = (
        [
            {"name": names.get(key, key), "seconds": value, "rate": images.get(key, n_computed) / max(value, 1e-3)}
            for key, value in sorted(found.items(), key=lambda item: [*names, item[0]].index(item[0]))
            if isinstance(value, int | float)
        ]
        for names, found, images in ((_STAGES, seconds, of_all), (_WORKER_STAGES, seconds.get("worker", {}), {}))
    )
    if not stages:
        return None
    return {"stages": stages, "worker_stages": worker_stages, "cost": list_facts(manifest.get("cost"))}


def describe_protection(
    config: Config, manifest: Mapping[str, Any] | None, exploration: Exploration | None
) -> View | None:
    """Describe where the data are, and the metadata in the files."""
    summary: Mapping[str, Any] = manifest or (exploration.summary if exploration else {})
    metadata = exploration.summary.get("metadata") if exploration else None
    if "regions" not in summary and metadata is None:
        return None
    n_images = len(exploration.images) if exploration else 0
    record = summary.get("processing", {})
    return {
        "input": show_place(config.input.url),
        "output": show_place(config.output.url),
        "record": _list_record(summary, record),
        "unstated": [meaning for key, meaning in _STATED.items() if key in record and not record[key]],
        "metadata": [(what, metadata.get(key, 0)) for key, what in _METADATA.items()] if metadata else [],
        "n_images": n_images,
    }


def _list_record(summary: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the record of processing in words."""
    days = record.get("retention_days")
    rows = {
        "What": record and f"{format_count(summary['n_images'])} {record['data']}",
        "For whom": record.get("controller"),
        "What for": record.get("purpose"),
        "When": format_time(summary["finished"]) if "finished" in summary else None,
        "With": f"fruitdask {summary['fruitdask']}" if "fruitdask" in summary else None,
        "Kept until": days and f"{_format_day(record['keep_until'])} ({days} day{'' if days == 1 else 's'})",
        **{_PLACES.get(place, place): _name_region(region) for place, region in summary.get("regions", {}).items()},
        "Results at rest": f"encrypted ({record['at_rest']})" if record.get("at_rest") else None,
        "Between computers": _IN_TRANSIT.get(record.get("in_transit", "")),
        "Metadata of the files": record.get("metadata"),
        "Erased since": "; ".join(
            f"{format_count(erased['n_images'])} images, {format_time(erased['at'])}"
            for erased in summary.get("erasures", [])
        ),
    }
    return [(name, str(text)) for name, text in rows.items() if text]


def _format_day(value: str) -> str:
    """Format a date given in ISO format."""
    day = date.fromisoformat(value)
    return f"{day.day} {day:%B %Y}"


def _name_region(region: str) -> str:
    """Return the location of a region, if known."""
    known = {LOCAL: "the computer on which fruitdask ran", UNKNOWN: "not known to fruitdask"}
    place = EU_REGIONS.get(region)
    return known.get(region) or (f"{region} ({place})" if place else region)


def describe_reproduction(config: Config, manifest: Mapping[str, Any] | None, exploration: Exploration | None) -> View:
    """Describe how to reproduce the run."""
    tree = (manifest or {}).get("config") or config.model_dump(mode="json", fallback=str)
    # Reproducing the run must not delete these results.
    tree = {name: _drop(section, "storage_options", "overwrite", "exclude") for name, section in tree.items()}
    summary: Mapping[str, Any] = manifest or (exploration.summary if exploration else {})
    versions = {"fruitdask": summary["fruitdask"]} if "fruitdask" in summary else {}
    return {
        "command": f"fruitdask {'run' if manifest else 'explore'} config.yaml",
        "config": yaml.safe_dump(_map_texts(show_place, tree), sort_keys=False, allow_unicode=True, width=88),
        "versions": versions | (manifest or {}).get("versions", {}),
        "fingerprint": list_facts(summary.get("fingerprint")),
        "model": list_facts((manifest or {}).get("model")),
    }


def _drop(section: Any, *keys: str) -> Any:
    """Drop keys of a section: storage options may hold secrets."""
    if not isinstance(section, Mapping):
        return section
    return {key: value for key, value in section.items() if key not in keys}


def _map_texts(change: Callable[[str], str], tree: Any) -> Any:
    """Change every text of nested mappings and lists."""
    if isinstance(tree, Mapping):
        return {key: _map_texts(change, child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map_texts(change, child) for child in tree]
    return change(tree) if isinstance(tree, str) else tree


def show_place(text: str) -> str:
    """Format a path or URL for a page that people share: without secrets and the name of the home folder."""
    home = str(Path.home())
    # For a folder in an archive, the archive has the path.
    chain, separator, place = hide_secrets(text).rpartition("::")
    shown = "~" + place[len(home) :] if len(home) > 1 and f"{place}/".startswith(f"{home}/") else place
    return chain + separator + shown


def list_facts(value: Any) -> list[tuple[str, str]]:
    """Flatten nested values into names and texts.

    >>> list_facts({"input": {"region": "eu-central-1"}, "n_workers": 2})
    [('input region', 'eu-central-1'), ('n workers', '2')]
    """
    return [(name, text) for name, text in _walk_facts(value, ())]


def _walk_facts(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Walk through nested values, depth first."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _walk_facts(child, (*keys, str(key)))
    elif isinstance(value, list | tuple):
        yield " ".join(keys).replace("_", " "), ", ".join(map(str, value))
    elif value is not None:
        yield " ".join(keys).replace("_", " "), str(_map_texts(show_place, value))


def choose_title(config: Config) -> str:
    """Choose the title of the page."""
    if config.report.title:
        return config.report.title
    url = str(show_place(config.input.url))
    path = urlsplit(url).path if "://" in url else url
    name = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return name or urlsplit(url).netloc or "Images"

"""One row per class: its images, its colours, how much they differ, and how well the features separate it."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fruitdask.report.sections.texts import View
from fruitdask.report.tables import Counts
from fruitdask.store import EXPLORED_CLASSES
from fruitdask.store.exploration import Exploration

#: Rows of the table: about 2 KB each.
_MAX_CLASSES = 500
_SCALES = {
    "signed": ("−1 (black) to 1 (white)", 4.0),
    "unit": ("0 (black) to 1 (white)", 1.0),
    "bytes": ("0 (black) to 255 (white)", 65_025.0),
}
_MEDIANS = {"bytes_median": "bytes", "width_px_median": "width_px", "height_px_median": "height_px"}
_PAIRS = ("mean_squared_difference", "standard_error", "pair_q05", "pair_q50", "pair_q95")


def describe_classes(counts: Counts, exploration: Exploration | None, quality: Mapping[str, Any] | None) -> View | None:
    """Describe the classes in alphabetical order, the largest ones if there are very many."""
    n_images = {label: each["ok"] + each["failed"] for label, each in counts.by_class().items()}
    if not n_images:
        return None
    labels = sorted(sorted(n_images, key=lambda label: -n_images[label])[:_MAX_CLASSES])
    rows = [_count_row(label, n_images[label], counts, max(n_images.values())) for label in labels]
    if exploration is not None:
        _add_findings(rows, exploration.classes)
    if quality is not None:
        _add_quality(rows, quality)
    return {
        "rows": rows,
        "n_classes": len(n_images),
        "file": f"{EXPLORED_CLASSES}.csv" if exploration is not None else None,
        "has_failures": counts.n_failed > 0,
        "has_sizes": exploration is not None,
        "has_quality": quality is not None,
        "differences": None if exploration is None else _describe_differences(exploration),
    }


def _count_row(label: str, n_images: int, counts: Counts, largest: int) -> View:
    """Start the row of a class with its counts."""
    return {
        "label": label,
        "n_images": n_images,
        "n_failed": counts.failed_by_class[label],
        "share": n_images / largest,
        "colours": [],
    }


def _add_findings(rows: list[View], classes: pd.DataFrame) -> None:
    """Add the findings of an exploration: none for classes added since, and few for a class of one image."""
    limit = np.nanmax([*classes["pair_q95"], *classes["mean_squared_difference"], 1e-9])
    for row in rows:
        found = classes.loc[row["label"]].to_dict() if row["label"] in classes.index else {}
        values = {name: value if value == value else None for name, value in found.items()}
        row |= {name: values.get(column) for column, name in _MEDIANS.items()}
        row |= {name: values.get(name) for name in _PAIRS}
        row["colours"] = parse_palette(str(values.get("palette")))
        row["range"] = _place_range(row, limit)


def _place_range(row: View, limit: float) -> tuple[float, float, float] | None:
    """Place the range of differences on a bar that ends at `limit`: its start, its length, and the mean, 0 to 1."""
    mean, low, high = (row[name] for name in ("mean_squared_difference", "pair_q05", "pair_q95"))
    if mean is None:
        return None
    # A class of few images has a mean, but no quantiles.
    low, high = (mean if value is None else value for value in (low, high))
    return low / limit, (high - low) / limit, mean / limit


def _add_quality(rows: list[View], quality: Mapping[str, Any]) -> None:
    """Add how well the features separate a class, between groups if they are known."""
    judged = quality.get("grouped") or quality
    for row in rows:
        row["agreement"] = judged["neighbors"]["by_class"].get(row["label"])
        row["silhouette"] = judged["silhouette"]["by_class"].get(row["label"])


def parse_palette(palette: str) -> list[tuple[str, float]]:
    """Parse the most frequent colours of a class, each with its share of the pixels.

    >>> parse_palette("#f0f0f0 0.712, #b03020 0.103")
    [('#f0f0f0', 0.712), ('#b03020', 0.103)]
    """
    found = re.findall(r"(#[0-9a-fA-F]{6}) ([0-9.]+)", palette)
    return [(colour, float(share)) for colour, share in found]


def _describe_differences(exploration: Exploration) -> View | None:
    """Describe the scale of differences, and the classes with the largest and the smallest."""
    values = exploration.classes["mean_squared_difference"].dropna().sort_values()
    if values.empty:
        return None
    scale, largest = _SCALES[exploration.summary.get("scale", "signed")]
    return {
        "scale": scale,
        "largest": largest,
        "compared_px": exploration.summary.get("compared_px") or exploration.summary.get("input_px"),
        "is_reduced": "compared_px" in exploration.summary,
        "most": (values.index[-1], values.iloc[-1]),
        "least": (values.index[0], values.iloc[0]),
    }

"""Pictures of each class."""

from itertools import chain, zip_longest

import numpy as np
import pandas as pd

from fruitdask.report.sections.texts import View
from fruitdask.report.thumbnails import Thumbnails
from fruitdask.store.exploration import Exploration

#: Pictures of examples in all: about 1 KB each.
_MAX_EXAMPLES = 1_200


def count_examples(n_classes: int, per_class: int) -> int:
    """Count the examples of a class in addition to its mean, the most and the least typical image, so that all fit."""
    return min(per_class, max(0, _MAX_EXAMPLES // max(1, n_classes) - 3))


def describe_examples(exploration: Exploration, thumbnails: Thumbnails, *, per_class: int) -> View | None:
    """Choose pictures of each class: its mean image, the most and the least typical image, and some more."""
    classes, per_class = exploration.classes, count_examples(len(exploration.classes), per_class)
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
    blocks = [
        {
            "label": label,
            "pictures": shown,
            "n_shown": len({each["path"] for each in shown if each["path"]}),
            "n_images": n_images,
        }
        for (label, shown), n_images in zip(pictures.items(), classes["n_images"].tolist(), strict=True)
        if shown
    ]
    return {"blocks": blocks, "n_without": len(classes) - len(blocks)} if blocks else None


def _choose_examples(row: pd.Series, paths: list[str], n_examples: int) -> list[tuple[str, str]]:
    """Choose images of a class, with captions: the typical ones, and others evenly spread."""
    most, least = row["most_typical"], row["least_typical"]
    others = [path for path in paths if path not in (most, least)]
    places = np.linspace(0, len(others) - 1, min(n_examples, len(others))).round().astype(int)
    return [("most typical", most), ("least typical", least), *(("", others[place]) for place in places)]

"""The files: duplicates among them, and those that could not be used."""

import pandas as pd

from fruitdask.core.storage import hide_secrets
from fruitdask.report.sections.texts import View, embed_csv, map_texts
from fruitdask.report.thumbnails import Thumbnails
from fruitdask.store import EXPLORED_IMAGES, FAILURES
from fruitdask.store.exploration import Exploration

#: Most groups of duplicates shown with pictures, further groups that a reader can unfold, and pictures per group.
_MAX_PICTURED, MAX_GROUPS, _MAX_GROUP_PICTURES = 12, 200, 12
#: Rows of the list of all groups that the page carries: about 100 bytes each.
MAX_LISTED = 5_000
_MAX_FAILURES = 50
_MEANINGS = {
    "unreadable": "The file is not an image that can be decoded: it is damaged, cut short, or something else under an "
    "image's name.",
    "too_large": "The image has more pixels than featurize.max_pixels allows, or a side of more than 65,535.",
    "missing": "The file is not in the input, or no longer: it was removed, moved or renamed.",
    "unreachable": "The storage did not deliver the file, even after several attempts.",
    "not_finite": "The network returned NaN or infinity for it.",
    "crashed": "Each process that worked on it died: it needs too much memory, or crashes a decoder.",
}


def describe_duplicates(exploration: Exploration, thumbnails: Thumbnails) -> list[View]:
    """Describe exact and near duplicates, with their groups."""
    kinds = {"duplicate_group": "duplicates", "near_duplicate_group": "near_duplicates"}
    return [
        exploration.summary[key]
        | {"kind": key, "bits": exploration.summary.get("near_duplicate_bits"), "column": column}
        | _describe_groups(exploration.images, column, thumbnails, n_groups=exploration.summary[key]["n_groups"])
        for column, key in kinds.items()
        if key in exploration.summary
    ]


def _describe_groups(images: pd.DataFrame, column: str, thumbnails: Thumbnails, *, n_groups: int) -> View:
    """Describe the groups, those across classes first and large ones before small ones, and list their images."""
    members = images.loc[images[column].notna(), [column, "path", "label"]]
    sizes = members.groupby(column).agg(n_labels=("label", "nunique"), n_images=("path", "size"))
    order = sizes.sort_values(["n_labels", "n_images"], ascending=False, kind="stable").index
    rank = members[column].map(dict(zip(order, range(len(order)), strict=True)))
    members = members.iloc[rank.to_numpy(int).argsort(kind="stable")]
    groups = [group for _, group in members.groupby(column, sort=False)]
    shown = [_choose_members(group, thumbnails) for group in groups[:MAX_GROUPS]]
    return {
        "groups": shown[:_MAX_PICTURED],
        "more_groups": shown[_MAX_PICTURED:],
        "n_unshown": n_groups - len(shown),
        "csv": embed_csv(members.head(MAX_LISTED)),
        "n_listed": min(len(members), MAX_LISTED),
        "file": f"{EXPLORED_IMAGES}.csv",
    }


def _choose_members(group: pd.DataFrame, thumbnails: Thumbnails) -> View:
    """Choose the images of a group to show, one of each class in turn, those with thumbnails first."""
    counts = group["label"].value_counts().sort_index()
    by_picture = group.assign(lacks=~group["path"].isin(thumbnails.paths)).sort_values("lacks", kind="stable")
    turn = by_picture.groupby("label").cumcount()
    chosen = by_picture.iloc[turn.to_numpy().argsort(kind="stable")[:_MAX_GROUP_PICTURES]]
    pictures = [
        {"path": path, "label": label, "picture": thumbnails.encode(path)}
        for path, label in zip(chosen["path"], chosen["label"], strict=True)
    ]
    return {"n_images": len(group), "labels": counts.to_dict(), "pictures": pictures}


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
        "rows": [map_texts(hide_secrets, row) for row in rows[["path", "label", "status", "error"]].to_dict("records")],
    }

"""Photographs to check, and labels that a classifier predicted."""

import pandas as pd

from fruitdask.analysis.classifier import UNKNOWN_LABEL
from fruitdask.analysis.issues import KINDS
from fruitdask.report.sections.texts import View, embed_csv
from fruitdask.report.thumbnails import Thumbnails
from fruitdask.store import ISSUES_CSV

#: Issues of each kind with pictures, and issues in the list that the page carries: about 100 bytes each.
_MAX_ISSUES, _MAX_LISTED_ISSUES = 12, 2_000


def count_pictured(kinds: pd.Series) -> int:
    """Count the pictures of the issues that are shown of each kind: of the image, and of the one it conflicts with."""
    return int(2 * kinds.value_counts().clip(upper=_MAX_ISSUES).sum())


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
    return {
        "kinds": kinds,
        "n_images": issues["path"].nunique(),
        "n_issues": len(issues),
        "n_listed": min(len(issues), _MAX_LISTED_ISSUES),
        "csv": embed_csv(issues.head(_MAX_LISTED_ISSUES)),
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
    # Images that are unlike all training images come first.
    rows.sort(key=lambda row: (row["label"] != UNKNOWN_LABEL, row["label"]))
    return {"rows": rows, "n_images": len(predictions), "n_failed": len(predictions) - len(usable)}

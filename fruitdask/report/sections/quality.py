"""How well the features separate the classes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fruitdask.report.sections.texts import View

_MAX_CONFUSIONS = 10


def describe_quality(quality: Mapping[str, Any]) -> View:
    """Describe how well the features separate the classes."""
    judged = quality.get("grouped") or quality
    pairs = _list_confusions(judged["neighbors"]["confusion"])
    return {
        **describe_agreement(quality),
        "n_classes": len(judged["neighbors"]["by_class"]),
        "n_images": quality["n_images"],
        "n_images_with_features": quality["n_images_with_features"],
        "metric": quality["metric"],
        "silhouette": judged["silhouette"]["mean"],
        "confusions": pairs[:_MAX_CONFUSIONS],
        "n_confusions": len(pairs),
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
        "chance": neighbors.get("chance"),
        "skill": _measure_skill(neighbors),
        "agreement_in_groups": quality["neighbors"]["agreement"],
        "n_groups": grouped and grouped["n_groups"],
        "n_groups_across_classes": grouped and grouped.get("n_groups_across_classes"),
        "classes_of_one_group": grouped["classes_of_one_group"] if grouped else [],
        "series": quality.get("series"),
    }


def _measure_skill(neighbors: Mapping[str, Any]) -> float | None:
    """Return how far the agreement of neighbours is from chance (0) to perfect (1); None if chance is not known."""
    agreement, chance = neighbors["agreement"], neighbors.get("chance")
    return None if agreement is None or chance is None else (agreement - chance) / max(1 - chance, 1e-9)


def _list_confusions(confusion: Mapping[str, Any]) -> list[View]:
    """List the pairs of classes that are confused, the most frequent first."""
    share = np.array(confusion["share"], float)
    if not share.size:
        return []
    np.fill_diagonal(share, 0)
    places = np.argsort(-np.nan_to_num(share), axis=None, kind="stable")[: int((share > 0).sum())]
    pairs = [divmod(int(place), share.shape[1]) for place in places]
    labels = confusion["labels"]
    return [{"label": labels[i], "other": labels[j], "share": share[i, j]} for i, j in pairs]

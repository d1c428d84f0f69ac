"""Evaluation: how well features separate classes, also between groups of images of one object."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.analysis.neighbors import number_contents, scale_to_one
from fruitdask.errors import ReduceError

#: Fractions of the variance for which to report the number of components.
_FRACTIONS = (0.8, 0.9, 0.95, 0.99)
#: Classes in a table of confusions: a table of all pairs of 10,000 classes would take gigabytes.
_MAX_CONFUSED = 300
#: A series is a folder's files that differ in one number: at least this many on average ...
_MIN_SERIES = 10
#: ... of which at least this fraction have their nearest neighbour within a tenth of the series.
_SERIES_FRACTION = 0.5
#: Patterns that match what comes before the last number of a file name, and before the last but one.
_SERIES_PATTERNS = (r"(.*?)\d*[^\d/]*$", r"(.*?)\d*[^\d/]*\d*[^\d/]*$")


def summarize_quality(
    features: npt.NDArray[np.floating[Any]],
    labels: Sequence[str] | npt.NDArray[Any],
    *,
    n_neighbors: int,
    metric: str,
    groups: Sequence[str] | npt.NDArray[Any] | None = None,
) -> dict[str, Any]:
    """
    Summarize how well features separate classes.

    Parameters
    ----------
    features : numpy.ndarray
        Features of shape (n, d) without NaN.
    labels : Sequence[str] or numpy.ndarray
        The class of each row.
    n_neighbors : int
        Nearest neighbours of each image to compare, at least 1.
    metric : str
        ``euclidean``, ``cosine`` or another metric of scikit-learn.
    groups : Sequence[str] or numpy.ndarray, optional
        What object each row shows; an empty text stands for an object of its own. Images of one object look alike
        whatever the network, so with groups all figures are computed again across groups.

    Returns
    -------
    dict[str, Any]
        Ready for JSON, classes sorted:

        ``silhouette``: ``mean`` over the images and ``by_class``, each from -1 to 1; 0 for a class of one image, and
        None with fewer than two classes or if no class has two images.

        ``neighbors``: ``k``, the number of neighbours, fewer than ``n_neighbors`` if there are fewer other images;
        ``agreement``, the mean fraction (0 to 1) of an image's neighbours that share its class, also ``by_class``, and
        ``chance``, the agreement of random neighbours, which is high where one class is large; a copy, which has the
        same features, is no neighbour, because it would always agree;
        ``confusion``, for each of its ``labels`` a row of ``share``, the fractions of its images' neighbours in each
        class, which add up to 1; of more than 300 classes those that are confused most. With fewer than two different
        images the agreements are None and the confusion is empty.

        ``grouped``, with ``groups``: the same two, compared only with images of other groups, ``n_groups``,
        ``n_groups_across_classes``, those with images of several classes, and ``classes_of_one_group``: as there is no
        other group to compare them with, they have no figures (None, and zeros in the confusion) and are left out of
        the means.

    Raises
    ------
    ReduceError
        If the numbers of labels, groups and rows differ.

    Notes
    -----
    Silhouettes (Rousseeuw 1987) equal scikit-learn's ``silhouette_samples``; their mean is its ``silhouette_score``.
    The agreement is the leave-one-out accuracy of a classifier that draws one of the ``k`` neighbours; with ``k`` = 1
    it is that of scikit-learn's ``KNeighborsClassifier`` on images without copies, with groups leaving out one group at
    a time (``LeaveOneGroupOut``). Time grows with n squared times d, memory with n times d.

    Examples
    --------
    >>> features = np.array([[0.0], [1.0], [8.0], [9.0]])
    >>> quality = summarize_quality(features, list("aabb"), n_neighbors=1, metric="euclidean", groups=list("1233"))
    >>> quality["neighbors"]["agreement"], quality["neighbors"]["confusion"]["share"]
    (1.0, [[1.0, 0.0], [0.0, 1.0]])
    >>> quality["grouped"]["neighbors"]["by_class"]
    {'a': 1.0, 'b': None}
    """
    for name, found in (("label", labels), ("group", features if groups is None else groups)):
        if len(features) != len(found):
            raise ReduceError(f"expected one {name} per row of features ({len(features)}), found {len(found)} {name}s")
    classes, codes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    each = np.arange(len(codes))
    measured = _measure(features, codes, each, n_neighbors=n_neighbors, metric=metric)
    quality = _summarize(measured, classes.tolist(), codes, each, np.ones(len(codes), bool))
    if groups is None:
        return quality
    numbers = number_groups(groups)
    measured = _measure(features, codes, numbers, n_neighbors=n_neighbors, metric=metric)
    pairs = pd.DataFrame({"code": codes, "group": numbers}).drop_duplicates()
    of_class = pairs["code"].value_counts().sort_index().to_numpy()
    return quality | {
        "grouped": {
            "n_groups": len(np.unique(numbers)),
            "n_groups_across_classes": int((pairs["group"].value_counts() > 1).sum()),
            "classes_of_one_group": classes[of_class == 1].tolist(),
            **_summarize(measured, classes.tolist(), codes, numbers, of_class[codes] > 1),
        }
    }


def number_groups(groups: Sequence[str] | npt.NDArray[Any] | pd.Series) -> npt.NDArray[np.int64]:
    """Number groups, int64; each empty text is a separate group.

    >>> number_groups(["r0", "", "r0", ""])
    array([0, 1, 0, 2])
    """
    names = pd.Series(groups).astype("category")
    keys = np.where(names == "", len(names.cat.categories) + np.arange(len(names)), names.cat.codes)
    return np.asarray(pd.factorize(keys)[0], np.int64)


def find_series(paths: Sequence[str], nearest: npt.NDArray[np.int64]) -> dict[str, Any] | None:
    """
    Find out whether images come in series of one object: files with consecutive numbers that look most alike.

    Parameters
    ----------
    paths : Sequence[str]
        Paths of n images.
    nearest : numpy.ndarray
        Row of each image's nearest neighbour, shape (n,), int64.

    Returns
    -------
    dict[str, Any] or None
        ``fraction``, the part of the images (0 to 1) whose nearest neighbour is in the same series at a distance of at
        most a tenth of it, and ``pattern``, a regular expression whose group names the series of each path. None if the
        names have no numbers, or say nothing about which images look alike.
    """
    names = pd.Series(paths)
    for pattern in _SERIES_PATTERNS:
        series = names.str.extract(pattern)[0].fillna("")
        if (series != "").all() and len(series) >= _MIN_SERIES * max(1, series.nunique()):
            break
    else:
        return None
    rest = pd.Series([path[len(start) :] for path, start in zip(names, series, strict=True)])
    numbers = rest.str.extract(r"^(\d+)")[0].astype(float)
    ranks = numbers.groupby(series).rank(method="first").to_numpy()
    sizes = series.map(series.value_counts()).to_numpy()
    codes = pd.factorize(series)[0]
    is_close = np.abs(ranks - ranks[nearest]) <= np.maximum(1, sizes / _MIN_SERIES)
    fraction = float((is_close & (codes == codes[nearest])).mean())
    return {"fraction": fraction, "pattern": pattern} if fraction >= _SERIES_FRACTION else None


def explain_variance(ratio: Sequence[float]) -> dict[str, Any]:
    """Find how many principal components explain most of the variance.

    >>> explain_variance([0.5, 0.25, 0.125])["n_components"]
    {'0.8': 3, '0.9': None, '0.95': None, '0.99': None}
    """
    ratios = np.asarray(ratio, np.float64)
    counts = np.searchsorted(np.cumsum(ratios), _FRACTIONS, side="right") + 1
    n_components = {str(part): int(n) if n <= len(ratios) else None for part, n in zip(_FRACTIONS, counts, strict=True)}
    return {"ratio": ratios.tolist(), "n_components": n_components}


@dataclass(frozen=True, eq=False)
class _Measured:
    """Distances of each image to the images of other groups."""

    #: Rows of the nearest ones, shape (n, k), int64, nearest first.
    neighbors: npt.NDArray[np.int64]
    #: Mean distance to those of its own class, shape (n,), float64; NaN if there are none.
    own: npt.NDArray[np.float64]
    #: Mean distance to those of the nearest other class, shape (n,), float64; infinite if there are none.
    other: npt.NDArray[np.float64]


def _measure(
    features: npt.NDArray[np.floating[Any]],
    codes: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    *,
    n_neighbors: int,
    metric: str,
) -> _Measured:
    """Measure the distances to images of other groups, in blocks of rows."""
    from sklearn.metrics import pairwise_distances_chunked

    n_images, contents = len(features), np.unique(number_contents(features), return_inverse=True)[1]
    k = min(n_neighbors, n_images - _count_excluded(groups, contents))
    if n_images == np.bincount(groups).max(initial=0):
        return _Measured(np.empty((n_images, 0), np.int64), np.full(n_images, np.nan), np.full(n_images, np.inf))
    # By class, so that the distances to a class are adjacent columns.
    order = np.argsort(codes, kind="stable")
    codes, groups, contents = codes[order], groups[order], contents[order]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))

    def reduce(distances: npt.NDArray[Any], start: int) -> tuple[npt.NDArray[Any], ...]:
        rows = slice(start, start + len(distances))
        is_same = groups[rows, np.newaxis] == groups
        is_excluded = is_same | (contents[rows, np.newaxis] == contents)
        distances[is_excluded] = np.inf
        nearest = np.argpartition(distances, k - 1)[:, :k]
        by_distance = np.take_along_axis(distances, nearest, axis=1).argsort(axis=1, kind="stable")
        distances[is_excluded] = 0
        sums = np.add.reduceat(distances, starts, axis=1, dtype=np.float64)
        counts = np.add.reduceat(~is_same, starts, axis=1, dtype=np.int64)
        means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        each, own = np.arange(len(means)), codes[rows]
        own_means = means[each, own]
        means[each, own] = np.inf
        return np.take_along_axis(nearest, by_distance, axis=1), own_means, np.nan_to_num(means, nan=np.inf).min(axis=1)

    blocks = pairwise_distances_chunked(scale_to_one(features[order], metric), reduce_func=reduce, metric=metric)
    neighbors, own, other = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    back = np.argsort(order)
    return _Measured(order[neighbors][back], own[back], other[back])


def _count_excluded(groups: npt.NDArray[np.int64], contents: npt.NDArray[np.int64]) -> int:
    """Count the images that must not be neighbours of an image, at most: those of its group, and its copies."""
    both = np.unique(np.stack([groups, contents]), axis=1, return_inverse=True)[1]
    in_group, copies, in_both = (np.bincount(each)[each] for each in (groups, contents, both.ravel()))
    return int((in_group + copies - in_both).max(initial=0))


def _summarize(
    measured: _Measured,
    classes: list[str],
    codes: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    is_judged: npt.NDArray[np.bool_],
) -> dict[str, Any]:
    """Summarize distances over the images that can be judged."""
    neighbors = _summarize_neighbors(measured.neighbors, classes, codes, is_judged)
    chance = None if neighbors["agreement"] is None else _expect_agreement(codes, groups, is_judged)
    return {
        "silhouette": _summarize_silhouettes(measured, classes, codes, is_judged),
        "neighbors": neighbors | {"chance": chance},
    }


def _expect_agreement(
    codes: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], is_judged: npt.NDArray[np.bool_]
) -> float:
    """Return the agreement to expect of neighbours that chance chooses among the images of other groups."""
    table = pd.DataFrame({"code": codes, "group": groups})
    in_class, in_group, in_both = (
        table.groupby(names)["code"].transform("size").to_numpy() for names in ("code", "group", ["code", "group"])
    )
    return float(((in_class - in_both) / (len(codes) - in_group))[is_judged].mean())


def _summarize_silhouettes(
    measured: _Measured, classes: list[str], codes: npt.NDArray[np.int64], is_judged: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """Average silhouettes over all images and over those of each class."""
    if not (1 < len(classes) < len(codes) and is_judged.any() and np.isfinite(measured.other).any()):
        return {"mean": None, "by_class": dict.fromkeys(classes)}
    larger = np.maximum(measured.own, measured.other)
    # By convention 0 for the only image of a class, and if all images are equal.
    known = np.isfinite(larger) & (larger > 0)
    silhouettes = np.divide(measured.other - measured.own, larger, out=np.zeros(len(codes)), where=known)
    return _average(silhouettes, classes, codes, is_judged, "mean")


def _summarize_neighbors(
    neighbors: npt.NDArray[np.int64], classes: list[str], codes: npt.NDArray[np.int64], is_judged: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """Count the classes of the neighbours."""
    k = neighbors.shape[1]
    if k == 0:
        confusion: dict[str, Any] = {"labels": [], "share": []}
        return {"k": 0, "agreement": None, "by_class": dict.fromkeys(classes), "confusion": confusion}
    of_neighbors = codes[neighbors]
    agreement = (of_neighbors == codes[:, np.newaxis]).mean(axis=1)
    confusion = _tabulate_confusion(codes[is_judged], of_neighbors[is_judged], classes)
    return {"k": k, **_average(agreement, classes, codes, is_judged, "agreement"), "confusion": confusion}


def _tabulate_confusion(
    codes: npt.NDArray[np.int64], of_neighbors: npt.NDArray[np.int64], classes: list[str]
) -> dict[str, Any]:
    """Tabulate the classes of the neighbours, of the classes that are confused most."""
    from scipy.sparse import coo_array

    # scikit-learn's confusion_matrix counts the same, but all pairs of classes, and warns of a single class.
    places = codes.repeat(of_neighbors.shape[1]), of_neighbors.ravel()
    counts = coo_array((np.ones(of_neighbors.size), places), shape=(len(classes), len(classes))).tocsr()
    totals = counts.sum(axis=1)
    shown = np.sort(np.argsort(counts.diagonal() - totals, kind="stable")[:_MAX_CONFUSED])
    share = counts[shown][:, shown].toarray() / np.maximum(totals[shown, np.newaxis], 1)
    return {"labels": [classes[code] for code in shown], "share": share.tolist()}


def _average(
    values: npt.NDArray[np.float64],
    classes: list[str],
    codes: npt.NDArray[np.int64],
    is_judged: npt.NDArray[np.bool_],
    name: str,
) -> dict[str, Any]:
    """Average values over the judged images, and over those of each class; None if there are none."""
    counts = np.bincount(codes, weights=is_judged)
    sums = np.bincount(codes, weights=np.where(is_judged, values, 0))
    by_class = [float(total / n) if n else None for total, n in zip(sums, counts, strict=True)]
    mean = float(values[is_judged].mean()) if is_judged.any() else None
    return {name: mean, "by_class": dict(zip(classes, by_class, strict=True))}

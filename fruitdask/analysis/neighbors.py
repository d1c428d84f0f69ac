"""Neighbours: how well features separate classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fruitdask.errors import ReduceError

#: Fractions of the variance for which to report the number of components.
_FRACTIONS = (0.8, 0.9, 0.95, 0.99)


def summarize_quality(
    features: npt.NDArray[np.floating[Any]],
    labels: Sequence[str] | npt.NDArray[Any],
    *,
    n_neighbors: int,
    metric: str,
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

    Returns
    -------
    dict[str, Any]
        Ready for JSON, classes sorted:

        ``silhouette``: ``mean`` over the images and ``by_class``, each from -1 to 1; 0 for a class of one image, and
        None with fewer than two classes or if no class has two images.

        ``neighbors``: ``k``, the number of neighbours, fewer than ``n_neighbors`` if there are fewer other images;
        ``agreement``, the mean fraction (0 to 1) of an image's neighbours that share its class, also ``by_class``;
        ``confusion``, for each of its ``labels`` a row of ``share``, the fractions of its images' neighbours in each
        class, which add up to 1. With fewer than two images the agreements are None and the confusion is empty.

    Raises
    ------
    ReduceError
        If the numbers of labels and rows differ.

    Notes
    -----
    Silhouettes (Rousseeuw 1987) are scikit-learn's ``silhouette_samples``; their mean is its ``silhouette_score``. The
    agreement is the leave-one-out accuracy of a classifier that draws one of the ``k`` neighbours; with ``k`` = 1 it is
    that of scikit-learn's ``KNeighborsClassifier``. Time grows with n squared times d, memory with n times d.

    Examples
    --------
    >>> features = np.array([[0.0], [1.0], [8.0], [9.0]])
    >>> quality = summarize_quality(features, list("aabb"), n_neighbors=1, metric="euclidean")
    >>> quality["neighbors"]["agreement"], quality["neighbors"]["confusion"]["share"]
    (1.0, [[1.0, 0.0], [0.0, 1.0]])
    """
    if len(features) != len(labels):
        raise ReduceError(f"expected one label per row of features ({len(features)}), found {len(labels)} labels")
    classes, codes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    neighbors = find_neighbors(features, n_neighbors=n_neighbors, metric=metric)
    return {
        "silhouette": _summarize_silhouettes(features, classes.tolist(), codes, metric=metric),
        "neighbors": _summarize_neighbors(neighbors, classes.tolist(), codes),
    }


def find_neighbors(features: npt.NDArray[np.floating[Any]], *, n_neighbors: int, metric: str) -> npt.NDArray[np.int64]:
    """
    Find the nearest other images of each image.

    Parameters
    ----------
    features : numpy.ndarray
        Features of shape (n, d) without NaN.
    n_neighbors : int
        How many, at least 1.
    metric : str
        ``euclidean``, ``cosine`` or another metric of scikit-learn.

    Returns
    -------
    numpy.ndarray
        Row numbers of shape (n, k), nearest first, int64; k is ``n_neighbors``, or n - 1 if there are fewer others.

    Notes
    -----
    scikit-learn's ``NearestNeighbors`` by brute force: exact, with distances in chunks. No image is its own neighbour,
    even if it has duplicates. The order of neighbours at the same distance is undefined.
    """
    from sklearn.neighbors import NearestNeighbors

    n_neighbors = min(n_neighbors, len(features) - 1)
    if len(features) < 2:
        return np.empty((len(features), 0), np.int64)
    index = NearestNeighbors(n_neighbors=n_neighbors, metric=metric, algorithm="brute").fit(features)
    # Without an argument, kneighbors excludes each row itself by its number.
    return np.asarray(index.kneighbors(return_distance=False), np.int64)


def explain_variance(ratio: Sequence[float]) -> dict[str, Any]:
    """Find how many principal components explain most of the variance.

    >>> explain_variance([0.5, 0.25, 0.125])["n_components"]
    {'0.8': 3, '0.9': None, '0.95': None, '0.99': None}
    """
    ratios = np.asarray(ratio, np.float64)
    counts = np.searchsorted(np.cumsum(ratios), _FRACTIONS, side="right") + 1
    n_components = {str(part): int(n) if n <= len(ratios) else None for part, n in zip(_FRACTIONS, counts, strict=True)}
    return {"ratio": ratios.tolist(), "n_components": n_components}


def _summarize_silhouettes(
    features: npt.NDArray[np.floating[Any]], classes: list[str], codes: npt.NDArray[np.int64], *, metric: str
) -> dict[str, Any]:
    """Average silhouettes over all images and over those of each class."""
    from sklearn.metrics import silhouette_samples

    if not 1 < len(classes) < len(codes):
        return {"mean": None, "by_class": dict.fromkeys(classes)}
    silhouettes = np.asarray(silhouette_samples(features, codes, metric=metric), np.float64)
    return {"mean": float(silhouettes.mean()), "by_class": _average_by_class(silhouettes, classes, codes)}


def _summarize_neighbors(
    neighbors: npt.NDArray[np.int64], classes: list[str], codes: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Count the classes of the neighbours."""
    k, n_classes = neighbors.shape[1], len(classes)
    if k == 0:
        confusion: dict[str, Any] = {"labels": [], "share": []}
        return {"k": 0, "agreement": None, "by_class": dict.fromkeys(classes), "confusion": confusion}
    of_neighbors = codes[neighbors]
    agreement = (of_neighbors == codes[:, np.newaxis]).mean(axis=1)
    # scikit-learn's confusion_matrix counts the same, but warns of a single class.
    pairs = np.bincount(codes.repeat(k) * n_classes + of_neighbors.ravel(), minlength=n_classes * n_classes)
    counts = pairs.reshape(n_classes, n_classes)
    return {
        "k": k,
        "agreement": float(agreement.mean()),
        "by_class": _average_by_class(agreement, classes, codes),
        "confusion": {"labels": classes, "share": (counts / counts.sum(axis=1, keepdims=True)).tolist()},
    }


def _average_by_class(
    values: npt.NDArray[np.float64], classes: list[str], codes: npt.NDArray[np.int64]
) -> dict[str, float]:
    """Average values over the images of each class."""
    means = np.bincount(codes, weights=values) / np.bincount(codes)
    return dict(zip(classes, means.tolist(), strict=True))

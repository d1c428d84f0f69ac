"""Neighbours: the images whose features are most alike."""

from typing import Any

import numpy as np
import numpy.typing as npt


def number_contents(features: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint64]:
    """Number the rows of features (n, d) by their content: equal rows, which are of copies of one image, are equal.

    >>> first, second, third = number_contents(np.array([[1.0, 0.0], [2.0, 0.0], [1.0, -0.0]]))
    >>> bool(first == third), bool(first == second)
    (True, False)
    """
    # Adding zero makes one of both zeros.
    bits = np.ascontiguousarray(features + features.dtype.type(0)).view(np.uint32)
    weights = np.random.default_rng(0).integers(1, 1 << 63, bits.shape[1], np.uint64, endpoint=True)
    # A sum with random weights modulo 2**64 is a hash, and the same in every process.
    return np.asarray(bits @ weights, np.uint64)


def scale_to_one(features: npt.NDArray[np.floating[Any]], metric: str = "") -> npt.NDArray[np.floating[Any]]:
    """Scale features by a power of two, so that the largest is about 1 and squares are neither 0 nor infinite.

    For cosines, each row has its own: scikit-learn takes those that are a million times smaller than others for zeros.

    >>> scale_to_one(np.array([[3e-30, 6e-30]], np.float32)).max() > 0.5
    np.True_
    """
    exponent = np.frexp(np.abs(features).max(axis=1 if metric == "cosine" else None, keepdims=True, initial=0))[1]
    return np.asarray(np.ldexp(features, -exponent))


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
    index = NearestNeighbors(n_neighbors=n_neighbors, metric=metric, algorithm="brute").fit(
        scale_to_one(features, metric)
    )
    # Without an argument, kneighbors excludes each row itself by its number.
    return np.asarray(index.kneighbors(return_distance=False), np.int64)

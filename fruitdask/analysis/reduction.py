"""Reduction: checks of principal components that do not import dask-ml, and t-SNE."""

from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from fruitdask.analysis.neighbors import scale_to_one
from fruitdask.core.config import Solver
from fruitdask.errors import ReduceError

#: Principal components as input for t-SNE (van der Maaten and Hinton 2008, section 4.2: 30; scikit-learn: 50).
TSNE_COMPONENTS = 50
#: Side of the largest matrix that is decomposed, 134 MB in float64; only pooling: flatten exceeds it.
LARGEST_SIDE = 4096
#: The largest power of two in scores, and the smallest, from which scikit-learn finds the neighbours: it doubles or
#: halves their squares up to a hundred times. Beyond, it lays out all images at one place, or crashes.
_MAX_EXPONENT = 30
#: One image has no variance.
MIN_IMAGES = 2
#: The arrays that principal components consist of, and their dimensions.
COMPONENT_ARRAYS = {
    "mean": ("feature",),
    "components": ("component", "feature"),
    "explained_variance": ("component",),
    "explained_variance_ratio": ("component",),
    "singular_values": ("component",),
}


def check_n_components(n_components: int | float | None, *, n_images: int, n_features: int | None = None) -> None:
    """Refuse an invalid number of components, and more components than images or features."""
    is_fraction = isinstance(n_components, float)
    if n_components is not None and not (0 < n_components < 1 if is_fraction else n_components >= 1):
        raise ReduceError(
            f"expected n_components as an integer from 1, a fraction between 0 and 1, or None, found {n_components!r}"
        )
    if n_images < MIN_IMAGES:
        raise ReduceError(f"expected at least 2 images with features, found {n_images}; add images")
    for n_found, what in ((n_images, "images with features"), (n_features, "features")):
        if n_components is not None and not is_fraction and n_found is not None and n_components > n_found:
            raise ReduceError(
                f"reduce.n_components is {n_components}, but there are only {n_found} {what}; "
                f"set it to at most {min(n_found, n_images)}"
            )


def check_solver(solver: str, *, n_images: int, n_features: int) -> None:
    """Refuse features that are too large for a solver that finds all components."""
    if solver not in get_args(Solver):
        raise ReduceError(f"expected one of the solvers {', '.join(get_args(Solver))}, found {solver!r}")
    if solver != "randomized" and min(n_images, n_features) > LARGEST_SIDE:
        raise ReduceError(
            f"reduce.solver is {solver}, which handles at most {LARGEST_SIDE:,} features or {LARGEST_SIDE:,} images, "
            f"but there are {n_features:,} features of {n_images:,} images; "
            "set model.pooling to avg, or reduce.solver to randomized and reduce.n_components to an integer"
        )


def embed_tsne(
    scores: npt.NDArray[np.floating[Any]], *, perplexity: float = 30.0, seed: int = 0
) -> npt.NDArray[np.float32]:
    """
    Lay out images in the plane so that neighbours stay neighbours.

    Parameters
    ----------
    scores : numpy.ndarray
        Scores on the first principal components, shape (n, k), preferably with k up to 50.
    perplexity : float
        About the number of neighbours of each image; at most a third of the images.
    seed : int
        Seed.

    Returns
    -------
    numpy.ndarray
        Coordinates of shape (n, 2), float32. Distances between distant groups have no meaning.

    Notes
    -----
    scikit-learn's Barnes-Hut t-SNE (van der Maaten 2014), initialized with the first two columns.
    """
    from sklearn.manifold import TSNE

    if len(scores) < MIN_IMAGES:
        return np.zeros((len(scores), 2), np.float32)
    if abs(np.frexp(np.abs(scores).max(initial=0))[1]) > _MAX_EXPONENT:
        scores = scale_to_one(scores)
    points, few = np.asarray(scores, np.float32), max(1.0, (len(scores) - 1) / 3)
    # Copies of one image have no components, without which scikit-learn crashes.
    init = "pca" if points.shape[1] > 1 and np.ptp(points, axis=0).any() else "random"
    tsne = TSNE(n_components=2, perplexity=min(perplexity, few), init=init, random_state=seed)
    embedding: npt.NDArray[np.float32] = tsne.fit_transform(points).astype(np.float32)
    return embedding


def sample_rows(n_rows: int, *, max_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Sample row numbers, ascending, int64; all rows if there are few enough."""
    if n_rows <= max_rows:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(seed).choice(n_rows, max_rows, replace=False))

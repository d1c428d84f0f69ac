"""Reduction: from features to a few numbers per image, by principal components and t-SNE."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt

from fruitdask.errors import NoVarianceError, ReduceError

#: Principal components as input for t-SNE (van der Maaten and Hinton 2008, section 4.2: 30; scikit-learn: 50).
TSNE_COMPONENTS = 50
#: Side of the largest matrix that the exact solver decomposes, 134 MB in float64; only pooling: flatten exceeds it.
LARGEST_SIDE = 4096
#: One image has no variance.
MIN_IMAGES = 2
#: Power iterations of the randomized solver, scikit-learn's number for many components; each reads the features twice.
_POWER_ITERATIONS = 4

#: Mean, variances of the components, total variance of the features, components.
_Decomposition = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float, npt.NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """A fitted principal component analysis."""

    #: Mean of each feature, shape (n_features,), float64.
    mean: npt.NDArray[np.float64]
    #: Unit vectors in rows, shape (n_components, n_features), float64; the largest entry of each is positive.
    components: npt.NDArray[np.float64]
    #: Variance of each component's scores, with n - 1 degrees of freedom, shape (n_components,), float64.
    explained_variance: npt.NDArray[np.float64]
    #: The same as a fraction of the features' total variance.
    explained_variance_ratio: npt.NDArray[np.float64]
    #: Singular values of the centred features, shape (n_components,), float64.
    singular_values: npt.NDArray[np.float64]

    @property
    def n_components(self) -> int:
        """Number of components."""
        return len(self.components)

    def transform(self, features: Any) -> Any:
        """Project NumPy or Dask features, minus their mean, to scores of shape (n, n_components), float64."""
        return (features - self.mean) @ self.components.T

    def truncate(self, n_components: int | float) -> "PrincipalComponents":
        """Keep the first components, or those that explain a fraction of the variance."""
        if isinstance(n_components, float):
            explained = np.cumsum(self.explained_variance_ratio)
            n_components = int(np.searchsorted(explained, n_components, side="right")) + 1
        kept = {field.name: getattr(self, field.name)[:n_components] for field in fields(self) if field.name != "mean"}
        return PrincipalComponents(mean=self.mean, **kept)


def fit_pca(
    features: da.Array, *, n_components: int | float, solver: str = "exact", seed: int = 0
) -> PrincipalComponents:
    """
    Fit principal components.

    Parameters
    ----------
    features : dask.array.Array
        Features of shape (n, n_features) without NaN, with known chunk sizes.
    n_components : int or float
        The number of components, or the fraction (0 to 1) of the variance that they must explain together.
    solver : str
        ``exact``, or ``randomized``, which estimates the first components of very many features.
    seed : int
        Seed of the randomized solver.

    Returns
    -------
    PrincipalComponents
        The fit, which depends on the chunks of ``features`` only by rounding.

    Raises
    ------
    ReduceError
        If there are fewer images or features than components, or too many of both for the exact solver.
    NoVarianceError
        If all images have the same features.

    Notes
    -----
    ``exact`` equals scikit-learn's full solver. Up to 4096 features it reads them once (and the first block twice) and
    decomposes their covariance, like scikit-learn's ``covariance_eigh``: a worker holds blocks and a few matrices of
    n_features x n_features, for any number of images. Eigenvalues have an error of about 1e-16 of the largest: a
    component whose standard deviation is under 1e-7 of the first one's is noise. More features of up to 4096 images are
    decomposed by Dask's SVD, in slabs of columns. ``randomized`` is Dask's compressed SVD (Halko, Martinsson and Tropp
    2011), which reads the features again in each iteration instead of holding them in memory.
    """
    n_images, n_features = features.shape
    largest = min(n_images, n_features)
    wanted = n_components if isinstance(n_components, int) else largest
    check_n_components(wanted, n_images=n_images, n_features=n_features)
    check_solver(solver, n_images=n_images, n_features=n_features)
    # Sums about the first image do not cancel if the mean is far from zero, and are exactly 0 if all images are equal.
    first = features[0].compute().astype(np.float64)
    shifted = features.astype(np.float64) - first
    if solver == "randomized":
        offset, variances, total, components = _decompose_randomly(shifted, wanted, seed)
    elif n_features <= LARGEST_SIDE:
        offset, variances, total, components = _decompose_covariance(shifted, wanted)
    else:
        offset, variances, total, components = _decompose_slabs(shifted, wanted)
    if not total > 0:
        raise NoVarianceError(
            f"all {n_images} images have the same features, so nothing is left to reduce; "
            "check the images and model.weights"
        )
    fitted = PrincipalComponents(
        mean=first + offset,
        components=_fix_signs(components),
        explained_variance=variances,
        explained_variance_ratio=variances / total,
        singular_values=np.sqrt(variances * (n_images - 1)),
    )
    return fitted.truncate(n_components)


def compare_components(
    stored: PrincipalComponents, found: PrincipalComponents, *, tolerance: float = 1e-6
) -> Iterator[str]:
    """Describe how stored principal components differ from those found again from the features.

    Components with equal variances may be rotated among themselves, so they are not compared one by one: with the
    covariance C that ``found`` decomposes, a stored component v of variance s must satisfy C v = s v.
    """
    n_components = stored.n_components
    if n_components > found.n_components or stored.components.shape[1:] != found.components.shape[1:]:
        expected = f"{found.components.shape[1]} features and at most {found.n_components} components"
        yield f"expected {expected}, found the shape {stored.components.shape}"
        return
    for name in ("mean", "explained_variance", "explained_variance_ratio", "singular_values"):
        ours, theirs = getattr(stored, name), getattr(found, name)
        theirs = theirs if name == "mean" else theirs[:n_components]
        # A singular value is the root of a variance, and so is its tolerance.
        relative = np.sqrt(tolerance) if name == "singular_values" else tolerance
        spread = np.sqrt(found.explained_variance[0]) if name == "mean" else 0
        largest = max(np.abs(theirs).max(), spread)
        if ours.shape != theirs.shape:
            yield f"{name} does not match the features: expected the shape {theirs.shape}, found {ours.shape}"
            return
        if not np.abs(ours - theirs).max() <= relative * largest:
            yield f"{name} does not match the features"
    parts = stored.components @ found.components.T
    variances = found.explained_variance
    differences = np.linalg.norm(parts * (variances - stored.explained_variance[:n_components, np.newaxis]), axis=1)
    lengths = np.linalg.norm(parts, axis=1)
    if not (differences.max() <= tolerance * variances[0] and np.abs(lengths - 1).max() <= np.sqrt(tolerance)):
        yield "components do not match the features"


def check_n_components(n_components: int | float, *, n_images: int, n_features: int | None = None) -> None:
    """Refuse more components than images or features."""
    if n_images < MIN_IMAGES:
        raise ReduceError(f"expected at least 2 images with features, found {n_images}; add images")
    for n_found, what in ((n_images, "images with features"), (n_features, "features")):
        if isinstance(n_components, int) and n_found is not None and n_components > n_found:
            raise ReduceError(
                f"reduce.n_components is {n_components}, but there are only {n_found} {what}; "
                f"set it to at most {min(n_found, n_images)}"
            )


def check_solver(solver: str, *, n_images: int, n_features: int) -> None:
    """Refuse features that are too large for the exact solver."""
    if solver == "exact" and min(n_images, n_features) > LARGEST_SIDE:
        raise ReduceError(
            f"reduce.solver is exact, which handles at most {LARGEST_SIDE:,} features or {LARGEST_SIDE:,} images, "
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

    few = max(1.0, (len(scores) - 1) / 3)
    init = "pca" if scores.shape[1] > 1 else "random"
    tsne = TSNE(n_components=2, perplexity=min(perplexity, few), init=init, random_state=seed)
    embedding: npt.NDArray[np.float32] = tsne.fit_transform(np.asarray(scores, np.float32)).astype(np.float32)
    return embedding


def sample_rows(n_rows: int, *, max_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Sample row numbers, ascending, int64; all rows if there are few enough."""
    if n_rows <= max_rows:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(seed).choice(n_rows, max_rows, replace=False))


def _decompose_covariance(shifted: da.Array, n_components: int) -> _Decomposition:
    """Decompose the covariance, summed over blocks in one pass."""
    n_images = len(shifted)
    products, sums = da.compute(shifted.T @ shifted, shifted.sum(axis=0))
    offset = sums / n_images
    covariance = (products - np.outer(sums, offset)) / (n_images - 1)
    variances, vectors = np.linalg.eigh(covariance)
    # eigh sorts ascending; rounding may make zeros slightly negative.
    return offset, variances[::-1][:n_components].clip(0), np.trace(covariance), vectors.T[::-1][:n_components]


def _decompose_slabs(shifted: da.Array, n_components: int) -> _Decomposition:
    """Decompose many features of few images in slabs of columns, each with all images."""
    n_images = len(shifted)
    slabs = shifted.rechunk((n_images, LARGEST_SIDE))
    offset = slabs.mean(axis=0)
    _, singular, components = da.linalg.svd(slabs - offset)
    offset, singular, components = da.compute(offset, singular, components[:n_components])
    variances = singular**2 / (n_images - 1)
    return offset, variances[:n_components], variances.sum(), components


def _decompose_randomly(shifted: da.Array, n_components: int, seed: int) -> _Decomposition:
    """Estimate the first components."""
    offset, total = da.compute(shifted.mean(axis=0), shifted.var(axis=0, ddof=1).sum())
    _, singular, components = da.linalg.svd_compressed(
        shifted - offset, n_components, iterator="QR", n_power_iter=_POWER_ITERATIONS, seed=seed, compute=True
    )
    singular, components = da.compute(singular, components)
    return offset, singular**2 / (len(shifted) - 1), total, components


def _fix_signs(components: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Make the largest entry of each component positive, like scikit-learn since 1.5."""
    largest = np.abs(components).argmax(axis=1)
    signs = np.sign(components[np.arange(len(components)), largest])
    return np.asarray(components * signs[:, np.newaxis])

"""Principal components: dask-ml's estimator, with a solver that reads the features once and in little memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask_ml import decomposition
from sklearn.utils import check_random_state

from fruitdask.analysis import reduction
from fruitdask.errors import NoVarianceError, ReduceError

#: Power iterations of the randomized solver, scikit-learn's number for many components; each reads the features twice.
_POWER_ITERATIONS = 4

#: Mean, variances of the components, total variance of the features, components.
_Decomposition = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float, npt.NDArray[np.float64]]


class PCA(decomposition.PCA):  # type: ignore[misc]
    """
    Principal component analysis of dask-ml with one more solver, ``covariance_eigh``, which is the default.

    It takes NumPy and Dask arrays, and returns the same kind.

    Parameters
    ----------
    n_components : int or float, optional
        The number of components, or the fraction (0 to 1) of the variance that they must explain together; None keeps
        all.
    copy : bool
        Ignored, as in dask-ml.
    whiten : bool
        Whether scores are scaled to unit variance.
    svd_solver : str
        ``covariance_eigh``, ``full``, ``tsqr`` (the same as ``full``) or ``randomized``.
    tol : float
        Ignored, as in dask-ml.
    iterated_power : int
        Power iterations of the randomized solver; each reads the features twice.
    random_state : int or numpy.random.RandomState, optional
        Seed of the randomized solver.

    Attributes
    ----------
    components_ : numpy.ndarray
        Unit vectors in rows, shape (n_components_, n_features_in_), float64; the largest entry of each is positive.
    mean_ : numpy.ndarray
        Mean of each feature, shape (n_features_in_,), float64.
    explained_variance_ : numpy.ndarray
        Variance of each component's scores, with n - 1 degrees of freedom.
    explained_variance_ratio_ : numpy.ndarray
        The same as a fraction of the features' total variance.
    singular_values_ : numpy.ndarray
        Singular values of the centred features.
    noise_variance_ : float
        Mean variance of the components that are left out.
    n_components_, n_features_in_, n_samples_ : int
        Number of components, features and images.

    Notes
    -----
    ``covariance_eigh`` equals scikit-learn's full solver. Up to 4096 features it reads them once (and the first block
    twice) and decomposes their covariance: a worker holds blocks and a few matrices of n_features x n_features, for any
    number of images. Eigenvalues have an error of about 1e-16 of the largest: a component whose standard deviation is
    under 1e-7 of the first one's is noise. More features of up to 4096 images are decomposed in slabs of columns.

    The other solvers call the functions of Dask that dask-ml calls: ``full`` is a QR decomposition of blocks (Benson,
    Gleich and Demmel 2013), for which the features stay in the memory of the workers, ``randomized`` the compressed SVD
    (Halko, Martinsson and Tropp 2011). Unlike in dask-ml, no task gathers all features to read their shape, the
    randomized solver reads them again in each iteration instead of holding them, and its `transform` works.

    Examples
    --------
    >>> features = np.random.default_rng(0).normal(size=(100, 4)) * [9, 3, 1, 1]
    >>> pca = PCA(n_components=0.9).fit(features)
    >>> pca.n_components_, pca.transform(features).shape
    (2, (100, 2))
    """

    # scikit-learn's methods ask for these, but dask-ml's constructor does not take them.
    n_oversamples = 10
    power_iteration_normalizer = "auto"

    def __init__(
        self,
        n_components: int | float | None = None,
        copy: bool = True,
        whiten: bool = False,
        svd_solver: str = "covariance_eigh",
        tol: float = 0.0,
        iterated_power: int = _POWER_ITERATIONS,
        random_state: Any = None,
    ) -> None:
        super().__init__(n_components, copy, whiten, svd_solver, tol, iterated_power, random_state)

    def fit(self, X: Any, y: Any = None) -> "PCA":
        """
        Fit the components.

        Parameters
        ----------
        X : numpy.ndarray or dask.array.Array
            Features of shape (n, n_features) without NaN, with known chunk sizes.
        y : None
            Ignored.

        Returns
        -------
        PCA
            This estimator, fitted. The fit depends on the chunks of ``X`` only by rounding.

        Raises
        ------
        ReduceError
            If there are fewer images or features than components, too many of both for the solver, or NaN.
        NoVarianceError
            If all images have the same features.
        """
        features = _open_rows(X)
        n_images, n_features = features.shape
        reduction.check_n_components(self.n_components, n_images=n_images, n_features=n_features)
        reduction.check_solver(self.svd_solver, n_images=n_images, n_features=n_features)
        # Sums about the first image do not cancel if the mean is far from zero, and are exactly 0 if all are equal.
        first = features[0].compute().astype(np.float64)
        try:
            offset, variances, total, components = self._decompose(features.astype(np.float64) - first)
        except np.linalg.LinAlgError as error:
            raise ReduceError("expected finite features, found NaN or infinity; leave out such images") from error
        if not total > 0:
            raise NoVarianceError(
                f"all {n_images} images have the same features, so nothing is left to reduce; "
                "check the images and model.weights"
            )
        found = {
            "mean": first + offset,
            "components": _fix_signs(components),
            "explained_variance": variances,
            "explained_variance_ratio": variances / total,
            "singular_values": np.sqrt(variances * (n_images - 1)),
        }
        return self._set(_cut(found, self.n_components))

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """
        Fit the components, then project the same features.

        Parameters
        ----------
        X : numpy.ndarray or dask.array.Array
            Features of shape (n, n_features), as for `fit`.
        y : None
            Ignored.

        Returns
        -------
        numpy.ndarray or dask.array.Array
            Scores of shape (n, n_components_), float64.
        """
        return self.fit(X).transform(X)

    def transform(self, X: Any) -> Any:
        """
        Project features, minus their mean, on the components.

        Parameters
        ----------
        X : numpy.ndarray or dask.array.Array
            Features of shape (n, n_features_in_); rows of NaN give NaN.

        Returns
        -------
        numpy.ndarray or dask.array.Array
            Scores of shape (n, n_components_), float64; lazy if ``X`` is.
        """
        return _compute_like(X, super().transform)

    def inverse_transform(self, X: Any) -> Any:
        """
        Find the features that have these scores, as far as the components allow.

        Parameters
        ----------
        X : numpy.ndarray or dask.array.Array
            Scores of shape (n, n_components_).

        Returns
        -------
        numpy.ndarray or dask.array.Array
            Features of shape (n, n_features_in_), float64; lazy if ``X`` is.
        """
        return _compute_like(X, super().inverse_transform)

    def score_samples(self, X: Any) -> Any:
        """
        Compute the log-likelihood of each row under the probabilistic model of Tipping and Bishop (1999).

        Parameters
        ----------
        X : numpy.ndarray or dask.array.Array
            Features of shape (n, n_features_in_).

        Returns
        -------
        numpy.ndarray or dask.array.Array
            Log-likelihoods of shape (n,); lazy if ``X`` is.
        """
        return _compute_like(X, super().score_samples)

    def score(self, X: Any, y: Any = None) -> float:
        """
        Compute the mean log-likelihood, by which scikit-learn compares models.

        Parameters
        ----------
        X : numpy.ndarray or dask.array.Array
            Features of shape (n, n_features_in_).
        y : None
            Ignored.

        Returns
        -------
        float
            The mean of `score_samples`.
        """
        return float(self.score_samples(X).mean())

    def _decompose(self, shifted: da.Array) -> _Decomposition:
        """Decompose features minus those of the first image."""
        n_images, n_features = shifted.shape
        if self.svd_solver == "randomized":
            wanted = self.n_components if _is_count(self.n_components) else min(shifted.shape)
            seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
            return _decompose_randomly(shifted, wanted, self.iterated_power, seed)
        if n_features > reduction.LARGEST_SIDE:
            return _decompose_blocks(shifted.rechunk((n_images, reduction.LARGEST_SIDE)))
        return (_decompose_covariance if self.svd_solver == "covariance_eigh" else _decompose_blocks)(shifted)

    def _set(self, arrays: Mapping[str, npt.NDArray[np.float64]]) -> "PCA":
        """Take the arrays of a fit, and derive the other attributes from them."""
        for name, values in arrays.items():
            setattr(self, f"{name}_", values)
        self.n_components_, self.n_features_in_ = self.components_.shape
        variance = self.explained_variance_[0]
        if not variance > 0:
            raise ValueError(f"the first component has the variance {variance}")
        self.n_samples_ = 1 + round(self.singular_values_[0] ** 2 / variance)
        n_left = min(self.n_samples_, self.n_features_in_) - self.n_components_
        variance_left = variance / self.explained_variance_ratio_[0] - self.explained_variance_.sum()
        self.noise_variance_ = max(float(variance_left), 0.0) / n_left if n_left else 0.0
        return self


def list_arrays(pca: PCA) -> dict[str, npt.NDArray[np.float64]]:
    """List the arrays that a fit is made of."""
    return {name: getattr(pca, f"{name}_") for name in reduction.COMPONENT_ARRAYS}


def restore_pca(arrays: Mapping[str, npt.NDArray[np.float64]], fit: Mapping[str, Any]) -> PCA:
    """Make the estimator again from the arrays of its fit; `fit` may hold its n_components, solver and seed."""
    solver = fit.get("solver", "covariance_eigh")
    return PCA(fit.get("n_components"), svd_solver=solver, random_state=fit.get("seed"))._set(arrays)


def truncate_pca(pca: PCA, n_components: int | float) -> PCA:
    """Keep the first components, or those that explain a fraction of the variance."""
    settings = pca.get_params() | {"n_components": n_components}
    return PCA(**settings)._set(_cut(list_arrays(pca), n_components))


def compare_components(stored: PCA, found: PCA, *, tolerance: float = 1e-6) -> Iterator[str]:
    """Describe how stored principal components differ from those fitted again to the features.

    Components with equal variances may be rotated among themselves, so they are not compared one by one: with the
    covariance C that ``found`` decomposes, a stored component v of variance s must satisfy C v = s v.
    """
    n_components = len(stored.components_)
    if n_components > found.n_components_ or stored.components_.shape[1:] != found.components_.shape[1:]:
        expected = f"{found.n_features_in_} features and at most {found.n_components_} components"
        yield f"expected {expected}, found the shape {stored.components_.shape}"
        return
    for name in ("mean", "explained_variance", "explained_variance_ratio", "singular_values"):
        ours, theirs = (list_arrays(pca)[name] for pca in (stored, found))
        theirs = theirs if name == "mean" else theirs[:n_components]
        # A singular value is the root of a variance, and so is its tolerance.
        relative = np.sqrt(tolerance) if name == "singular_values" else tolerance
        spread = np.sqrt(found.explained_variance_[0]) if name == "mean" else 0
        largest = max(np.abs(theirs).max(), spread)
        if ours.shape != theirs.shape:
            yield f"{name} does not match the features: expected the shape {theirs.shape}, found {ours.shape}"
            return
        if not np.abs(ours - theirs).max() <= relative * largest:
            yield f"{name} does not match the features"
    parts = stored.components_ @ found.components_.T
    variances = found.explained_variance_
    differences = np.linalg.norm(parts * (variances - stored.explained_variance_[:n_components, np.newaxis]), axis=1)
    lengths = np.linalg.norm(parts, axis=1)
    if not (differences.max() <= tolerance * variances[0] and np.abs(lengths - 1).max() <= np.sqrt(tolerance)):
        yield "components do not match the features"


def _open_rows(values: Any) -> Any:
    """Return a Dask array whose chunks are whole rows."""
    if isinstance(values, da.Array):
        return values.rechunk({1: -1})
    return da.from_array(np.asarray(values), chunks=("auto", -1), name=False)


def _compute_like(values: Any, project: Any) -> Any:
    """Project a Dask array lazily; anything else immediately in this process, even if a cluster is connected."""
    if isinstance(values, da.Array):
        return project(values)
    # With scikit-learn's `set_output` the result is no longer a Dask array.
    return da.compute(project(da.from_array(np.asarray(values), chunks=-1, name=False)), scheduler="synchronous")[0]


def _is_count(n_components: int | float | None) -> bool:
    """Whether it is a number of components, not a fraction of the variance."""
    return n_components is not None and not isinstance(n_components, float)


def _cut(
    arrays: Mapping[str, npt.NDArray[np.float64]], n_components: int | float | None
) -> dict[str, npt.NDArray[np.float64]]:
    """Keep the first components, or those that explain a fraction of the variance; None keeps all."""
    if isinstance(n_components, float):
        explained = np.cumsum(arrays["explained_variance_ratio"])
        n_components = int(np.searchsorted(explained, n_components, side="right")) + 1
    return {name: values if name == "mean" else values[:n_components] for name, values in arrays.items()}


def _decompose_covariance(shifted: da.Array) -> _Decomposition:
    """Decompose the covariance, summed over blocks in one pass."""
    n_images, n_features = shifted.shape
    products, sums = da.compute(shifted.T @ shifted, shifted.sum(axis=0))
    offset = sums / n_images
    covariance = (products - np.outer(sums, offset)) / (n_images - 1)
    variances, vectors = np.linalg.eigh(covariance)
    most = min(n_images, n_features)
    # eigh sorts ascending; rounding may make zeros slightly negative.
    return offset, variances[::-1][:most].clip(0), float(np.trace(covariance)), vectors.T[::-1][:most]


def _decompose_blocks(shifted: da.Array) -> _Decomposition:
    """Decompose by QR of each block: blocks of rows with all features, or of columns with all images."""
    mean = shifted.mean(axis=0)
    _, singular, components = da.linalg.svd(shifted - mean)
    offset, singular, components = da.compute(mean, singular, components)
    variances = singular**2 / (len(shifted) - 1)
    return offset, variances, float(variances.sum()), components


def _decompose_randomly(shifted: da.Array, n_components: int, iterated_power: int, seed: int) -> _Decomposition:
    """Estimate the first components."""
    offset, total = da.compute(shifted.mean(axis=0), shifted.var(axis=0, ddof=1).sum())
    _, singular, components = da.linalg.svd_compressed(
        shifted - offset, n_components, iterator="QR", n_power_iter=iterated_power, seed=seed, compute=True
    )
    singular, components = da.compute(singular, components)
    return offset, singular**2 / (len(shifted) - 1), float(total), components


def _fix_signs(components: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Make the largest entry of each component positive, like scikit-learn since 1.5."""
    largest = np.abs(components).argmax(axis=1)
    signs = np.sign(components[np.arange(len(components)), largest])
    return np.asarray(components * signs[:, np.newaxis])

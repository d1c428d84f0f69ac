"""Reduces stored features to a few numbers per image."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import store
from fruitdask.analysis.reduction import COMPONENT_ARRAYS, MIN_IMAGES, TSNE_COMPONENTS, check_n_components, sample_rows
from fruitdask.core.config import QualityConfig, ReduceConfig
from fruitdask.core.storage import Location
from fruitdask.core.version import __version__
from fruitdask.errors import NoVarianceError
from fruitdask.pipeline.results import open_components, open_features
from fruitdask.store.catalog import take_rows

if TYPE_CHECKING:
    import dask.array as da

    from fruitdask.analysis.pca import PCA

#: Features are reduced in blocks of about this size, several chunks each: smaller blocks take half as much time again.
BLOCK_BYTES = 20 * 1024**2
#: Maximum number of rows projected at once.
_PROJECTED_ROWS = 4096
#: Components are fitted again once more than this fraction of the fitted images has changed.
_REFIT_FRACTION = 0.1


@dataclass(frozen=True, eq=False)
class Scores:
    """
    Scores of all images on components, computed for the requested rows only: all of them may not fit into memory.

    All blocks of rows have the same shape, padded at the end, so an image has the same position in its block however
    many images follow, and the matrix product gives it bit for bit the same scores.
    """

    #: Features (image, feature).
    features: "da.Array"
    fitted: "PCA | None"

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.features)

    def __getitem__(self, rows: slice, /) -> npt.NDArray[np.float32]:
        """Compute some rows, shape (n, n_components), float32."""
        import dask.array as da

        features = self.features[rows]
        n_images, n_features = features.shape
        if self.fitted is None:
            return np.empty((n_images, 0), np.float32)
        n_rows = min(_PROJECTED_ROWS, max(1, BLOCK_BYTES // (features.dtype.itemsize * n_features)))
        # da.pad would pad few images with as many tiny chunks as fit into a block.
        padding = da.zeros((-n_images % n_rows, n_features), features.dtype, chunks=-1)
        padded = da.concatenate([features, padding]).rechunk((n_rows, n_features))
        scores: npt.NDArray[np.float32] = self.fitted.transform(padded)[:n_images].astype(np.float32).compute()
        return scores


@dataclass(frozen=True, eq=False)
class Reduction:
    """The reduced features of a run."""

    #: The principal components; None if there are none.
    components: "PCA | None"
    #: NaN for failed images; without components there are no columns.
    scores: "Scores"
    #: Coordinates of t-SNE (image, 2), float32; NaN for images that failed or were not sampled.
    tsne: npt.NDArray[np.float32] | None
    #: How well the features separate the classes; None if not configured.
    quality: dict[str, Any] | None
    #: Number of fitted images, number changed since, and the settings of the fit; JSON.
    fit: dict[str, Any]
    #: Whether the components are those of an earlier run.
    is_kept: bool
    #: Why components are impossible, as a sentence for the user; empty if they are possible.
    problem: str = ""


def choose_components(settings: ReduceConfig, output: Location, fit: dict[str, Any] | None) -> "PCA | None":
    """Return the components of an earlier run if they are to be kept."""
    if (
        fit is None
        or not settings.enabled
        or settings.refit == "always"
        or not fit.items() >= _describe_settings(settings).items()
    ):
        return None
    if settings.refit == "auto" and fit["n_changed"] > _REFIT_FRACTION * fit["n_images"]:
        return None
    return open_components(output, fit)


def reduce_features(
    settings: ReduceConfig,
    quality_settings: QualityConfig,
    output: Location,
    images: pd.DataFrame,
    *,
    kept: "PCA | None",
    fit: dict[str, Any] | None,
    is_applied: bool = False,
) -> Reduction:
    """Fit and apply the reductions to the images with features, and evaluate the features.

    `images` is the catalog. Components of another run (`is_applied`) are kept whatever the images.
    """
    from fruitdask.analysis.pca import truncate_pca
    from fruitdask.analysis.reduction import embed_tsne

    features, is_ok = open_features(output, block_bytes=BLOCK_BYTES)
    rows = np.flatnonzero(is_ok)
    ok = select_blocks(features, is_ok)
    if len(rows) < MIN_IMAGES and not is_applied:
        kept = None
    # Kept components are truncated; t-SNE and quality need more of them.
    needs_fit = kept is None or (not is_applied and (settings.tsne.enabled or quality_settings.enabled))
    found, problem = _find_components(settings, ok) if needs_fit else (kept, "")
    quality = _measure_quality(quality_settings, ok, images, rows, found)
    if found is None:
        return Reduction(None, Scores(features, None), None, quality, {}, is_kept=False, problem=problem)
    fitted = truncate_pca(found, settings.n_components) if kept is None else kept
    tsne = None
    if settings.tsne.enabled:
        sampled = sample_rows(len(rows), max_rows=settings.tsne.max_rows, seed=settings.tsne.seed)
        tsne_scores = truncate_pca(found, TSNE_COMPONENTS).transform(ok[sampled]).compute()
        embedding = embed_tsne(tsne_scores, perplexity=settings.tsne.perplexity, seed=settings.tsne.seed)
        tsne = _spread(embedding, rows[sampled], len(is_ok))
    if kept is None or fit is None:
        fit = {"n_images": len(rows), "n_changed": 0} | _describe_settings(settings)
    return Reduction(fitted, Scores(features, fitted), tsne, quality, fit, is_kept=kept is not None)


def _describe_settings(settings: ReduceConfig) -> dict[str, Any]:
    """Return the settings that a fit depends on."""
    return settings.model_dump(include={"n_components", "solver", "seed"})


def _find_components(settings: ReduceConfig, features: "da.Array") -> "tuple[PCA | None, str]":
    """Fit the components; if that is impossible, return None and the reason."""
    if not settings.enabled:
        return None, ""
    n_images, n_features = features.shape
    if n_images < MIN_IMAGES:
        return None, f"Principal components need at least 2 images with features, found {n_images}: none were computed."
    check_n_components(settings.n_components, n_images=n_images, n_features=n_features)
    try:
        return fit_components(settings, features), ""
    except NoVarianceError as error:
        return None, f"No principal components were computed: {error}."


def select_blocks(features: "da.Array", is_chosen: npt.NDArray[np.bool_]) -> "da.Array":
    """Select rows of features (image, feature) block by block: the numbers of all rows would be part of the graph."""
    import dask.array as da
    from dask.delayed import delayed

    if is_chosen.all():
        return features
    starts, blocks = np.cumsum((0, *features.chunks[0])), list[da.Array]()
    for block, (start, stop) in zip(features.to_delayed().ravel(), pairwise(starts), strict=True):
        left_out = np.flatnonzero(~is_chosen[start:stop])
        if len(left_out) < stop - start:
            kept = delayed(np.delete)(block, left_out, 0)
            shape = (stop - start - len(left_out), *features.shape[1:])
            blocks.append(da.from_delayed(kept, shape, features.dtype))
    selected: da.Array = da.concatenate(blocks) if blocks else features[:0]
    return selected


def fit_components(settings: ReduceConfig, features: "da.Array") -> "PCA":
    """Fit all principal components, or with an estimating solver as many as are used."""
    from fruitdask.analysis.pca import PCA

    largest = min(features.shape)
    n_for_tsne = min(TSNE_COMPONENTS, largest) if settings.tsne.enabled else 0
    # Other solvers find all components anyway.
    is_estimate = settings.solver == "randomized" and isinstance(settings.n_components, int)
    most = max(int(settings.n_components), n_for_tsne) if is_estimate else largest
    return PCA(most, svd_solver=settings.solver, random_state=settings.seed).fit(features)


def _measure_quality(
    settings: QualityConfig,
    features: "da.Array",
    images: pd.DataFrame,
    rows: npt.NDArray[np.int64],
    found: "PCA | None",
) -> dict[str, Any] | None:
    """Measure how well the features of a sample of images separate the classes; `rows` are the images with features."""
    from fruitdask.analysis.evaluation import explain_variance, find_series, summarize_quality
    from fruitdask.analysis.neighbors import find_neighbors

    if not settings.enabled:
        return None
    sampled = sample_rows(len(rows), max_rows=settings.max_rows, seed=settings.seed)
    chosen = (features if len(sampled) == len(rows) else features[sampled]).compute()
    images = take_rows(images, rows[sampled])
    quality = {
        "n_images": len(sampled),
        "n_images_with_features": features.shape[0],
        "metric": settings.metric,
        **summarize_quality(
            chosen,
            images["label"].to_numpy(),
            n_neighbors=settings.n_neighbors,
            metric=settings.metric,
            groups=images["group"].to_numpy() if "group" in images else None,
        ),
        **({"explained_variance": explain_variance(found.explained_variance_ratio_.tolist())} if found else {}),
    }
    if "group" not in images and len(images) > 1:
        nearest = find_neighbors(chosen, n_neighbors=1, metric=settings.metric)[:, 0]
        quality["series"] = find_series(images["path"].to_list(), nearest)
    return quality


def _spread(values: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], n_rows: int) -> npt.NDArray[np.float32]:
    """Put rows at their positions in a table that is NaN elsewhere."""
    spread = np.full((n_rows, values.shape[1]), np.nan, np.float32)
    spread[rows] = values
    return spread


def write_components(output: Location, fitted: "PCA") -> None:
    """Store principal components."""
    arrays = {name: (getattr(fitted, f"{name}_"), dimensions) for name, dimensions in COMPONENT_ARRAYS.items()}
    store.write_arrays(output.child(store.COMPONENTS), arrays, {"fruitdask": __version__})

"""The results of a finished run, read on demand."""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import report, store
from fruitdask.core.storage import Location, exists, explained
from fruitdask.errors import OutputError
from fruitdask.pipeline.report import Report
from fruitdask.store.exploration import Exploration, read_exploration

if TYPE_CHECKING:
    import dask.array as da

    from fruitdask.analysis.pca import PCA


@dataclass(frozen=True)
class RunResult:
    """
    The results of a finished run in its output folder; everything is read on demand.

    Parameters
    ----------
    output : Location
        The output folder.
    manifest : dict[str, Any]
        What was run, on what, when, and the counts.
    n_computed : int
        Images that this run computed; the others were computed before.
    changes : Mapping[str, int]
        Images ``added``, ``changed``, ``vanished``, ``retried`` and ``kept``, if this run has changed earlier results.
    """

    output: Location
    manifest: dict[str, Any] = field(repr=False)
    n_computed: int
    changes: Mapping[str, int] = field(default_factory=dict)

    @property
    def table(self) -> pd.DataFrame:
        """All images: path, label, status, split if configured, pca_1, pca_2 ... (tsne_1, tsne_2)."""
        return report.read_results(self.output)

    @property
    def features(self) -> "da.Array":
        """Features of all images, (image, feature) float32, lazy; NaN rows for images that failed."""
        return open_features(self.output)[0]

    @property
    def pca(self) -> "PCA | None":
        """The fitted `fruitdask.PCA`; None if ``reduce.enabled`` is false or no components are possible."""
        return open_components(self.output, self.manifest.get("pca", {}).get("fit", {}))

    @property
    def exploration(self) -> Exploration | None:
        """What the images are like; None if they were not explored."""
        return read_exploration(self.output)

    @property
    def quality(self) -> dict[str, Any] | None:
        """How well the features separate the classes; None if not configured."""
        return store.read_quality(self.output)

    @property
    def report(self) -> Report:
        """The page; a notebook shows it in place."""
        return Report(self.output.child(store.PAGE))

    def _repr_html_(self) -> str:
        """Show counts and places in a notebook."""
        classes = pd.DataFrame(self.manifest["counts"]["by_class"]).T.rename_axis("class")
        ratios = self.manifest.get("pca", {}).get("explained_variance_ratio", [])
        explained = ", ".join(f"{ratio:.1%}" for ratio in ratios[:5]) or "not computed"
        n_ok = self.manifest["counts"]["by_status"].get("ok", 0)
        return (
            f"<p><b>fruitdask run</b>: {self.manifest['n_images']:,} images, {n_ok:,} with features; "
            f"variance explained by the first components: {explained}; "
            f"results in <code>{html.escape(self.output.url)}</code></p>{classes.to_html()}"
        )


def open_components(output: Location, fit: Mapping[str, Any]) -> "PCA | None":
    """Open the principal components of a run, if it has any; `fit` says how they were fitted."""
    location = output.child(store.COMPONENTS)
    if not exists(location):
        return None
    from fruitdask.analysis.pca import restore_pca

    arrays = store.read_arrays(location)
    with explained(location, "read", remedy=store.advise_repair(output)):
        return restore_pca(arrays, fit)


def open_features(output: Location, *, block_bytes: int = 0) -> tuple["da.Array", npt.NDArray[np.bool_]]:
    """Open the features of a run, and read which images have features.

    Returns the features (image, feature), float32, lazy, and a boolean mask of the images that have some.
    """
    import dask.array as da

    group = store.open_store(output)
    if group is None:
        raise OutputError(f"{output.url}: expected the features of a run, found none; run it first")
    array, statuses = (store.StoredArray(group[name], output) for name in ("features", "status"))
    status = np.asarray(statuses[:])
    n_chunks = max(1, block_bytes // (array.chunks[0] * array.chunks[1] * array.dtype.itemsize))
    chunks = (n_chunks * array.chunks[0], array.chunks[1])
    return da.from_array(array, chunks=chunks, name=False), status == store.STATUSES.index("ok")

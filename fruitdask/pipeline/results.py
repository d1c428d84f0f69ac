"""The results of a finished run, read on demand."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import report, store
from fruitdask.core.storage import Location, exists, explained
from fruitdask.errors import FruitdaskError, OutputError
from fruitdask.pipeline.report import Report
from fruitdask.store.exploration import Exploration, read_exploration

if TYPE_CHECKING:
    import dask.array as da
    import xarray

    from fruitdask.analysis.pca import PCA
    from fruitdask.pipeline.train import Classifier


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
    seconds : Mapping[str, float]
        Seconds that this run took, by stage and in ``total``; empty for results that were opened.
    """

    output: Location
    manifest: dict[str, Any] = field(repr=False)
    n_computed: int
    changes: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False)

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
        """The findings about the images themselves; None if they were not explored."""
        return read_exploration(self.output)

    @property
    def quality(self) -> dict[str, Any] | None:
        """How well the features separate the classes; None if not configured."""
        return store.read_quality(self.output)

    @property
    def issues(self) -> pd.DataFrame | None:
        """Photographs to check, the most serious first, as `fruitdask.check` describes them; None if not configured."""
        location = self.output.child(store.ISSUES)
        return store.read_table(self.output, store.ISSUES) if exists(location) else None

    @property
    def classifier(self) -> "Classifier":
        """The classifier that `fruitdask.train` has trained on it; raises OutputError if there is none."""
        from fruitdask.pipeline.train import open_classifier

        return open_classifier(self)

    @property
    def report(self) -> Report:
        """The page; a notebook shows it in place."""
        return Report(self.output.child(store.PAGE))

    def to_xarray(self) -> "xarray.DataArray":
        """
        Return the features with the names of their images.

        Returns
        -------
        xarray.DataArray
            Features (image, feature), float32, lazy; NaN rows for images that failed. Its coordinates along ``image``
            are ``path``, ``label``, ``status``, and ``split`` and ``group`` where they are configured.

        Raises
        ------
        FruitdaskError
            If xarray is not installed, or the results cannot be read.
        """
        try:
            import xarray
        except ImportError as error:
            raise FruitdaskError("to_xarray needs xarray; install it with pip install xarray") from error
        images = read_images(self.output)
        coordinates = {name: ("image", images[name].astype(object).to_numpy()) for name in images}
        described = {name: self.manifest["model"][name] for name in ("name", "layer", "engine", "sha256")}
        return xarray.DataArray(
            self.features,
            coordinates,
            ("image", "feature"),
            name="features",
            attrs={"url": self.output.url, **described},
        )

    def X_y(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.str_]]:
        """
        Return features and labels of the images that have features, ready for scikit-learn.

        Returns
        -------
        X : numpy.ndarray
            Features of shape (n, n_features), float32, in memory.
        y : numpy.ndarray
            The label of each row, str; an empty one where an image has none.

        Raises
        ------
        StorageError
            If they cannot be read.
        """
        features, is_ok = open_features(self.output)
        labels = read_images(self.output)["label"].to_numpy(str)
        found: npt.NDArray[np.float32] = features.compute()
        return (found, labels) if is_ok.all() else (found[is_ok], labels[is_ok])

    def similar(
        self,
        photographs: Any,
        k: int = 20,
        metric: str = "cosine",
        *,
        client: Any = None,
        storage_options: Mapping[str, Any] | None = None,
        overrides: Sequence[str] = (),
    ) -> pd.DataFrame:
        """
        Find the images of the run whose features are nearest to those of some photographs.

        Parameters
        ----------
        photographs : str, PathLike, int, bytes, PIL.Image.Image, numpy.ndarray, or a list of these
            An image of the run by its path or row number; or any photograph: its path or URL, the content of its file,
            a Pillow image, or pixels (height, width, 3), uint8.
        k : int
            Number of images to find for each.
        metric : str
            ``cosine`` or ``euclidean``.
        client : distributed.Client, optional
            A cluster that searches a large store; by default the threads of this process do.
        storage_options : Mapping[str, Any], optional
            Options of the fsspec file system of photographs outside of the run.
        overrides : Sequence[str]
            Settings such as ``"model.weights=FILE"`` where a file of the run has moved.

        Returns
        -------
        pandas.DataFrame
            ``query``, ``rank`` from 1, ``path``, ``label``, (``split``, ``group``,) ``distance``.

        Raises
        ------
        ConfigError
            If there is no such row or metric.
        ImageError
            If a photograph has no features.
        StoreMismatchError
            If the network is not that of the run any more.

        Notes
        -----
        Exact, whatever the number of images. An image of the run is not among its own results; its duplicates are.
        """
        from fruitdask.pipeline.similar import find_similar, list_queries

        queries = list_queries(self, photographs, storage_options=storage_options, overrides=overrides)
        return find_similar(self, queries, k=k, metric=metric, client=client)

    def transform(
        self,
        photographs: Any,
        *,
        storage_options: Mapping[str, Any] | None = None,
        overrides: Sequence[str] = (),
    ) -> tuple[npt.NDArray[np.float32], pd.DataFrame]:
        """
        Compute the features of new photographs in this process, and apply the principal components of the run.

        Parameters
        ----------
        photographs : str, PathLike, bytes, PIL.Image.Image, numpy.ndarray, or a list of these
            Paths or URLs, contents of files, Pillow images, or pixels (height, width, 3), uint8.
        storage_options : Mapping[str, Any], optional
            Options of the fsspec file system of the photographs.
        overrides : Sequence[str]
            Settings such as ``"model.weights=FILE"`` where a file of the run has moved.

        Returns
        -------
        features : numpy.ndarray
            Features of shape (n, n_features), float32; NaN where a photograph cannot be used.
        table : pandas.DataFrame
            ``path``, ``status``, ``error``, ``pca_1``, ``pca_2`` ...

        Raises
        ------
        StoreMismatchError
            If the network is not that of the run any more.
        FruitdaskError
            If the network cannot be built; a photograph that cannot be used is a row with a status.

        Notes
        -----
        The network, its engine, the decoding and the components are those of the run, so an image of the run has the
        same features here, to 1e-4 relative. Photographs are decoded in this process; a run on a cluster
        (`fruitdask.apply`) survives files that crash a decoder.
        """
        from fruitdask.pipeline.embed import embed_photographs, list_photographs

        features, table = embed_photographs(
            self.output,
            store.RunManifest.model_validate(self.manifest),
            list_photographs(photographs),
            storage_options=storage_options,
            overrides=overrides,
        )
        components = self.pca
        if components is not None:
            is_ok = (table["status"] == "ok").to_numpy()
            scores = np.full((len(table), len(self.manifest["pca"]["explained_variance_ratio"])), np.nan, np.float32)
            if is_ok.any():
                scores[is_ok] = np.asarray(components.transform(features[is_ok]))
            table = table.assign(**{f"pca_{number}": column for number, column in enumerate(scores.T, start=1)})
        return features, table

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


def read_images(output: Location) -> pd.DataFrame:
    """Read ``path``, ``label``, ``status`` and further columns of the catalog, such as ``split``, of all images."""
    catalog, finished = store.read_catalog(output), store.open_finished(output)
    if catalog is None or finished is None:
        raise OutputError(
            f"{output.url}: expected the catalog and the features of a run; {store.advise_repair(output)}"
        )
    images = catalog.drop(columns=list(store.VERSION_COLUMNS))
    statuses = pd.Categorical.from_codes(finished[1], pd.Index(store.STATUSES, dtype="str"))
    images.insert(2, "status", pd.Series(statuses, images.index))
    return images


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

    finished = store.open_finished(output)
    if finished is None:
        raise OutputError(f"{output.url}: expected the features of a run, found none; run it first")
    array, status = finished
    n_chunks = max(1, block_bytes // (array.chunks[0] * array.chunks[1] * array.dtype.itemsize))
    chunks = (n_chunks * array.chunks[0], array.chunks[1])
    return da.from_array(array, chunks=chunks, name=False), status == store.STATUSES.index("ok")

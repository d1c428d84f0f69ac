"""Trains a classifier on the features of a finished run, and predicts the labels of other images."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import store
from fruitdask.core.escaping import format_csv
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import Location
from fruitdask.core.version import __version__
from fruitdask.errors import DamageError, OutputError
from fruitdask.pipeline.apply import configure, describe_applied
from fruitdask.pipeline.inputs import restore_config
from fruitdask.pipeline.open import open as open_result
from fruitdask.pipeline.reduce import BLOCK_BYTES
from fruitdask.pipeline.report import render
from fruitdask.pipeline.results import RunResult, open_features, read_images
from fruitdask.pipeline.run import carry_out
from fruitdask.store.catalog import sample_evenly

if TYPE_CHECKING:
    import dask.array as da

    from fruitdask.analysis.classifier import LinearProbe

logger = logging.getLogger(__name__)

#: Images that a classifier is trained on at most: 100 MB of features of MobileNetV2.
MAX_ROWS = 20_000


@dataclass(frozen=True, eq=False)
class Classifier:
    """
    A classifier trained on the features of a finished run.

    Parameters
    ----------
    result : RunResult
        The run.
    report : dict[str, Any]
        How it was trained and evaluated: ``classes``, ``n_images``, ``n_groups`` (None if groups
        are unknown), ``n_folds``; for ``linear_probe``, which predicts, and for ``nearest_neighbors`` the ``accuracy``
        (0 to 1) with its 95 % ``interval``, ``by_class`` and the ``confusion`` of the classes ``confused``;
        ``unknown_distance``.
    probe : LinearProbe
        Its weights.
    rows : numpy.ndarray
        Rows of the run's images that it was trained on, int64.
    """

    result: RunResult
    report: dict[str, Any] = field(repr=False)
    probe: "LinearProbe" = field(repr=False)
    rows: npt.NDArray[np.int64] = field(repr=False)

    def predict(
        self,
        photographs: Any,
        *,
        storage_options: Mapping[str, Any] | None = None,
        overrides: Sequence[str] = (),
    ) -> pd.DataFrame:
        """
        Predict the labels of a few photographs in this process.

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
        pandas.DataFrame
            ``path``, ``status``, ``label`` (``unknown`` for a photograph that is unlike all training images, empty for
            one that cannot be used), ``probability`` (0 to 1), ``nearest``, the training image that is most alike, and
            its cosine ``distance``.

        Raises
        ------
        StoreMismatchError
            If the network is not that of the run any more.
        """
        features, table = self.result.transform(photographs, storage_options=storage_options, overrides=overrides)
        return self._label(table[["path", "status"]], features)

    def _label(self, images: pd.DataFrame, features: npt.NDArray[np.float32]) -> pd.DataFrame:
        """Label images by their features."""
        from fruitdask.analysis.classifier import predict

        is_ok = (images["status"] == "ok").to_numpy()
        columns: dict[str, Any] = {"label": "", "probability": np.nan, "nearest": "", "distance": np.nan}
        found = images[["path", "status"]].astype("str").reset_index(drop=True).assign(**columns)
        if is_ok.any():
            distances, nearest = self._find_nearest(features[is_ok])
            labels, probabilities = predict(self.probe, self.report, features[is_ok], distances)
            found.loc[is_ok, list(columns)] = pd.DataFrame(
                {"label": labels, "probability": probabilities, "nearest": nearest, "distance": distances}
            ).to_numpy()
        return found.astype({"probability": np.float64, "distance": np.float64})

    @cached_property
    def _known(self) -> tuple["da.Array", npt.NDArray[Any]]:
        """Features (image, feature) and paths of the training images, in memory."""
        import dask.array as da

        features = open_features(self.result.output)[0][self.rows].compute(scheduler="threads")
        return (
            da.from_array(features, chunks=features.shape),
            read_images(self.result.output)["path"].to_numpy()[self.rows],
        )

    def _find_nearest(self, features: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
        """Find the training images that are most alike: their distances and paths."""
        from fruitdask.analysis.search import find_nearest

        known, paths = self._known
        rows, distances = find_nearest(known, features, k=1, metric="cosine")
        return distances[:, 0], paths[rows[:, 0]]

    def _repr_html_(self) -> str:
        """Show the result of cross-validation in a notebook."""
        probe = self.report["linear_probe"]
        low, high = probe["interval"]
        table = pd.DataFrame(probe["by_class"]).T[["n_images", "recall", "precision"]]
        return (
            f"<p><b>classifier</b>: {probe['accuracy']:.1%} of held-out images right (95 % interval {low:.1%} to "
            f"{high:.1%}), {self.report['n_folds']} folds</p>{table.to_html(float_format='{:.3f}'.format)}"
        )


def train(
    results: "str | RunResult", *, max_rows: int = MAX_ROWS, storage_options: Mapping[str, Any] | None = None
) -> Classifier:
    """
    Train a classifier on the features and labels of a finished run, evaluate it by cross-validation, and store it.

    Parameters
    ----------
    results : str or RunResult
        The finished run, or the folder or URL of its results.
    max_rows : int
        Maximum number of images to train on, evenly from all classes; they are held in memory.
    storage_options : Mapping[str, Any], optional
        Options of the fsspec file system of ``results``.

    Returns
    -------
    Classifier
        The classifier.

    Raises
    ------
    TrainingError
        If there are fewer than two classes, or a class has fewer than two images (or two groups, where groups are
        known), so that no data could be held out for testing.

    Notes
    -----
    A linear probe (multinomial logistic regression on standardized features), compared with the vote of the 5 nearest
    neighbours. Where groups are known (``input.group_from``), no group is in both the training and the test part of a
    fold, so that the probe is never tested on an object it was trained on; intervals then count groups, not images.
    Copies of one image, which have equal features, stay in one part, too.
    """
    from fruitdask.analysis.classifier import PROBE_ARRAYS, train as train_probe

    result = results if isinstance(results, RunResult) else open_result(str(results), storage_options)
    images = read_images(result.output)
    rows = sample_evenly(images, max_rows, among=(images["status"] == "ok").to_numpy())
    chosen = images.iloc[rows]
    features = open_features(result.output, block_bytes=BLOCK_BYTES)[0][rows].compute(scheduler="threads")
    groups = chosen["group"].to_numpy(str) if "group" in chosen else None
    with warnings.catch_warnings():
        # scikit-learn takes classes of few images for numbers.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        probe, evaluated = train_probe(features, chosen["label"].to_numpy(str), groups)
    arrays = {name: (getattr(probe, name), dimensions) for name, dimensions in PROBE_ARRAYS.items()}
    manifest = store.RunManifest.model_validate(result.manifest)
    report = {"fruitdask": __version__, "finished": datetime.now(UTC).isoformat(timespec="seconds")} | evaluated
    report["trained_on"] = manifest.trained_on
    with store.locked(result.output):
        # The report is written last and marks the classifier as complete.
        store.delete_result(result.output, store.CLASSIFIER_REPORT)
        store.write_arrays(result.output.child(store.CLASSIFIER), arrays | {"rows": (rows, ("image",))}, {})
        store.write_json(result.output.child(store.CLASSIFIER_REPORT), report)
        config = restore_config(manifest)
        if config.report.enabled:
            render(config, result.output)
    return Classifier(result, report, probe, rows)


def open_classifier(result: RunResult) -> Classifier:
    """Open the classifier that was trained on a run."""
    from fruitdask.analysis.classifier import PROBE_ARRAYS, LinearProbe

    location = result.output.child(store.CLASSIFIER_REPORT)
    report = store.read_json(location)
    if report is None:
        raise OutputError(f"{result.output.url}: expected a trained classifier, found none; use fruitdask train first")
    arrays = store.read_arrays(result.output.child(store.CLASSIFIER))
    if missing := sorted({"rows", *PROBE_ARRAYS} - arrays.keys()):
        raise DamageError(f"{location.url} is damaged ({missing[0]} is missing); use fruitdask train again")
    if report.get("trained_on") != store.RunManifest.model_validate(result.manifest).trained_on:
        logger.warning(
            "%s: images, labels or groups have changed since the classifier was trained; use fruitdask train again",
            result.output.url,
        )
    rows = arrays.pop("rows")
    return Classifier(result, report, LinearProbe(**arrays), rows)


def predict(
    results: "str | RunResult",
    *,
    input: "str | os.PathLike[str] | Mapping[str, Any]",
    output: "str | os.PathLike[str] | Mapping[str, Any]",
    storage_options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    client: Any = None,
    progress: RunProgress | bool | None = None,
) -> pd.DataFrame:
    """
    Predict the labels of other images, by the classifier that was trained on a finished run.

    Parameters
    ----------
    results : str or RunResult
        The finished run with a classifier, or the folder or URL of its results.
    input : str, PathLike or Mapping
        The other images: a folder or URL, or the section ``input`` of a configuration. They need no labels.
    output : str, PathLike or Mapping
        Where their features and the predictions go: a folder or URL, or the section ``output`` of a configuration.
    storage_options : Mapping[str, Any], optional
        Options of the fsspec file system of ``results``.
    overrides : Sequence[str]
        Settings such as ``"cluster.kind=local"`` that override those of the finished run.
    client : distributed.Client, optional
        A cluster to use instead of the configured one; it is left open.
    progress : RunProgress or bool, optional
        How to show progress; by default, only on a terminal and in a notebook. False shows none.

    Returns
    -------
    pandas.DataFrame
        One row per image, as `Classifier.predict` describes; also ``predictions.parquet`` and ``predictions.csv``.

    Raises
    ------
    OutputError
        If no classifier was trained on the run.
    FruitdaskError
        If something else is wrong; see the subclasses in `fruitdask.errors`.

    Notes
    -----
    Applies the run to the images first, as `fruitdask.apply` does: that can be interrupted and resumed.
    """
    result = results if isinstance(results, RunResult) else open_result(str(results), storage_options)
    classifier = open_classifier(result)
    config = configure(result, input=input, output=output, overrides=overrides)
    applied = carry_out(config, applied=describe_applied(result), client=client, progress=progress)
    predictions = _predict_stored(classifier, applied.output)
    with store.locked(applied.output):
        store.write_table(applied.output.child(store.PREDICTIONS), predictions)
        digests = store.write_digested(applied.output, store.PREDICTIONS_CSV, format_csv(predictions).encode())
        manifest = store.RunManifest.model_validate(applied.manifest)
        store.write_manifest(applied.output, manifest.change(digests=manifest.digests | digests))
        if config.report.enabled:
            render(config, applied.output)
    return predictions


def _predict_stored(classifier: Classifier, output: Location) -> pd.DataFrame:
    """Predict the labels of all images of an output, block by block."""
    features, _ = open_features(output, block_bytes=BLOCK_BYTES)
    images, found, start = read_images(output), [], 0
    for block in features.blocks:
        rows = images.iloc[start : start + len(block)]
        found.append(classifier._label(rows, block.compute(scheduler="threads")))
        start += len(block)
    return pd.concat(found, ignore_index=True)

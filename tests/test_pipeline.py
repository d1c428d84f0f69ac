"""Whole runs: real photographs against plain Keras and scikit-learn, resuming, and what a run leaves behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import sklearn.decomposition
import sklearn.metrics
from distributed import Client, LocalCluster
from PIL import Image
from runs import EXTRAS, OFF, ON, Finish, MakeConfig, configure

import fruitdask
from fruitdask import store
from fruitdask.analysis.pca import PCA
from fruitdask.core.config import Config, EC2ClusterConfig, ModelConfig
from fruitdask.core.progress import choose_progress
from fruitdask.core.storage import Location
from fruitdask.errors import (
    ConfigError,
    FruitdaskError,
    OutputError,
    ReduceError,
    StoreMismatchError,
    TooManyFailuresError,
)
from fruitdask.pipeline import (
    budget,
    explore as explore_module,
    featurize as featurize_module,
    report as report_module,
    run as run_module,
)
from fruitdask.pipeline.inputs import dump_config
from fruitdask.pipeline.reduce import write_components
from fruitdask.worker.models import build_artifact
from fruitdask.worker.models.cache import keep_artifact

SHOWN = dict.fromkeys(EXTRAS, ON) | {"plots": ON | {"dpi": 50}}
#: The same without figures, which take longest.
PAGED = SHOWN | {"plots": OFF}


@pytest.fixture
def make_config(tiny_model: ModelConfig, sample_folder: Path, tmp_path: Path) -> MakeConfig:
    """Make the configuration of a run of the tiny model on the drawn images, with the settings of a test."""
    return lambda **sections: configure(sample_folder, tmp_path / "out", tiny_model, **sections)


@pytest.fixture(scope="module")
def some_photographs(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every thirtieth of the real photographs: 29 of all classes."""
    folder = tmp_path_factory.mktemp("photographs")
    for path in sorted(photographs.glob("*/*.jpg"))[::30]:
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def reference(some_photographs: Path, mobilenet_weights: Path) -> dict[str, np.ndarray]:
    """Features of the photographs by plain Keras, and their principal components by scikit-learn."""
    import keras

    network = keras.applications.MobileNetV2(
        include_top=False, weights=str(mobilenet_weights), input_shape=(224, 224, 3), pooling="avg"
    )
    paths = sorted(str(path.relative_to(some_photographs)) for path in some_photographs.glob("*/*.jpg"))
    features = []
    for start in range(0, len(paths), 32):
        images = [Image.open(some_photographs / path).convert("RGB") for path in paths[start : start + 32]]
        pixels = np.stack(
            [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), np.float32) for image in images]
        )
        features.append(network.predict(keras.applications.mobilenet_v2.preprocess_input(pixels), verbose=0))
    scores = sklearn.decomposition.PCA(5, svd_solver="full").fit_transform(np.concatenate(features).astype(np.float64))
    return {"paths": np.array(paths), "features": np.concatenate(features), "scores": scores}


@pytest.fixture(scope="module")
def mobilenet(mobilenet_weights: Path) -> ModelConfig:
    """MobileNetV2, built in this process, which has already imported TensorFlow."""
    config = ModelConfig(name="MobileNetV2", weights=str(mobilenet_weights))
    keep_artifact(config, build_artifact(config))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("images_per_partition", [8, 200])
def test_run_on_photographs_equals_keras_and_sklearn(
    reference: dict[str, np.ndarray],
    some_photographs: Path,
    mobilenet: ModelConfig,
    client: Any,
    tmp_path: Path,
    images_per_partition: int,
) -> None:
    config = fruitdask.load_config(
        {
            "input": {"url": str(some_photographs)},
            "model": mobilenet.model_dump(),
            "featurize": {"images_per_partition": images_per_partition},
            "reduce": {"n_components": 5},
            **dict.fromkeys(EXTRAS, OFF),
            "output": {"url": str(tmp_path / "out")},
        }
    )
    result = fruitdask.run(config, client=client)
    assert result.manifest["counts"]["by_status"] == {"ok": 29}
    table = result.table
    assert list(table["path"]) == list(reference["paths"])
    features = result.features.compute()
    norms = np.linalg.norm(reference["features"], axis=1)
    assert (np.linalg.norm(features - reference["features"], axis=1) / norms).max() < 1e-4
    scores = table[[f"pca_{number}" for number in range(1, 6)]].to_numpy()
    signs = np.sign((scores * reference["scores"]).sum(axis=0))
    assert np.abs(scores * signs - reference["scores"]).max() < 1e-3
    assert result.features.chunksize == (min(images_per_partition, 29), 1280)


@pytest.mark.slow
def test_run_writes_the_files_of_the_architecture(
    make_config: MakeConfig, client: Any, sample_folder: Path, tmp_path: Path
) -> None:
    config = make_config(reduce={"n_components": 2, "tsne": {"enabled": True, "perplexity": 5}}, **SHOWN)
    result = fruitdask.run(config, client=client)
    explored = ["explore.csv", "explore.json", "explore.parquet", "explore.zarr"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*explored, "explore_classes.csv", "explore_classes.parquet", "catalog.parquet", "features.zarr", "figures"]
        + ["manifest.json", "partitions", "pca.zarr", "quality.json", "report.html", "results.csv", "results.parquet"]
        + ["config.yaml", "issues.csv", "issues.parquet"]
    )
    assert sorted(path.stem for path in (tmp_path / "out" / "figures").iterdir()) == sorted(store.FIGURE_NAMES)
    table = result.table
    assert list(table.columns) == ["path", "label", "status", "pca_1", "pca_2", "tsne_1", "tsne_2"]
    assert len(table) == result.n_computed == 24 and not table.isna().any().any()
    assert list(table["label"]) == [path.split("/")[0] for path in table["path"]]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "results.parquet"), table)
    features = da.from_zarr(str(tmp_path / "out" / "features.zarr"), component="features").compute()
    np.testing.assert_array_equal(result.features.compute(), features)
    np.testing.assert_allclose(result.pca.transform(features), table[["pca_1", "pca_2"]], atol=1e-3)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest.pop("checksum") and manifest == result.manifest
    assert manifest["cluster"] == {"kind": "local", "n_workers": 2, "n_threads": 4}
    assert manifest["counts"]["by_class"]["pear_1"] == {"ok": 4, "failed": 0}
    stages = {"list", "start", "featurize", "explore", "reduce", "write", "check", "total", "worker"}
    assert set(manifest["seconds"]) == stages
    assert "24 images" in result._repr_html_() and "pear_1" in result._repr_html_()


def test_run_leaves_out_failed_images(
    make_config: MakeConfig, client: Any, sample_folder: Path, tmp_path: Path
) -> None:
    source = copy_images(sample_folder, tmp_path / "in")
    (source / "pear_1" / "r0_0.jpg").write_bytes(b"")
    result = fruitdask.run(make_config(input={"url": str(source)}), client=client)
    table = result.table.set_index("path")
    assert table["status"].value_counts().to_dict() == {"ok": 23, "unreadable": 1}
    assert table.loc["pear_1/r0_0.jpg", ["pca_1", "pca_2"]].isna().all()
    ok = table["status"] == "ok"
    features = result.features.compute()
    assert np.isnan(features[~ok]).all()
    expected = sklearn.decomposition.PCA(2, svd_solver="full").fit_transform(features[ok].astype(np.float64))
    np.testing.assert_allclose(table.loc[ok, ["pca_1", "pca_2"]], expected, atol=1e-3)
    failures = pd.read_csv(tmp_path / "out" / "failures.csv")
    assert list(failures["path"]) == ["pear_1/r0_0.jpg"] and failures["error"][0].endswith("found an empty file")


def test_run_continues_after_too_many_failures(
    make_config: MakeConfig, client: Any, sample_folder: Path, tmp_path: Path
) -> None:
    source = copy_images(sample_folder, tmp_path / "in")
    for path in sorted(source.rglob("*.jpg"))[:6]:
        path.write_bytes(b"broken")
    config = make_config(input={"url": str(source)}, featurize={"max_failed_fraction": 0.1, "images_per_partition": 3})
    with pytest.raises(TooManyFailuresError, match="of 24 images failed"):
        fruitdask.run(config, client=client)
    assert len(pd.read_csv(tmp_path / "out" / "failures.csv")) >= 3
    with pytest.raises(TooManyFailuresError, match="run again to resume"):
        fruitdask.run(config, client=client)
    more = make_config(input={"url": str(source)}, featurize={"max_failed_fraction": 0.5, "images_per_partition": 3})
    result = fruitdask.run(more, client=client)
    assert result.manifest["counts"]["by_status"] == {"unreadable": 6, "ok": 18}
    assert result.n_computed < 24


def test_run_computes_only_what_is_missing(
    make_config: MakeConfig, finish: Finish, client: Any, tmp_path: Path
) -> None:
    first = finish(make_config())
    expected, table = first.features.compute(), first.table
    marks = tmp_path / "out" / "partitions"
    assert sorted(path.name for path in marks.iterdir()) == [f"{index:05d}.parquet" for index in range(5)]
    chunks = tmp_path / "out" / "features.zarr" / "features" / "c"
    before = {path: path.stat().st_mtime_ns for path in chunks.rglob("*") if path.is_file()}
    (marks / "00001.parquet").unlink()
    (marks / "00004.parquet").unlink()
    # The partition size of the store counts, whatever the configuration says now.
    again = fruitdask.run(make_config(featurize={"images_per_partition": 7}), client=client)
    assert again.n_computed == 5 + 4
    written = {path.relative_to(chunks).parts[0] for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert written == {"1", "4"}
    np.testing.assert_array_equal(again.features.compute(), expected)
    pd.testing.assert_frame_equal(again.table, table)


@pytest.mark.slow
def test_run_again_when_finished_starts_nothing(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    config = make_config(explore=ON, quality=ON)
    finish(config)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    code = (
        "import sys, fruitdask\n"
        f"result = fruitdask.run(fruitdask.load_config({str(tmp_path / 'config.json')!r}))\n"
        "print(result.n_computed, sorted({'tensorflow', 'keras', 'distributed', 'dask', 'dask_ml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_run_reduces_again_without_a_cluster_when_only_that_changed(
    make_config: MakeConfig, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(make_config())
    monkeypatch.setattr(budget, "open_client", lambda config: pytest.fail("a cluster was started"))
    result = fruitdask.run(make_config(reduce={"n_components": 0.999}))
    assert result.n_computed == 0
    assert result.pca.n_components_ == result.manifest["pca"]["n_components"] > 2
    assert result.pca.explained_variance_ratio_.sum() > 0.999


@pytest.mark.parametrize("solver", ["full", "tsqr", "randomized"])
def test_run_reduces_with_the_solvers_of_dask_ml(make_config: MakeConfig, finish: Finish, solver: str) -> None:
    before = finish(make_config())
    expected = sklearn.decomposition.PCA(2, svd_solver="full").fit(before.features.compute().astype(np.float64))
    config = make_config(reduce={"solver": solver, "seed": 3})
    pca = fruitdask.run(config).pca
    assert before.pca.svd_solver == "covariance_eigh" and (pca.svd_solver, pca.random_state) == (solver, 3)
    for found in (before.pca, pca):
        np.testing.assert_allclose(found.components_, expected.components_, atol=1e-6)
        np.testing.assert_allclose(found.noise_variance_, expected.noise_variance_, rtol=1e-6)
        assert (found.n_samples_, found.n_components_) == (expected.n_samples_, expected.n_components_)
    assert fruitdask.verify(config.output.url).is_well


@pytest.mark.slow
def test_run_reduces_large_features_on_the_cluster(
    make_config: MakeConfig, finish: Finish, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = finish(make_config()).table
    monkeypatch.setattr(run_module, "LOCAL_REDUCE_BYTES", 0)
    distributed = fruitdask.run(make_config(output={"overwrite": True}), client=client).table
    pd.testing.assert_frame_equal(distributed, local, rtol=1e-5)


def test_each_stage_works_by_itself_on_a_client(
    make_config: MakeConfig, client: Any, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    from fruitdask.store.catalog import split_catalog
    from fruitdask.worker.featurize import FeaturizeJob, featurize_partition
    from fruitdask.worker.fetch import ImageSource

    config, output = make_config(), Location(str(tmp_path / "mine"))
    catalog = fruitdask.list_images(config.input)
    artifact = fruitdask.build_artifact(tiny_model)
    store.create_store(
        output, n_images=len(catalog), n_features=artifact.n_features, images_per_partition=10, attributes={}
    )
    source = ImageSource(
        Location(config.input.url), batch_size=8, max_pixels=10**6, fetch_attempts=1, concurrent_reads=1
    )
    for partition in split_catalog(catalog, 10):
        featurize_partition(partition, artifact, FeaturizeJob(source, output))
    features = da.from_zarr(str(tmp_path / "mine" / "features.zarr"), component="features")
    assert fruitdask.PCA(2).fit(features).n_components_ == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reduce": {"n_components": 25}}, ReduceError, "n_components is 25, but there are only 24 images"),
        ({"reduce": {"n_components": 7}}, ReduceError, "n_components is 7, but there are only 6 features"),
        ({"output": {"url": "{input}/out"}}, ConfigError, "lies inside input.url"),
        ({"output": {"url": "{input}"}}, ConfigError, "lies inside input.url"),
        ({"output": {"url": "{input}/pear_1/r0_0.jpg/out"}}, ConfigError, "lies inside input.url"),
        ({"output": {"url": "{model}/out"}}, OutputError, "expected a folder, found the file"),
        ({"output": {"url": "gs://bucket/out"}}, FruitdaskError, "needs a package that is not installed. .*gcsfs"),
        ({"input": {"url": "nowhere://bucket"}}, FruitdaskError, "expected a local path or a URL that fsspec can open"),
    ],
    ids=[
        "images",
        "features",
        "output in input",
        "output is input",
        "deep in input",
        "a file",
        "no package",
        "no protocol",
    ],
)
def test_run_refuses_and_writes_nothing(
    make_config: MakeConfig,
    client: Any,
    sample_folder: Path,
    tiny_model: ModelConfig,
    tmp_path: Path,
    settings: dict,
    error: type[Exception],
    message: str,
) -> None:
    settings = json.loads(
        json.dumps(settings).replace("{input}", str(sample_folder)).replace("{model}", tiny_model.weights)
    )
    before = sorted(sample_folder.rglob("*"))
    with pytest.raises(error, match=message):
        fruitdask.run(make_config(**settings), client=client)
    assert not (tmp_path / "out").exists()
    assert sorted(sample_folder.rglob("*")) == before


@pytest.mark.parametrize("call", [fruitdask.run, fruitdask.explore, fruitdask.plan])
def test_what_is_no_configuration_or_no_open_client_is_one_sentence(
    make_config: MakeConfig, call: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="^config: expected a configuration, found str; load it with"):
        call("configs/demo.yaml")
    if call is fruitdask.plan:
        return
    with LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as cluster, Client(
        cluster
    ) as client:
        pass
    for wrong, found in ((client, "one that is closed"), (cluster.scheduler_address, "str")):
        with pytest.raises(ConfigError, match=f"^client: expected an open .*Client, found {found}; open one"):
            call(make_config(), client=wrong)
    assert not (tmp_path / "out").exists()


def test_run_refuses_the_results_of_another_run(
    make_config: MakeConfig, finish: Finish, client: Any, tmp_path: Path
) -> None:
    result = finish(make_config())
    before = result.table
    with pytest.raises(StoreMismatchError, match="only 10 of its 24 images"):
        fruitdask.run(make_config(input={"limit": 10}), client=client)
    with pytest.raises(StoreMismatchError, match="model.preprocessing was none, is tf"):
        fruitdask.run(make_config(model={"preprocessing": "tf"}), client=client)
    pd.testing.assert_frame_equal(result.table, before)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    replaced = fruitdask.run(make_config(input={"limit": 10}, output={"overwrite": True}), client=client)
    assert len(replaced.table) == 10
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_sample_is_drawn_where_there_is_no_input(make_config: MakeConfig, client: Any, tmp_path: Path) -> None:
    config = make_config(input={"url": str(tmp_path / "drawn"), "sample": {"per_class": 2, "size_px": 32}})
    assert len(fruitdask.run(config, client=client).table) == 12
    assert len(list((tmp_path / "drawn").rglob("*.jpg"))) == 12


def copy_images(source: Path, target: Path) -> Path:
    """Copy the drawn images for a test that breaks some."""
    import shutil

    shutil.copytree(source, target)
    return target


def test_run_refused_for_failures_is_refused_again(
    make_config: MakeConfig, client: Any, sample_folder: Path, tmp_path: Path
) -> None:
    source = copy_images(sample_folder, tmp_path / "in")
    for path in sorted(source.rglob("*.jpg"))[-6:]:
        path.write_bytes(b"broken")
    config = make_config(input={"url": str(source)}, featurize={"max_failed_fraction": 0.2, "images_per_partition": 24})
    for _ in range(2):
        with pytest.raises(TooManyFailuresError, match="6 of 24 images failed"):
            fruitdask.run(config, client=client)
    lenient = make_config(input={"url": str(source)}, featurize={"max_failed_fraction": 0.25})
    assert fruitdask.run(lenient, client=client).n_computed == 0
    with pytest.raises(TooManyFailuresError, match="6 of 24 images failed"):
        fruitdask.run(config, client=client)


@pytest.mark.parametrize("step", ["write_results", "write_components"])
def test_interrupted_writing_is_repaired_by_the_next_run(
    make_config: MakeConfig, finish: Finish, client: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    expected = finish(make_config()).table

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt("in this test")

    with monkeypatch.context() as patch:
        patch.setattr(*((run_module.report, step) if step == "write_results" else (run_module, step)), interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            fruitdask.run(make_config(reduce={"n_components": 3}), client=client)
    result = fruitdask.run(make_config(), client=client)
    pd.testing.assert_frame_equal(result.table, expected)
    assert result.pca.n_components_ == 2


@pytest.mark.parametrize("name", ["results.parquet", "pca.zarr"])
def test_deleted_results_are_written_again(
    make_config: MakeConfig, finish: Finish, client: Any, tmp_path: Path, name: str
) -> None:
    expected = finish(make_config()).table
    store.delete_result(Location(str(tmp_path / "out")), name)
    result = fruitdask.run(make_config(), client=client)
    pd.testing.assert_frame_equal(result.table, expected)
    assert result.pca.n_components_ == 2


def test_interrupted_overwriting_leaves_no_commit_mark_without_its_chunk(
    make_config: MakeConfig, finish: Finish, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = finish(make_config()).features.compute()
    delete = store.delete_result

    def delete_and_interrupt(output: Location, name: str) -> None:
        if name == "features.zarr":
            delete(output, "features.zarr/features/c")
            raise KeyboardInterrupt("in this test")
        delete(output, name)

    with monkeypatch.context() as patch:
        patch.setattr(store.manifests, "delete_result", delete_and_interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            fruitdask.run(make_config(output={"overwrite": True}), client=client)
    result = fruitdask.run(make_config(), client=client)
    assert result.n_computed == 24
    np.testing.assert_array_equal(result.features.compute(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("n_images", [2, 4])
def test_identical_images_have_features_and_no_components(
    make_config: MakeConfig, client: Any, tmp_path: Path, n_images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(n_images):
        Image.new("RGB", (40, 40), (10, 20, 30)).save(tmp_path / "in" / f"{number}.png")
    config = make_config(input={"url": str(tmp_path / "in")}, reduce={"tsne": {"enabled": True}}, **SHOWN)
    result = fruitdask.run(config, client=client, progress=choose_progress())
    assert (
        f"No principal components were computed: all {n_images} images have the same features"
        in capsys.readouterr().err
    )
    np.testing.assert_allclose(result.features.compute(), [[10, 20, 30] * 2] * n_images)
    check_without_components(result, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_images", "n_ok", "reduce"),
    [(1, 1, {}), (3, 1, {}), (2, 0, {}), (4, 4, {"enabled": False})],
    ids=["one", "one of three", "none of two", "four, disabled"],
)
def test_images_have_features_without_components(
    make_config: MakeConfig,
    client: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    n_images: int,
    n_ok: int,
    reduce: dict[str, Any],
) -> None:
    (tmp_path / "in" / "apple").mkdir(parents=True)
    expected = np.full((n_images, 6), np.nan)
    for number in range(n_images):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / "apple" / f"{number}.png")
        if number < n_ok:
            expected[number] = [*pixels.mean(axis=(0, 1)), *pixels.max(axis=(0, 1))]
        else:
            (tmp_path / "in" / "apple" / f"{number}.png").write_bytes(b"broken")
    config = make_config(
        input={"url": str(tmp_path / "in")},
        featurize={"images_per_partition": 2, "max_failed_fraction": 1},
        # It does not matter that more components are configured than possible, because there are none.
        reduce={"tsne": {"enabled": True}, "n_components": 2 if n_images > 1 else 9} | reduce,
        **SHOWN,
    )
    result = fruitdask.run(config, client=client, progress=choose_progress())
    said = f"Principal components need at least 2 images with features, found {n_ok}: none were computed."
    assert (said in " ".join(capsys.readouterr().err.split())) == reduce.get("enabled", True)
    np.testing.assert_allclose(result.features.compute(), expected, rtol=1e-6)
    check_without_components(result, config)


def check_without_components(result: fruitdask.RunResult, config: Config) -> None:
    """Check that results without components are complete: tables, notebook, page, figures, a second run, verifying."""
    assert list(result.table.columns) == ["path", "label", "status"]
    assert result.pca is None and "pca" not in result.manifest and "not computed" in result._repr_html_()
    assert result.quality is not None and "explained_variance" not in result.quality
    figures = {path.stem for path in Path(result.output.path, "figures").iterdir()}
    assert "neighbors" in figures and not figures & {"pca", "tsne", "explained_variance"}
    assert 'href="#maps"' not in fruitdask.render_report(config).read()
    assert fruitdask.run(config).n_computed == 0
    found = fruitdask.verify(result.output.url)
    assert found.faults == found.notes == ()
    write_components(result.output, PCA(2).fit(np.eye(3, 6)))
    assert [fault.where for fault in fruitdask.verify(result.output.url, repair=True).faults] == ["pca.zarr"]
    assert fruitdask.verify(result.output.url).faults == ()


@pytest.mark.slow
def test_components_go_when_one_image_is_left_and_come_back(
    make_config: MakeConfig, client: Any, tmp_path: Path
) -> None:
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        (tmp_path / "in" / "apple").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / "apple" / f"{number}.png")
    config = make_config(input={"url": str(tmp_path / "in")}, reduce={"refit": "never"}, quality=ON)
    before = fruitdask.run(config, client=client)
    (tmp_path / "in" / "apple" / "1.png").rename(tmp_path / "aside.png")
    alone = fruitdask.run(config, client=client)
    assert alone.pca is None and not (tmp_path / "out" / "pca.zarr").exists()
    assert fruitdask.verify(alone.output.url).faults == ()
    (tmp_path / "aside.png").rename(tmp_path / "in" / "apple" / "1.png")
    pd.testing.assert_frame_equal(fruitdask.run(config, client=client).table, before.table)
    erased = fruitdask.erase(config, ["apple/1.png"], client=client).result
    assert erased is not None and erased.pca is None and fruitdask.verify(erased.output.url).faults == ()


def test_settings_that_an_earlier_version_did_not_have_reduce_nothing_again(
    make_config: MakeConfig, finish: Finish
) -> None:
    result = finish(make_config())
    manifest = store.RunManifest.model_validate(result.manifest)
    del manifest.config["reduce"]["enabled"]
    store.write_manifest(result.output, manifest)
    assert fruitdask.run(make_config()).manifest["finished"] == result.manifest["finished"]


@pytest.mark.slow
def test_reduction_can_be_turned_off_and_on(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    before = finish(make_config(**SHOWN))
    assert before.pca is not None and before.quality is not None
    off = fruitdask.run(make_config(**SHOWN, reduce={"enabled": False}))
    figures = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert off.n_computed == 0 and off.pca is None and not (tmp_path / "out" / "pca.zarr").exists()
    assert list(off.table.columns) == ["path", "label", "status"] and not figures & {"pca", "explained_variance"}
    assert off.quality is not None and off.quality["neighbors"] == before.quality["neighbors"]
    assert fruitdask.verify(off.output.url).faults == ()
    on = fruitdask.run(make_config(**SHOWN))
    pd.testing.assert_frame_equal(on.table, before.table)
    assert fruitdask.verify(on.output.url).faults == ()


def test_sample_is_not_drawn_into_a_remote_input(make_config: MakeConfig, client: Any) -> None:
    with pytest.raises(ConfigError, match="expected input.url to be a local folder"):
        fruitdask.run(make_config(input={"url": "memory://drawn", "sample": {"per_class": 1}}), client=client)


def test_output_that_reaches_the_input_by_a_link_is_refused(
    make_config: MakeConfig, client: Any, sample_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(sample_folder)
    with pytest.raises(ConfigError, match="lies inside input.url"):
        fruitdask.run(make_config(output={"url": str(tmp_path / "link" / "out")}), client=client)


def test_other_decoding_is_refused_with_both_values(make_config: MakeConfig, finish: Finish, client: Any) -> None:
    finish(make_config())
    with pytest.raises(StoreMismatchError, match="featurize.max_pixels was 50000000, is 9999"):
        fruitdask.run(make_config(featurize={"max_pixels": 9999}), client=client)


@pytest.mark.slow
def test_exploring_along_with_a_run_finds_what_exploring_alone_does(
    make_config: MakeConfig, client: Any, tmp_path: Path
) -> None:
    along = fruitdask.run(make_config(explore=ON), client=client).exploration
    alone = fruitdask.explore(make_config(output={"url": str(tmp_path / "alone")}), client=client)
    assert along is not None
    pd.testing.assert_frame_equal(along.images, alone.images)
    pd.testing.assert_frame_equal(along.classes, alone.classes)
    np.testing.assert_array_equal(along.thumbnails, alone.thumbnails)
    assert along.summary["fingerprint"] == alone.summary["fingerprint"] and along.summary["input_px"] == 32


@pytest.mark.slow
def test_run_reads_each_image_once(
    make_config: MakeConfig, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(explore_module, "explore_partition", None)
        fruitdask.run(make_config(explore=ON), client=client)
    # The run does not explore again what was explored before.
    alone = make_config(explore=ON, output={"url": str(tmp_path / "alone")})
    fruitdask.explore(alone, client=client)
    before = (tmp_path / "alone" / "explore.json").stat().st_mtime_ns
    result = fruitdask.run(alone, client=client)
    assert result.n_computed == 24 and (tmp_path / "alone" / "explore.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "explore", [{}, {"input_px": 20}, {"thumbnail_px": 16}], ids=["left out", "another size", "other thumbnails"]
)
def test_missing_exploration_is_done_later(make_config: MakeConfig, client: Any, explore: dict[str, Any]) -> None:
    first = fruitdask.run(make_config(explore={"enabled": explore != {}}), client=client)
    assert (first.exploration is None) == (explore == {})
    again = fruitdask.run(make_config(explore=ON | explore), client=client)
    assert again.n_computed == 0 and again.exploration is not None
    assert len(again.exploration.images) == 24 and again.exploration.images["status"].eq("ok").all()
    assert again.exploration.summary["input_px"] == explore.get("input_px", 32)
    assert again.exploration.thumbnails.shape[1] == explore.get("thumbnail_px", 128)
    np.testing.assert_array_equal(again.features.compute(), first.features.compute())


@pytest.mark.slow
def test_exploration_of_an_interrupted_run_is_complete(
    make_config: MakeConfig, finish: Finish, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = finish(make_config(explore=ON)).exploration
    check, overwrite = featurize_module.check_failures, make_config(explore=ON, output={"overwrite": True})

    def interrupt(task: Any, n_failed: int) -> None:
        if len(store.list_committed(task.output)) >= 2:
            raise KeyboardInterrupt("in this test")
        check(task, n_failed)

    with monkeypatch.context() as patch:
        patch.setattr(featurize_module, "check_failures", interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            fruitdask.run(overwrite, client=client)
    # Finished partitions are not read again.
    index = min(store.list_committed(Location(str(tmp_path / "out"))))
    (mark,) = (tmp_path / "out" / "exploring").glob(f"*/rows/{index:05d}.parquet")
    store.write_table(Location(str(mark)), pd.read_parquet(mark).assign(format="seen"))
    result = fruitdask.run(make_config(explore=ON), client=client)
    assert expected is not None and result.exploration is not None and result.n_computed < 24
    expected.images.loc[expected.images.index // 5 == index, "format"] = "seen"
    pd.testing.assert_frame_equal(result.exploration.images, expected.images)
    pd.testing.assert_frame_equal(result.exploration.classes, expected.classes)


def test_quality_equals_scikit_learn_on_the_same_features(make_config: MakeConfig, client: Any) -> None:
    result = fruitdask.run(make_config(quality=ON | {"n_neighbors": 3}), client=client)
    features, labels = result.features.compute().astype(np.float64), result.table["label"].to_numpy()
    assert result.quality is not None and result.quality["n_images"] == 24
    silhouette = sklearn.metrics.silhouette_score(features, labels)
    assert result.quality["silhouette"]["mean"] == pytest.approx(silhouette, rel=1e-4)
    distances = sklearn.metrics.pairwise_distances(features) + np.diag(np.full(24, np.inf))
    nearest = labels[distances.argsort(axis=1)[:, :3]]
    assert result.quality["neighbors"]["agreement"] == pytest.approx((nearest == labels[:, np.newaxis]).mean())
    full = sklearn.decomposition.PCA(svd_solver="full").fit(features).explained_variance_ratio_
    np.testing.assert_allclose(result.quality["explained_variance"]["ratio"], full, atol=1e-6)
    assert len(result.table.filter(like="pca_").columns) == 2


@pytest.mark.slow
def test_report_is_rendered_again_without_images_and_cluster(
    make_config: MakeConfig, finish: Finish, sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_images(sample_folder, tmp_path / "in")
    settings = {"input": {"url": str(source)}} | PAGED
    first = finish(make_config(**settings))
    written = first.report.read()
    assert "<iframe" in first.report._repr_html_()
    for module in (budget, explore_module):
        monkeypatch.setattr(module, "open_client", lambda config: pytest.fail("a cluster was started"))
    titled = make_config(**settings | {"report": {"enabled": True, "title": "Our <orchard>"}})
    again = fruitdask.run(titled)
    assert (
        again.n_computed == 0 and "Our &lt;orchard&gt;" in again.report.read() and "Our &lt;orchard&gt;" not in written
    )
    (tmp_path / "out" / "report.html").unlink()
    store.delete_result(Location(str(source)), "pear_1")
    assert "Our &lt;orchard&gt;" in fruitdask.render_report(titled).read()


def test_render_report_needs_results(make_config: MakeConfig) -> None:
    with pytest.raises(OutputError, match="expected a finished run or exploration, found none"):
        fruitdask.render_report(make_config())


def test_explore_refuses_the_folder_of_a_run_on_other_images(
    make_config: MakeConfig, finish: Finish, client: Any
) -> None:
    finish(make_config())
    with pytest.raises(StoreMismatchError, match="the input had other images or other versions"):
        fruitdask.explore(make_config(input={"limit": 10}), client=client)


@pytest.mark.slow
def test_run_refuses_the_exploration_of_other_images(make_config: MakeConfig, client: Any) -> None:
    fruitdask.explore(make_config(), client=client)
    other = {"input": {"limit": 10}, "explore": {"enabled": False}}
    with pytest.raises(StoreMismatchError, match="the input had other images"):
        fruitdask.run(make_config(**other), client=client)
    result = fruitdask.run(make_config(**other | {"output": {"overwrite": True}}), client=client)
    assert result.exploration is None and len(result.table) == 10


@pytest.mark.slow
def test_interrupted_drawing_is_done_by_the_next_run(
    make_config: MakeConfig, finish: Finish, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    explored = {"explore": ON | {"input_px": 24}}

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt("in this test")

    finish(make_config(**PAGED))
    with monkeypatch.context() as patch:
        patch.setattr(report_module.report, "write_page", interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            fruitdask.render_report(make_config(**PAGED | {"report": ON | {"title": "Orchard"}}))
    assert "Orchard" not in (tmp_path / "out" / "report.html").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(explore_module, "render", interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            fruitdask.explore(make_config(**PAGED | explored), client=client)
    result = fruitdask.run(make_config(**PAGED | explored))
    assert result.n_computed == 0 and "24 × 24" in result.report.read() and "Orchard" not in result.report.read()
    assert result.manifest["config"]["explore"]["input_px"] == 24
    fruitdask.render_report(make_config(**PAGED | {"report": ON | {"title": "Orchard"}}))
    assert "Orchard" not in fruitdask.run(make_config(**PAGED | explored)).report.read()


@pytest.mark.slow
def test_changed_results_delete_figures_of_the_old_ones(
    make_config: MakeConfig, finish: Finish, tmp_path: Path
) -> None:
    finish(make_config(**SHOWN))
    fruitdask.run(make_config(reduce={"n_components": 3}))
    assert not (tmp_path / "out" / "report.html").exists() and not list((tmp_path / "out" / "figures").iterdir())


def test_seconds_are_those_of_the_run_that_computed_the_images(
    make_config: MakeConfig, finish: Finish, client: Any, tmp_path: Path
) -> None:
    first = finish(make_config()).manifest
    again = fruitdask.run(make_config(reduce={"n_components": 3})).manifest
    assert again["n_computed"] == 24 and again["seconds"]["total"] == first["seconds"]["total"]
    assert again["seconds"]["worker"] == first["seconds"]["worker"]
    (tmp_path / "out" / "partitions" / "00000.parquet").unlink()
    resumed = fruitdask.run(make_config(), client=client).manifest
    assert resumed["n_computed"] == 5 and resumed["seconds"]["total"] != first["seconds"]["total"]


def test_interrupted_overwriting_leaves_nothing_that_looks_complete(
    make_config: MakeConfig, finish: Finish, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(make_config())
    deleted: list[str] = []

    def delete_some(output: Location, name: str) -> None:
        deleted.append(name)
        if name == "features.zarr":
            raise KeyboardInterrupt("in this test")

    with monkeypatch.context() as patch:
        patch.setattr(store.manifests, "delete_result", delete_some)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            fruitdask.run(make_config(output={"overwrite": True}), client=client)
    with pytest.raises(OutputError, match="expected a finished run or exploration, found none"):
        fruitdask.render_report(make_config(report={"enabled": True}))


def test_thumbnails_of_all_images_are_deleted_when_the_exploration_is_complete(
    make_config: MakeConfig, client: Any, sample_folder: Path, tmp_path: Path
) -> None:
    source = copy_images(sample_folder, tmp_path / "in")
    for path in sorted(source.rglob("*.jpg"))[:6]:
        path.write_bytes(b"broken")
    with pytest.raises(TooManyFailuresError, match="images failed"):
        fruitdask.run(make_config(explore=ON, input={"url": str(source)}), client=client)
    assert (tmp_path / "out" / "exploring").exists()
    fruitdask.run(
        make_config(explore=ON, input={"url": str(source)}, featurize={"max_failed_fraction": 0.5}), client=client
    )
    assert not (tmp_path / "out" / "exploring").exists()


def test_manifest_keeps_no_secret_of_a_url(make_config: MakeConfig) -> None:
    config = make_config(input={"url": "https://me:se/cr@t@example.org/fruits?signature=abc"})
    dumped = json.dumps(dump_config(config))
    assert "***@example.org/fruits?***" in dumped and "cr@t" not in dumped and "abc" not in dumped


@pytest.mark.parametrize("key", ["input.url", "output.url"])
def test_run_refuses_folders_that_instances_cannot_reach(make_config: MakeConfig, key: str) -> None:
    other = ({"input", "output"} - {key.removesuffix(".url")}).pop()
    cluster = EC2ClusterConfig(kind="ec2", docker_image="me/fruitdask:1")
    config = make_config(**{other: {"url": "s3://elsewhere/folder"}}).model_copy(update={"cluster": cluster})
    message = f"{key} /.* is on this machine, which the machines of cluster.kind: ec2 cannot read"
    with pytest.raises(ConfigError, match=message):
        fruitdask.run(config)

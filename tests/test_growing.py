"""Outputs whose input changes: only new and changed images are computed, and no existing row moves or is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.decomposition
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies as st
from runs import (
    INTERRUPTIONS,
    ON,
    SIZE,
    Finish,
    MakeConfig,
    break_image,
    compute_colours,
    configure,
    draw,
    run_and_interrupt,
)

import fruitdask
from fruitdask import store
from fruitdask.cli import cli
from fruitdask.core.config import AddressClusterConfig, ModelConfig
from fruitdask.core.storage import Location
from fruitdask.errors import StoreMismatchError, TooManyFailuresError
from fruitdask.pipeline import budget, featurize as featurize_module, run as run_module


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 12 images, which fill two partitions and two rows of a third; tests change copies of it."""
    folder = tmp_path_factory.mktemp("drawn") / "in"
    draw(folder, *(f"{label}/{number}.png" for label in ("apple", "pear") for number in range(0, 12, 2)))
    return folder


@pytest.fixture
def source(drawn: Path, tmp_path: Path) -> Path:
    """Copy of that folder."""
    return Path(shutil.copytree(drawn, tmp_path / "in"))


@pytest.fixture
def make_config(source: Path, tiny_model: ModelConfig, tmp_path: Path) -> MakeConfig:
    """Return a function that configures a run on that folder, with some sections replaced."""
    return lambda **sections: configure(source, tmp_path / "out", tiny_model, **sections)


def read_files(folder: Path, *names: str) -> dict[str, bytes]:
    """Read all files below some folders of an output."""
    files = (path for name in names for path in (folder / name).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check(result: fruitdask.RunResult, source: Path, before: pd.DataFrame | None = None) -> None:
    """Check that each image has its features, that vanished ones are missing, and that no row has moved."""
    table, features = result.table, result.features.compute()
    paths = list(table["path"])
    expected = compute_colours(source, paths)
    np.testing.assert_allclose(features, expected, rtol=1e-6)
    assert list(table["status"]) == ["missing" if np.isnan(row).any() else "ok" for row in expected]
    present = {str(path.relative_to(source)) for path in source.rglob("*.png")}
    assert present <= set(paths) and len(set(paths)) == len(paths) == result.manifest["n_images"]
    assert result.manifest["counts"]["vanished"] == len(paths) - len(present)
    np.testing.assert_allclose(
        result.pca.transform(expected), table.filter(like="pca_"), rtol=1e-4, atol=1e-3, equal_nan=True
    )
    if before is not None:
        assert paths[: len(before)] == list(before["path"])
        assert paths[len(before) :] == sorted(paths[len(before) :])


@pytest.mark.slow
def test_one_more_image_is_one_more_row(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, tmp_path: Path
) -> None:
    first = finish(make_config())
    table, files = first.table, read_files(tmp_path / "out", "features.zarr/features/c", "partitions")
    # Its path sorts before all others, but its row comes after them.
    draw(source, "ananas/0.png")
    result = fruitdask.run(make_config(), client=client)
    assert result.n_computed == 1
    assert result.changes == {"added": 1, "changed": 0, "vanished": 0, "retried": 0, "kept": 12}
    check(result, source, table)
    after = read_files(tmp_path / "out", "features.zarr/features/c", "partitions")
    assert {name for name in files if files[name] != after[name]} == {
        "features.zarr/features/c/2/0",
        "partitions/00002.parquet",
    }
    assert files.keys() == after.keys()
    group = store.open_store(result.output)
    assert group is not None and group.attrs["class_names"] == ["ananas", "apple", "pear"]
    (entry,) = result.manifest["history"]
    assert entry == {"at": result.manifest["started"], **result.changes}


@pytest.mark.slow
def test_many_more_images_fill_the_last_partition_and_make_new_ones(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, tmp_path: Path
) -> None:
    before = finish(make_config()).table
    files = read_files(tmp_path / "out", "features.zarr/features/c", "partitions")
    draw(source, *(f"quince/{number}.png" for number in range(11)), "apple/1.png")
    result = fruitdask.run(make_config(), client=client)
    assert result.n_computed == 12 and result.features.shape == (24, 6)
    check(result, source, before)
    after = read_files(tmp_path / "out", "features.zarr/features/c", "partitions")
    assert {name for name in after if files.get(name) != after[name]} == {
        f"{folder}/{index}"
        for number in (2, 3, 4)
        for folder, index in (("features.zarr/features/c", f"{number}/0"), ("partitions", f"{number:05d}.parquet"))
    }
    fresh = fruitdask.run(make_config(output={"url": str(tmp_path / "fresh")}), client=client)
    order = fresh.table["path"].argsort().argsort()
    assert list(order) == list(range(24))
    by_path = np.argsort(result.table["path"].to_numpy())
    np.testing.assert_array_equal(result.features.compute()[by_path], fresh.features.compute())


@pytest.mark.slow
def test_changed_image_is_computed_again_and_its_neighbours_are_kept(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, tmp_path: Path
) -> None:
    first = finish(make_config())
    before, features = first.table, first.features.compute()
    # Values that the network does not compute show what was kept.
    group: Any = store.open_store(first.output)
    marked = features[:SIZE] * np.float32(1.0000001)
    (outcomes,) = store.read_outcomes(first.output, [0], columns=(*store.OUTCOME_COLUMNS, *store.VERSION_COLUMNS))
    store.write_partition(first.output, index=0, start=0, features=marked, outcomes=outcomes)
    draw(source, "apple/4.png", seed=1)
    result = fruitdask.run(make_config(), client=client)
    assert result.n_computed == result.changes["changed"] == 1 and list(result.table["path"]) == list(before["path"])
    row, now = list(before["path"]).index("apple/4.png"), np.asarray(store.open_store(result.output)["features"][:])
    others = np.arange(12) != row
    np.testing.assert_array_equal(now[others], np.concatenate([marked, features[SIZE:]])[others])
    np.testing.assert_allclose(now[row], compute_colours(source, ["apple/4.png"])[0], rtol=1e-6)
    assert group["features"].shape == (12, 6)


def test_an_exploration_of_earlier_images_says_nothing_about_new_ones(
    make_config: MakeConfig, client: Any, source: Path, tmp_path: Path
) -> None:
    shutil.copy(source / "apple/0.png", source / "pear/copy.png")
    first = fruitdask.run(make_config(explore=ON, check=ON), client=client)
    assert first.issues is not None and "copy" in set(first.issues["kind"])
    again = fruitdask.run(make_config(check=ON, reduce={"n_components": 1}), client=client)
    assert again.exploration is not None and again.issues is not None and "copy" in set(again.issues["kind"])
    draw(source, "pear/copy.png", seed=7)
    result = fruitdask.run(make_config(check=ON), client=client)
    assert result.exploration is None and not list((tmp_path / "out").glob("explore*"))
    assert result.issues is not None and "copy" not in set(result.issues["kind"])
    assert fruitdask.verify(tmp_path / "out").is_well


def test_file_of_the_same_age_and_another_size_counts_as_changed(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path
) -> None:
    finish(make_config())
    age = (source / "pear" / "2.png").stat().st_mtime_ns
    draw(source, "pear/2.png", seed=3)
    os.utime(source / "pear" / "2.png", ns=(age, age))
    result = fruitdask.run(make_config(), client=client)
    assert result.changes["changed"] == 1
    check(result, source)


@pytest.mark.slow
def test_vanished_image_is_recorded_and_comes_back(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No failure is allowed, but an image that is no longer in the input is not a failure.
    config = make_config(featurize={"max_failed_fraction": 0, "images_per_partition": SIZE})
    before = finish(config).table
    (source / "pear" / "2.png").rename(tmp_path / "aside.png")
    result = fruitdask.run(config, client=client)
    assert result.n_computed == 0 and result.changes["vanished"] == 1
    check(result, source, before)
    failures = pd.read_csv(tmp_path / "out" / "failures.csv")
    assert (
        list(failures["path"]) == ["pear/2.png"] and failures["error"][0] == "the input no longer contains this image"
    )
    with monkeypatch.context() as patch:
        patch.setattr(budget, "open_client", lambda config: pytest.fail("a cluster was started"))
        assert fruitdask.run(config).changes == fruitdask.run(config, retry_failed=True).changes == {}
    # Its age and size are the same as before.
    (tmp_path / "aside.png").rename(source / "pear" / "2.png")
    back = fruitdask.run(config, client=client)
    assert back.n_computed == back.changes["added"] == 1 and not (tmp_path / "out" / "failures.csv").exists()
    check(back, source, before)
    assert [entry["vanished"] for entry in back.manifest["history"]] == [1, 0]


def test_vanished_images_alone_need_neither_cluster_nor_network(
    make_config: MakeConfig,
    finish: Finish,
    source: Path,
    tmp_path: Path,
    user_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = finish(make_config())
    assert (user_cache / "fruitdask" / "models").exists()
    (source / "apple" / "0.png").unlink()
    (source / "pear" / "8.png").unlink()
    # Checking limits would need a network, which would then be in this cache.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    nobody = AddressClusterConfig(kind="address", address="tcp://127.0.0.1:9", timeout_seconds=0.5)
    config = make_config(limits={"max_hours": 1}).model_copy(update={"cluster": nobody})
    result = fruitdask.run(config)
    assert not (tmp_path / "cache").exists()
    assert result.changes == {"added": 0, "changed": 0, "vanished": 2, "retried": 0, "kept": 10}
    check(result, source, first.table)
    # The manifest still says how the features were computed.
    for name in ("model", "cluster", "versions", "n_computed"):
        assert result.manifest[name] == first.manifest[name]
    assert result.manifest["seconds"]["featurize"] == first.manifest["seconds"]["featurize"]
    assert result.manifest["processing"]["in_transit"] == "one machine"
    assert fruitdask.verify(tmp_path / "out").faults == () and fruitdask.run(config).changes == {}


@pytest.mark.slow
def test_vanished_images_of_many_partitions_are_recorded_one_by_one(
    make_config: MakeConfig, client: Any, source: Path, tmp_path: Path
) -> None:
    draw(source, *(f"quince/{number}.png" for number in range(36)))
    before = fruitdask.run(make_config(featurize={"images_per_partition": 1}), client=client).table
    files = read_files(tmp_path / "out", "features.zarr/features/c", "partitions")
    for number in range(0, 36, 2):
        (source / "quince" / f"{number}.png").unlink()
    result = fruitdask.run(make_config(featurize={"images_per_partition": 1}))
    assert result.changes["vanished"] == 18 and result.n_computed == 0
    check(result, source, before)
    after = read_files(tmp_path / "out", "partitions")
    assert sum(files[name] != data for name, data in after.items()) == 18


def test_excluded_image_is_not_read(make_config: MakeConfig, finish: Finish, client: Any, source: Path) -> None:
    finish(make_config())
    result = fruitdask.run(make_config(input={"url": str(source), "exclude": ["pear/2.png"]}), client=client)
    assert result.table.set_index("path").loc["pear/2.png", "status"] == "missing"
    assert result.manifest["counts"]["by_status"] == {"ok": 11, "missing": 1}


def test_renamed_class_is_new_and_the_old_one_missing(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path
) -> None:
    before = finish(make_config()).table
    (source / "pear").rename(source / "quince")
    result = fruitdask.run(make_config(quality={"enabled": True}), client=client)
    assert (result.changes["added"], result.changes["vanished"], result.changes["kept"]) == (6, 6, 6)
    check(result, source, before)
    counts = result.manifest["counts"]["by_class"]
    assert counts["pear"] == {"ok": 0, "failed": 6} and counts["quince"] == {"ok": 6, "failed": 0}
    assert result.quality is not None and set(result.quality["silhouette"]["by_class"]) == {"apple", "quince"}


def test_relabelled_image_is_computed_again(make_config: MakeConfig, client: Any, source: Path, tmp_path: Path) -> None:
    listed = pd.DataFrame({"path": sorted(str(path.relative_to(source)) for path in source.rglob("*.png"))})
    listed.assign(label="fruit").to_csv(tmp_path / "list.csv", index=False)
    config = make_config(input={"url": str(source), "manifest": str(tmp_path / "list.csv")})
    fruitdask.run(config, client=client)
    listed.assign(label=["sweet"] + ["fruit"] * 11).to_csv(tmp_path / "list.csv", index=False)
    result = fruitdask.run(config, client=client)
    assert result.changes["changed"] == 1 and list(result.table["label"]) == ["sweet"] + ["fruit"] * 11


def test_rerun_on_a_grown_output_reads_no_catalog(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(make_config())
    draw(source, "ananas/0.png")
    grown = fruitdask.run(make_config(), client=client)
    for name in ("read_catalog", "read_rows", "read_outcomes"):
        monkeypatch.setattr(store, name, lambda *arguments, **settings: pytest.fail("outcomes were read"))
    again = fruitdask.run(make_config())
    assert again.n_computed == 0 and again.changes == {} and again.manifest == grown.manifest


@pytest.mark.parametrize("n_gone", [6, 7])
def test_another_input_is_refused(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, tmp_path: Path, n_gone: int
) -> None:
    finish(make_config())
    before = read_files(tmp_path, "out")
    for path in sorted(source.rglob("*.png"))[:n_gone]:
        path.unlink()
    draw(source, *(f"quince/{number}.png" for number in range(20)))
    if n_gone == 6:
        assert fruitdask.run(make_config(), client=client).changes["kept"] == 6
        return
    with pytest.raises(StoreMismatchError, match="only 5 of its 12 images"):
        fruitdask.run(make_config(), client=client)
    assert read_files(tmp_path, "out") == before
    assert fruitdask.run(make_config(output={"overwrite": True}), client=client).changes == {}


def test_store_without_a_catalog_is_refused(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, tmp_path: Path
) -> None:
    finish(make_config())
    (tmp_path / "out" / "catalog.parquet").unlink()
    draw(source, "ananas/0.png")
    with pytest.raises(StoreMismatchError, match="the input had other images"):
        fruitdask.run(make_config(), client=client)
    (source / "ananas" / "0.png").unlink()
    assert fruitdask.run(make_config(), client=client).n_computed == 0
    (tmp_path / "out" / "partitions" / "00001.parquet").unlink()
    assert fruitdask.run(make_config(), client=client).n_computed == SIZE


def test_retry_failed_computes_only_failed_images(
    make_config: MakeConfig, client: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = break_image(source / "apple" / "2.png")
    break_image(source / "pear" / "8.png")
    config = make_config(featurize={"max_failed_fraction": 0.2, "images_per_partition": SIZE})
    first = fruitdask.run(config, client=client)
    before, features = first.table, first.features.compute()
    assert list(before["status"][before["status"] != "ok"]) == ["unreadable"] * 2
    assert fruitdask.run(config).n_computed == 0
    mend()
    result = fruitdask.run(config, retry_failed=True, client=client)
    assert result.n_computed == 2 and result.changes["retried"] == 2 and result.changes["kept"] == 10
    table = result.table.set_index("path")
    assert table.loc["apple/2.png", "status"] == "ok" and table.loc["pear/8.png", "status"] == "unreadable"
    was_ok = (before["status"] == "ok").to_numpy()
    np.testing.assert_array_equal(result.features.compute()[was_ok], features[was_ok])
    outcomes = pd.concat(store.read_outcomes(result.output, [0, 1, 2])).set_index("path")["attempts"]
    assert (
        outcomes["apple/2.png"] == outcomes["pear/8.png"] == 2
        and outcomes.drop(["apple/2.png", "pear/8.png"]).eq(1).all()
    )
    assert result.manifest["history"][-1]["retried"] == 2
    # Images that have failed again still count.
    with pytest.raises(TooManyFailuresError, match="1 of 12 images failed"):
        fruitdask.run(make_config(featurize={"max_failed_fraction": 0}), client=client)
    (source / "pear" / "8.png").unlink()
    fruitdask.run(config, client=client)
    monkeypatch.setattr(budget, "open_client", lambda config: pytest.fail("a cluster was started"))
    assert fruitdask.run(config, retry_failed=True).changes == {}


@pytest.mark.slow
def test_attempts_accumulate_where_all_images_of_a_partition_have_failed(
    make_config: MakeConfig, client: Any, source: Path, tmp_path: Path
) -> None:
    for number in (8, 6):
        break_image(source / "pear" / f"{number}.png")
    config = make_config(featurize={"max_failed_fraction": 0.2})
    for n_attempts in (1, 2, 3):
        fruitdask.run(config, retry_failed=True, client=client)
        (outcomes,) = store.read_outcomes(Location(str(tmp_path / "out")), [2])
        assert list(outcomes["attempts"]) == [n_attempts] * 2 and set(outcomes["status"]) == {"unreadable"}


def test_repaired_images_are_computed_after_too_many_failures(
    make_config: MakeConfig, client: Any, source: Path
) -> None:
    for number in (0, 2, 4):
        (source / "apple" / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(TooManyFailuresError, match="3 of 12 images failed"):
        fruitdask.run(make_config(featurize={"images_per_partition": 12}), client=client)
    draw(source, *(f"apple/{number}.png" for number in (0, 2, 4)))
    result = fruitdask.run(make_config(), client=client)
    assert result.n_computed == 3
    check(result, source)


@pytest.mark.slow
@pytest.mark.parametrize(("refit", "kept"), [("auto", [True, False, True]), ("always", [False]), ("never", [True] * 2)])
def test_components_are_fitted_again_after_many_changes(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, refit: str, kept: list[bool]
) -> None:
    draw(source, *(f"quince/{number}.png" for number in range(8)))
    config = make_config(reduce={"refit": refit})
    results = [finish(make_config())]
    scores = [results[0].table[["pca_1", "pca_2"]].to_numpy()]
    assert results[0].manifest["pca"]["fit"]["n_images"] == 20 and not results[0].manifest["pca"]["is_kept"]
    # After 20 images: 2 new ones are a tenth, 3 are more; then 3 of 23 have changed, but before the last fit.
    rounds = (["ananas/0.png", "ananas/1.png"], ["ananas/2.png"], ["zucchini/0.png"])
    for names, is_expected in zip(rounds, kept, strict=False):
        components = results[-1].pca.components_
        draw(source, *names)
        results.append(fruitdask.run(config, client=client))
        table = results[-1].table
        scores.append(table[["pca_1", "pca_2"]].to_numpy())
        assert results[-1].manifest["pca"]["is_kept"] == is_expected
        check(results[-1], source)
        if is_expected:
            np.testing.assert_array_equal(results[-1].pca.components_, components)
            np.testing.assert_array_equal(scores[-1][: len(scores[-2])], scores[-2])
        else:
            exact = sklearn.decomposition.PCA(2, svd_solver="full")
            expected = exact.fit_transform(results[-1].features.compute().astype(np.float64))
            np.testing.assert_allclose(scores[-1], expected, atol=1e-3)
            assert results[-1].manifest["pca"]["fit"] == {
                "n_images": len(table),
                "n_changed": 0,
                "n_components": 2,
                "solver": "covariance_eigh",
                "seed": 0,
            }
    # The quality covers all images, whether or not components are kept.
    quality = fruitdask.run(make_config(reduce={"refit": refit}, quality={"enabled": True}), client=client).quality
    assert quality is not None and quality["n_images"] == len(table)


def test_another_number_of_components_is_always_fitted(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path
) -> None:
    finish(make_config(reduce={"refit": "never"}))
    draw(source, "ananas/0.png")
    result = fruitdask.run(make_config(reduce={"refit": "never", "n_components": 3}), client=client)
    assert result.pca.n_components_ == 3 and not result.manifest["pca"]["is_kept"]
    check(result, source)


@pytest.mark.slow
def test_interrupted_fit_is_not_kept(
    make_config: MakeConfig, finish: Finish, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt("in this test")

    config = make_config(reduce={"refit": "never"})
    expected = finish(config).table
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_components", interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            fruitdask.run(make_config(reduce={"refit": "never", "n_components": 3}), client=client)
    result = fruitdask.run(config, client=client)
    assert not result.manifest["pca"]["is_kept"]
    pd.testing.assert_frame_equal(result.table, expected)


@pytest.mark.slow
def test_exploration_covers_the_present_images(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, tmp_path: Path
) -> None:
    explored: dict[str, dict[str, Any]] = {"explore": {"enabled": True}}
    with_page = explored | {"report": {"enabled": True}}
    finish(make_config(**explored))
    draw(source, "ananas/0.png", "pear/3.png")
    draw(source, "apple/4.png", seed=1)
    (source / "apple" / "0.png").unlink()
    grown = fruitdask.run(make_config(**with_page), client=client)
    fresh = fruitdask.run(make_config(**explored, output={"url": str(tmp_path / "fresh")}), client=client)
    assert grown.exploration is not None and fresh.exploration is not None
    pd.testing.assert_frame_equal(grown.exploration.images, fresh.exploration.images)
    pd.testing.assert_frame_equal(grown.exploration.classes, fresh.exploration.classes)
    np.testing.assert_array_equal(grown.exploration.thumbnails, fresh.exploration.thumbnails)
    assert "apple/0.png" in grown.report.read() and fruitdask.run(make_config(**with_page)).n_computed == 0
    assert len(fruitdask.explore(make_config(**explored)).images) == 13


@pytest.mark.slow
def test_grown_output_on_s3(
    make_config: MakeConfig, client: Any, source: Path, s3_bucket: tuple[str, dict[str, Any]], s3_client: Any
) -> None:
    bucket, options = s3_bucket
    urls = {name: {"url": f"s3://{bucket}/{place}"} for name, place in (("input", "in"), ("output", "out"))}
    config = make_config(**{name: url | {"storage_options": options} for name, url in urls.items()})

    def upload() -> None:
        for path in source.rglob("*.png"):
            s3_client.upload_file(str(path), bucket, f"in/{path.relative_to(source)}")

    upload()
    before = fruitdask.run(config, client=client).table
    draw(source, *(f"quince/{number}.png" for number in range(5)))
    draw(source, "apple/4.png", seed=1)
    (source / "pear" / "2.png").unlink()
    upload()
    s3_client.delete_object(Bucket=bucket, Key="in/pear/2.png")
    result = fruitdask.run(config, client=client)
    # Files that were uploaded again unchanged have the same ETag.
    assert result.changes == {"added": 5, "changed": 1, "vanished": 1, "retried": 0, "kept": 10}
    check(result, source, before)
    assert fruitdask.run(config).n_computed == 0


def test_erasing_from_a_grown_output(make_config: MakeConfig, finish: Finish, client: Any, source: Path) -> None:
    finish(make_config())
    draw(source, "ananas/0.png", "ananas/1.png")
    (source / "pear" / "2.png").unlink()
    grown = fruitdask.run(make_config(), client=client)
    features, is_kept = grown.features.compute(), ~grown.table["path"].isin(["apple/4.png", "ananas/1.png"]).to_numpy()
    names = grown.table["path"][is_kept]
    erasure = fruitdask.erase(make_config(), ["apple/4.png", "ananas/1.png"])
    assert erasure.result is not None and list(erasure.result.table["path"]) == list(names)
    np.testing.assert_array_equal(erasure.result.features.compute(), features[is_kept])
    catalog = store.read_catalog(erasure.result.output)
    assert catalog is not None and list(catalog["path"]) == list(names)
    assert list(catalog["label"]) == list(erasure.result.table["label"])
    # Their files still exist, so a run would add them again.
    with pytest.raises(StoreMismatchError, match="since 2 images were erased"):
        fruitdask.run(make_config())
    for name in ("apple/4.png", "ananas/1.png"):
        (source / name).unlink()
    assert fruitdask.run(make_config()).n_computed == 0
    # This may be an erased image under another name.
    draw(source, "quince/0.png")
    with pytest.raises(StoreMismatchError, match="since 2 images were erased"):
        fruitdask.run(make_config())


def test_erasing_while_an_output_grows(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt("in this test")

    finish(make_config())
    draw(source, "ananas/0.png")
    draw(source, "apple/4.png", seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(featurize_module, "map_partitions", interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            fruitdask.run(make_config(), client=client)
    erasure = fruitdask.erase(make_config(), ["pear/10.png"], client=client)
    (source / "pear" / "10.png").unlink()
    result = erasure.result or fruitdask.run(make_config(), client=client)
    assert erasure.n_erased == 1 and erasure.n_images == 13
    check(result, source)


@pytest.mark.slow
def test_command_says_what_has_changed(make_config: MakeConfig, finish: Finish, source: Path, tmp_path: Path) -> None:
    finish(make_config())
    break_image(source / "pear" / "2.png")
    draw(source, "ananas/0.png")
    (source / "apple" / "0.png").unlink()
    config = make_config(featurize={"max_failed_fraction": 0.5})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "out" / "partitions" / "00001.parquet").unlink()
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "config.json")])
    assert done.exit_code == 0, done.output
    assert "Since the last run: 1 new, 1 vanished, 11 kept." in done.stderr
    assert "since the last run  1 new, 1 vanished, 11 kept" in done.stdout
    assert "11 ok, 2 failed, 1 of them no longer in the input" in done.stdout and "as fitted to" not in done.stdout
    again = CliRunner().invoke(
        cli, ["run", str(tmp_path / "config.json"), "--retry-failed", "--set", "reduce.refit=never"]
    )
    assert again.exit_code == 0, again.output
    assert "since the last run  1 retried, 11 kept" in again.stdout and "as fitted to 11 images" in again.stdout


#: Numbers of images that a step of a history adds, changes and removes.
_STEPS = st.tuples(st.integers(0, 7), st.integers(0, 2), st.integers(0, 2))


@pytest.mark.slow
@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(
    rounds=st.lists(st.tuples(_STEPS, st.sampled_from(["", *INTERRUPTIONS]), _STEPS), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_any_history_ends_like_a_run_on_the_present_images(
    tmp_path_factory: pytest.TempPathFactory,
    client: Any,
    tiny_model: ModelConfig,
    rounds: list[tuple[tuple[int, int, int], str, tuple[int, int, int]]],
    seed: int,
) -> None:
    folder, random = tmp_path_factory.mktemp("history"), np.random.default_rng(seed)
    source = folder / "in"
    config = configure(source, folder / "out", tiny_model)
    draw(source, *(f"apple/{number:03d}.png" for number in range(10)))
    before = fruitdask.run(config, client=client).table
    for first, interruption, second in rounds:
        change(source, random, *first)
        if interruption:
            run_and_interrupt(config, client, interruption)
        change(source, random, *second)
        result = fruitdask.run(config, client=client)
        check(result, source, before if not interruption else None)
        assert list(result.table["path"])[: len(before)] == list(before["path"])
        before = result.table


def change(source: Path, random: np.random.Generator, n_added: int, n_changed: int, n_removed: int) -> None:
    """Add, change and remove images, but keep most of the present ones; a removed image may be added again."""
    present = sorted(str(path.relative_to(source)) for path in source.rglob("*.png"))
    chosen = list(random.permutation(present))
    for path in chosen[: n_removed if len(present) > 9 else 0]:
        (source / path).unlink()
    draw(source, *chosen[2 : 2 + n_changed], seed=int(random.integers(1, 2**16)))
    names = {f"{random.choice(['ananas', 'apple', 'quince'])}/{random.integers(0, 20):03d}.png" for _ in range(n_added)}
    draw(source, *(name for name in names if not (source / name).exists()))


#: Grows copies of an output in processes that are killed after a ninth, two ninths ... of their changes of files. The
#: next run completes whatever they leave.
_KILLED = """
import contextlib, itertools, json, os, shutil, signal, sys
from pathlib import Path
# Everything that a run imports, once for all children.
import distributed, fruitdask.analysis.pca, fruitdask.pipeline.run, fruitdask.worker.featurize, pyarrow.dataset, zarr
import fruitdask
with contextlib.suppress(ImportError):
    import openvino

config = fruitdask.load_config(sys.argv[1])
base, out = Path(sys.argv[2]), Path(config.output.url)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def call(function):
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run():
    # The worker is a thread of this process, so that it dies with it.
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        result = fruitdask.run(config, client=client)
    seen = [result.features.compute().tolist(), result.table.drop(columns=["pca_1", "pca_2"]).values.tolist()]
    seen += [result.manifest["counts"], [{**entry, "at": ""} for entry in result.manifest["history"]]]
    Path(sys.argv[2] + ".json").write_text(json.dumps(seen))


def run_and_die(last):
    steps = itertools.count(1)

    def count(event, arguments):
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or is_write) and str(arguments[0]).startswith(str(out)) and next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    run()
    Path(sys.argv[2] + ".steps").write_text(str(next(steps) - 1))


def grow(last):
    shutil.rmtree(out)
    shutil.copytree(base, out)
    code = call(lambda: run_and_die(last))
    if last:
        assert code == -signal.SIGKILL, (code, last)
        code = call(run)
    assert code == 0
    return json.loads(Path(sys.argv[2] + ".json").read_text())


expected = grow(0)
n_steps = int(Path(sys.argv[2] + ".steps").read_text())
for part in range(1, 9):
    seen = grow(part * n_steps // 9)
    assert json.dumps(seen) == json.dumps(expected), (part, n_steps, seen, expected)
"""


@pytest.mark.slow
def test_killed_at_any_step_the_next_run_completes_it(
    make_config: MakeConfig, finish: Finish, source: Path, tmp_path: Path
) -> None:
    before = finish(make_config()).table
    shutil.copytree(tmp_path / "out", tmp_path / "base")
    draw(source, *(f"quince/{number}.png" for number in range(5)))
    draw(source, "apple/4.png", seed=1)
    (source / "pear" / "2.png").unlink()
    (tmp_path / "config.json").write_text(make_config().model_dump_json())
    command = [str(tmp_path / "config.json"), str(tmp_path / "base")]
    done = subprocess.run([sys.executable, "-c", _KILLED, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    features, table, counts, history = json.loads((tmp_path / "base.json").read_text())
    np.testing.assert_allclose(features, compute_colours(source, [row[0] for row in table]), rtol=1e-6)
    assert [row[0] for row in table][:12] == list(before["path"]) and counts["by_status"] == {"ok": 16, "missing": 1}
    assert history == [{"at": "", "added": 5, "changed": 1, "vanished": 1, "retried": 0, "kept": 10}]

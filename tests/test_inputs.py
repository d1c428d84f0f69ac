"""Runs on what an input has besides images: splits, missing files of a table of labels, and files left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from runs import Finish, MakeConfig, compute_colours, configure, draw

import fruitdask
from fruitdask.cli import cli
from fruitdask.core.config import Config, ModelConfig
from fruitdask.core.progress import RunProgress

SPLIT_RULE = "^(train|test)/"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 images of two classes, each in train and test; to be copied, not changed."""
    names = (f"{split}/{label}/{n}.png" for split in ("train", "test") for label in ("apple", "pear") for n in range(3))
    folder = tmp_path_factory.mktemp("drawn") / "in"
    draw(folder, *names)
    return folder


@pytest.fixture
def source(drawn: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(drawn, tmp_path / "in"))


@pytest.fixture
def make_config(source: Path, tiny_model: ModelConfig, tmp_path: Path) -> MakeConfig:
    """Make the configuration of a run on that folder, with a test's settings of the input and other sections."""

    def make(input: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
        return configure(source, tmp_path / "out", tiny_model, input={"url": str(source)} | (input or {}), **sections)

    return make


class Listener(RunProgress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def read_outputs(output: Path) -> dict[str, pd.DataFrame]:
    return {
        "catalog": pd.read_parquet(output / "catalog.parquet"),
        "parquet": pd.read_parquet(output / "results.parquet"),
        "csv": pd.read_csv(output / "results.csv", keep_default_na=False),
    }


def list_features(output: Path) -> dict[str, float]:
    files = [*(output / "features.zarr").rglob("*"), *(output / "partitions").rglob("*")]
    return {str(path): path.stat().st_mtime_ns for path in files if path.is_file() and path.name != "zarr.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["split", "group"])
def test_a_grouping_is_in_all_tables_and_costs_no_feature(
    name: str, make_config: MakeConfig, finish: Finish, client: Any, tmp_path: Path
) -> None:
    plain = finish(make_config())
    without = plain.table
    assert name not in without and all(name not in table for table in read_outputs(tmp_path / "out").values())
    fingerprint, features = plain.manifest["fingerprint"], list_features(tmp_path / "out")
    for rule, expected in ((SPLIT_RULE, "parent"), ("([0-9])[.]png$", "number"), (None, "")):
        config = make_config({f"{name}_from": rule})
        result = fruitdask.run(config, client=client)
        tables = {"result": result.table} | read_outputs(tmp_path / "out")
        for where, table in tables.items():
            paths = table["path"].str.split("/")
            wanted = {"parent": paths.str[0], "number": paths.str[-1].str[0], "": None}[expected]
            assert name not in table if wanted is None else list(table[name].astype(str)) == list(wanted), where
        assert result.n_computed == 0 and result.manifest["fingerprint"] == fingerprint
        assert list_features(tmp_path / "out") == features
        assert fruitdask.verify(tmp_path / "out").is_well
        before = (tmp_path / "out" / "results.csv").stat().st_mtime_ns
        assert fruitdask.run(config, client=client).n_computed == 0
        assert (tmp_path / "out" / "results.csv").stat().st_mtime_ns == before
        pd.testing.assert_frame_equal(result.table.drop(columns=name, errors="ignore"), without)


@pytest.mark.slow
def test_split_of_images_stays_with_them(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, tmp_path: Path
) -> None:
    config = make_config({"split_from": SPLIT_RULE})
    finish(config)
    (source / "test/pear/1.png").unlink()
    draw(source, "test/apple/0_0.png", "train/quince/0.png")
    result = fruitdask.run(config, client=client)
    assert result.n_computed == 2
    assert list(result.table["split"]) == [path.split("/")[0] for path in result.table["path"]]
    assert result.table["status"].value_counts().to_dict() == {"ok": 13, "missing": 1}
    assert fruitdask.verify(tmp_path / "out").is_well
    erasure = fruitdask.erase(config, ["*/apple/1.png"], client=client)
    assert erasure.result is not None and erasure.n_erased == 2
    table = erasure.result.table
    assert list(table["split"]) == [path.split("/")[0] for path in table["path"]] and len(table) == 12
    assert list(read_outputs(tmp_path / "out")["catalog"]["split"]) == list(table["split"])
    assert fruitdask.verify(tmp_path / "out").is_well


def test_wrong_split_is_a_fault_and_a_lost_catalog_gets_its_splits_back(
    make_config: MakeConfig, finish: Finish, client: Any, tmp_path: Path
) -> None:
    config, catalog = make_config({"split_from": SPLIT_RULE}), tmp_path / "out" / "catalog.parquet"
    finish(config)
    kept = pd.read_parquet(catalog)
    kept.assign(split=kept["split"].iloc[::-1].to_numpy()).to_parquet(catalog, index=False)
    assert "split is not that in catalog.parquet" in {fault.what for fault in fruitdask.verify(tmp_path / "out").faults}
    catalog.unlink()
    assert not fruitdask.verify(tmp_path / "out", repair=True).is_well
    assert fruitdask.run(config, client=client).n_computed == 0
    assert list(pd.read_parquet(catalog)["split"]) == list(kept["split"])
    assert fruitdask.verify(tmp_path / "out").is_well


def test_label_from_changes_classes_and_results_stay_correct(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, tmp_path: Path
) -> None:
    finish(make_config())
    result = fruitdask.run(make_config({"label_from": "first"}), client=client)
    assert list(result.table["label"]) == [path.split("/")[0] for path in result.table["path"]]
    assert result.manifest["counts"]["by_class"].keys() == {"train", "test"}
    np.testing.assert_allclose(
        result.features.compute(), compute_colours(source, list(result.table["path"])), rtol=1e-6
    )
    assert fruitdask.verify(tmp_path / "out").is_well


def test_merged_classes_are_reported_once_per_run(make_config: MakeConfig, client: Any) -> None:
    listener = Listener()
    fruitdask.run(make_config(), client=client, progress=listener)
    notes = [message for message in listener.said if message.startswith("Note: ")]
    assert (
        len(notes) == 1
        and "2 classes come from several folders" in notes[0]
        and "test/apple and train/apple" in notes[0]
    )
    listener = Listener()
    fruitdask.run(make_config({"label_from": "parent"}), client=client, progress=listener)
    assert not [message for message in listener.said if message.startswith("Note: ")]


@pytest.mark.slow
def test_table_of_labels_notices_changed_and_missing_files(
    make_config: MakeConfig, client: Any, source: Path, tmp_path: Path
) -> None:
    paths = [f"./train//{label}/{n}.png" for label in ("apple", "pear") for n in range(3)] + ["./train/apple/gone.png"]
    table = tmp_path / "labels.csv"
    table.write_text("path,label,split\n" + "".join(f"{path},{n % 2},s{n % 3}\n" for n, path in enumerate(paths)))
    config = make_config({"manifest": str(table)}, featurize={"max_failed_fraction": 0.5, "images_per_partition": 5})
    first = fruitdask.run(config, client=client)
    rows = first.table.set_index("path")
    assert rows["status"].drop("train/apple/gone.png").eq("ok").all() and len(rows) == 7
    failures = pd.read_csv(tmp_path / "out" / "failures.csv")
    assert failures[["path", "status", "attempts"]].values.tolist() == [["train/apple/gone.png", "missing", 0]]
    assert failures["error"].tolist() == ["input.manifest lists this file, but input.url does not contain it"]
    assert dict(rows["split"])["train/apple/2.png"] == "s2" and dict(rows["label"])["train/apple/1.png"] == "1"
    assert fruitdask.run(config, client=client).n_computed == 0
    draw(source, "train/apple/1.png", seed=7)
    draw(source, "train/apple/gone.png")
    (source / "train/pear/0.png").unlink()
    result = fruitdask.run(config, client=client)
    expected = compute_colours(source, list(result.table["path"]))
    np.testing.assert_allclose(result.features.compute(), expected, rtol=1e-6)
    assert dict(zip(result.table["path"], result.table["status"]))["train/pear/0.png"] == "missing"
    assert fruitdask.verify(tmp_path / "out").is_well


def test_missing_files_have_no_size(make_config: MakeConfig, client: Any, source: Path, tmp_path: Path) -> None:
    paths = [f"train/apple/{n}.png" for n in range(8)] + ["train/pear/gone.png"]
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(f"{path},{path.split('/')[1]}\n" for path in paths))
    config = make_config({"manifest": str(tmp_path / "labels.csv")}, report={"enabled": True})
    found = fruitdask.explore(config, client=client)
    sizes = [path.stat().st_size for path in (source / "train/apple").iterdir()]
    assert found.classes["n_images"].to_dict() == {"apple": 8, "pear": 1} and found.summary["n_ok"] == 3
    assert found.classes["bytes_total"].to_dict() == {"apple": sum(sizes), "pear": 0}
    assert found.classes.loc["apple", "bytes_median"] == np.median(sizes)
    assert np.isnan(found.classes.loc["pear", "bytes_median"])
    assert "0 B to" not in fruitdask.render_report(config).read()


@pytest.mark.slow
def test_files_left_out_are_reported_everywhere_and_kept_up_to_date(
    make_config: MakeConfig, client: Any, source: Path, tmp_path: Path
) -> None:
    for name in ("train/a.mov", "train/b.mov", ".DS_Store", "test/._1.png"):
        (source / name).write_bytes(b"x")
    config = make_config(explore={"enabled": True}, report={"enabled": True})
    result = fruitdask.run(config, client=client)
    assert result.manifest["left_out"] == {".mov": 2, "hidden": 2}
    assert json.loads((tmp_path / "out" / "explore.json").read_text())["left_out"] == {".mov": 2, "hidden": 2}
    assert "Left out of the folder: 2 .mov, 2 hidden." in " ".join(result.report.read().split())
    (source / "test" / "x.cr2").write_bytes(b"x")
    again = fruitdask.run(config, client=client)
    assert again.n_computed == 0 and again.manifest["left_out"] == {".mov": 2, ".cr2": 1, "hidden": 2}
    assert "Left out of the folder: 2 .mov, 1 .cr2, 2 hidden." in " ".join(again.report.read().split())
    fruitdask.render_report(config)
    assert "1 .cr2" in again.report.read()


@pytest.mark.parametrize("command", ["explore", "run"])
def test_commands_print_the_files_left_out(
    make_config: MakeConfig, source: Path, tmp_path: Path, client: Any, command: str
) -> None:
    (source / "x.mov").write_bytes(b"x")
    config = make_config().model_dump(mode="json", exclude={"cluster"})
    config["cluster"] = {"address": client.scheduler.address}
    (tmp_path / "run.json").write_text(json.dumps(config))
    done = CliRunner().invoke(cli, [command, str(tmp_path / "run.json")])
    assert done.exit_code == 0, done.output
    assert "left out  1 .mov" in done.stdout

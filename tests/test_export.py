"""Exports: what other programs read is what the results say, and nothing half-written remains."""

import json
import shutil
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from runs import OFF, Finish, MakeConfig, break_image, configure, draw

import fruitdask
from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig
from fruitdask.core.storage import Location
from fruitdask.errors import ConfigError, DamageError, FruitdaskError, OutputError
from fruitdask.pipeline import export
from fruitdask.report.exports import FORMATS, Block, write_fiftyone

NAMES = [
    f"{split}/{label}/{number}.png" for split in ("test", "train") for label in ("fig", "kiwi") for number in (1, 2, 3)
]
BROKEN = 4
#: A name that would break lines and columns of TSV.
HOSTILE = "test/fig/a\tb\nc.png"


@pytest.fixture(scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelConfig) -> MakeConfig:
    """Configure runs on thirteen images of two classes and two splits, one of which is broken."""
    folder = tmp_path_factory.mktemp("export")
    draw(folder / "in", *NAMES, HOSTILE)
    break_image(folder / "in" / NAMES[BROKEN])

    def make(name: str, **reduce: object) -> fruitdask.Config:
        return configure(
            folder / "in",
            folder / name,
            tiny_model,
            input={"split_from": "first"},
            featurize={"max_failed_fraction": 0.1},
            reduce=reduce,
        )

    return make


@pytest.fixture(scope="module")
def finished(make_config: MakeConfig, finish: Finish) -> fruitdask.RunResult:
    """A finished run with a t-SNE map, only to read."""
    return finish(make_config("out", n_components=3, tsne={"enabled": True, "perplexity": 3}))


@pytest.fixture
def result(finished: fruitdask.RunResult, monkeypatch: pytest.MonkeyPatch) -> fruitdask.RunResult:
    """The finished run, in which each partition is a block."""
    monkeypatch.setattr(export, "BLOCK_BYTES", 1)
    return finished


@pytest.fixture
def copied(result: fruitdask.RunResult, tmp_path: Path) -> fruitdask.RunResult:
    """A copy of the finished run, to damage."""
    shutil.copytree(result.output.path, tmp_path / "out")
    return fruitdask.open(str(tmp_path / "out"))


def stack(column: pa.ChunkedArray) -> np.ndarray:
    """Stack a column of lists, NaN where it is null."""
    rows = column.to_pylist()
    width = len(next(row for row in rows if row is not None))
    return np.array([[np.nan] * width if row is None else row for row in rows])


def test_parquet_is_one_file_of_all_images(result: fruitdask.RunResult, tmp_path: Path) -> None:
    assert fruitdask.export(result, tmp_path / "new" / "fruits.parquet") == 13
    file = pq.ParquetFile(tmp_path / "new" / "fruits.parquet")
    # A row group per partition.
    assert file.num_row_groups == 3
    table = file.read()
    assert table.schema.field("features").type == pa.list_(pa.float32(), 6)
    pd.testing.assert_frame_equal(
        table.drop_columns("features").to_pandas(), result.table, check_dtype=False, check_exact=True
    )
    np.testing.assert_array_equal(stack(table["features"]), result.features.compute())
    assert table["features"].null_count == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["fruits.parquet"]


def test_embedding_atlas_reads_images_on_the_map(result: fruitdask.RunResult, tmp_path: Path) -> None:
    assert fruitdask.export(str(result.output.url), tmp_path / "atlas.parquet", "embedding-atlas") == 12
    found = pd.read_parquet(tmp_path / "atlas.parquet")
    expected = result.table[result.table["status"] == "ok"]
    assert found["path"].tolist() == expected["path"].tolist()
    np.testing.assert_array_equal(found[["projection_x", "projection_y"]], expected[["tsne_1", "tsne_2"]])
    np.testing.assert_array_equal(np.stack(found["features"]), result.X_y()[0])
    assert all(
        Path(file).samefile(Path(result.output.path).parent / "in" / path)
        for file, path in found[["image", "path"]].to_numpy()
    )


@pytest.mark.slow
def test_the_map_shows_components_if_tsne_has_only_a_sample(
    make_config: MakeConfig, finish: Finish, tmp_path: Path
) -> None:
    tsne = {"enabled": True, "perplexity": 3, "max_rows": 11}
    result = finish(make_config("sampled", n_components=2, tsne=tsne))
    assert result.table["tsne_1"].notna().sum() == 11
    assert fruitdask.export(result, tmp_path / "atlas.parquet", "embedding-atlas") == 12
    found = pd.read_parquet(tmp_path / "atlas.parquet")
    np.testing.assert_array_equal(found["projection_x"], result.table["pca_1"].dropna())


def test_only_the_map_needs_two_components(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    result = finish(make_config("stored", **OFF))
    with pytest.raises(OutputError, match="two principal components for a map, found fewer; run it with"):
        fruitdask.export(result, tmp_path / "atlas.parquet", "embedding-atlas")
    assert fruitdask.export(result, tmp_path / "spark", "spark") == 13
    assert pa.dataset.dataset(tmp_path / "spark").schema.names == ["path", "label", "features"]
    assert fruitdask.export(result, tmp_path / "fiftyone", "fiftyone") == 13


def test_spark_is_a_folder_of_plain_lists(result: fruitdask.RunResult, tmp_path: Path) -> None:
    fruitdask.export(result, tmp_path / "spark", "spark")
    assert (tmp_path / "spark" / "_SUCCESS").read_bytes() == b""
    parts = sorted(tmp_path.glob("spark/part-*.snappy.parquet"))
    assert len(parts) == 3 and pq.ParquetFile(parts[0]).metadata.row_group(0).column(0).compression == "SNAPPY"
    # Spark names the nested columns of an array so.
    assert [column.path for column in map(pq.ParquetFile(parts[0]).schema.column, range(4))] == [
        "path",
        "label",
        "features.list.element",
        "pcaFeatures.list.element",
    ]
    table = pa.dataset.dataset(parts).to_table()
    types = [("path", pa.string()), ("label", pa.string()), ("features", pa.list_(pa.field("element", pa.float32())))]
    assert table.schema == pa.schema([*types, ("pcaFeatures", pa.list_(pa.field("element", pa.float64())))])
    assert table["path"].to_pylist() == result.table["path"].tolist()
    np.testing.assert_array_equal(stack(table["features"]), result.features.compute())
    np.testing.assert_array_equal(stack(table["pcaFeatures"]), result.table[["pca_1", "pca_2", "pca_3"]])


def test_tensorboard_files_have_a_line_per_image(result: fruitdask.RunResult, tmp_path: Path) -> None:
    assert fruitdask.export(result, tmp_path / "log", "tensorboard") == 12
    features = np.loadtxt(tmp_path / "log" / "features.tsv", np.float32, delimiter="\t")
    np.testing.assert_array_equal(features, result.X_y()[0])
    lines = [
        line.split("\t") for line in (tmp_path / "log" / "metadata.tsv").read_text().removesuffix("\n").split("\n")
    ]
    assert lines[0] == ["path", "label", "status", "split"] and len(lines) == 13 and {*map(len, lines)} == {4}
    assert ["test/fig/a\\tb\\nc.png", "fig", "ok", "test"] in lines


def test_the_projector_of_tensorboard_serves_it(result: fruitdask.RunResult, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
    from werkzeug.test import Client

    class NoRuns:
        def list_runs(self, *arguments: Any, **settings: Any) -> list[Any]:
            return []

    fruitdask.export(result, tmp_path / "log", "tensorboard")
    plugin = ProjectorPlugin(TBContext(logdir=str(tmp_path / "log"), data_provider=NoRuns()))
    apps = plugin.get_plugin_apps()
    info = Client(apps["/info"]).get("/info?run=.").get_json()
    assert info["embeddings"] == [
        {
            "tensorName": "features",
            "tensorPath": "features.tsv",
            "metadataPath": "metadata.tsv",
            "tensorShape": [12, 6],
        }
    ]
    tensor = Client(apps["/tensor"]).get("/tensor?run=.&name=features").data
    np.testing.assert_array_equal(np.frombuffer(tensor, np.float32).reshape(12, 6), result.X_y()[0])
    metadata = Client(apps["/metadata"]).get("/metadata?run=.&name=features").data
    assert metadata == (tmp_path / "log" / "metadata.tsv").read_bytes()


def test_fiftyone_samples_name_files_labels_and_features(result: fruitdask.RunResult, tmp_path: Path) -> None:
    assert fruitdask.export(result, tmp_path / "fiftyone", "fiftyone") == 13
    samples = json.loads((tmp_path / "fiftyone" / "samples.json").read_text())["samples"]
    table, features = result.table, result.features.compute()
    folder = Path(result.output.path).parent / "in"
    assert [sample["path"] for sample in samples] == table["path"].tolist()
    for row, sample in enumerate(samples):
        assert Path(sample["filepath"]).samefile(folder / sample["path"])
        assert sample["ground_truth"] == {"_cls": "Classification", "tags": [], "label": table["label"][row]}
        assert sample["tags"] == [table["split"][row]]
        is_ok = sample["status"] == "ok"
        assert is_ok == ("features" in sample) == ("pca" in sample) == ("tsne" in sample)
        if is_ok:
            assert sample["features"] == features[row].tolist()
            assert sample["tsne"] == table.loc[row, ["tsne_1", "tsne_2"]].tolist()
    assert sum("features" not in sample for sample in samples) == 1


def test_fiftyone_names_images_elsewhere_by_their_path(tmp_path: Path) -> None:
    block = draw_block(0)
    block.files[:] = ["s3://bucket/0/0.png", "/disk/0/1.png"]
    write_fiftyone([block], Location(str(tmp_path / "new")))
    samples = json.loads((tmp_path / "new" / "samples.json").read_text())["samples"]
    assert [sample["filepath"] for sample in samples] == ["0/0.png", "/disk/0/1.png"]


def test_lance_round_trip(result: fruitdask.RunResult, tmp_path: Path) -> None:
    lance = pytest.importorskip("lance", reason="needs pylance")
    assert fruitdask.export(result, tmp_path / "fruits.lance", "lance") == 13
    table = lance.dataset(str(tmp_path / "fruits.lance")).to_table()
    fruitdask.export(result, tmp_path / "fruits.parquet")
    assert table.equals(pq.read_table(tmp_path / "fruits.parquet"))
    assert fruitdask.export(result, tmp_path / "fruits.lance", "lance", overwrite=True) == 13


def test_lance_says_what_to_install(
    result: fruitdask.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(FruitdaskError, match="^the format lance needs pylance; .* pip install pylance$"):
        fruitdask.export(result, tmp_path / "fruits.lance", "lance")


def draw_block(number: int) -> Block:
    """Draw the results of two images."""
    table = pd.DataFrame({"path": [f"{number}/{row}.png" for row in range(2)], "label": "fig", "status": "ok"})
    table = table.assign(pca_1=np.float32(number), pca_2=np.float32(1))
    files = [f"/in/{path}" for path in table["path"]]
    return Block(table, np.full((2, 4), number, np.float32), files, ("pca_1", "pca_2"))


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "lance"])
def test_writers_hold_one_block_at_a_time(to: str, tmp_path: Path) -> None:
    seen: list[weakref.ref[Block]] = []

    def draw_blocks() -> Iterator[Block]:
        for number in range(8):
            # A loop of the writer still refers to the previous block.
            assert sum(each() is not None for each in seen) <= 1
            block = draw_block(number)
            seen.append(weakref.ref(block))
            yield block
            del block

    FORMATS[to].write(draw_blocks(), Location(str(tmp_path / "new")))
    assert len(seen) == 8


@pytest.mark.parametrize("to", FORMATS)
def test_failed_export_leaves_nothing(to: str, copied: fruitdask.RunResult, tmp_path: Path) -> None:
    if to == "lance":
        pytest.importorskip("lance", reason="needs pylance")
    chunk = tmp_path / "out" / "features.zarr" / "features" / "c" / "1" / "0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-9])
    with pytest.raises(DamageError, match="features is damaged|features/c/1/0 is damaged"):
        fruitdask.export(copied, tmp_path / "place" / "new", to)
    chunk.write_bytes(data)
    (part,) = (tmp_path / "out" / "results.parquet").iterdir()
    pd.read_parquet(part)[:8].to_parquet(part)
    with pytest.raises(DamageError, match="results.parquet is damaged .expected 13 images, found 8"):
        fruitdask.export(copied, tmp_path / "place" / "new", to)
    assert list((tmp_path / "place").iterdir()) == []


def test_targets_that_exist_are_replaced_on_demand_only(result: fruitdask.RunResult, tmp_path: Path) -> None:
    for to, name in (("parquet", "fruits.parquet"), ("spark", "spark")):
        fruitdask.export(result, tmp_path / name, to)
        with pytest.raises(OutputError, match=f"{name}: expected a new place, found one that exists"):
            fruitdask.export(result, tmp_path / name, to)
        assert fruitdask.export(result, tmp_path / name, to, overwrite=True) == 13
    assert len(list((tmp_path / "spark").iterdir())) == 4
    draw(tmp_path / "in", "test/1.png")
    (tmp_path / "spark" / "thesis.txt").write_text("do not lose")
    for target, to, found in (
        ("spark", "spark", "thesis.txt"),
        ("in", "tensorboard", "test"),
        ("spark", "parquet", "_SUCCESS"),
        ("fruits.parquet", "fiftyone", "a file"),
    ):
        with pytest.raises(OutputError, match=f"{target}: expected an earlier export .*, found {found}; "):
            fruitdask.export(result, tmp_path / target, to, overwrite=True)
    assert (tmp_path / "spark" / "thesis.txt").exists()


def test_places_and_formats_are_checked_first(result: fruitdask.RunResult, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^to: expected parquet, .*, lance or spark, found excel$"):
        fruitdask.export(result, tmp_path / "x", "excel")
    with pytest.raises(ConfigError, match="^memory://x: expected a local path for lance, found another"):
        fruitdask.export(result, "memory://x", "lance")
    with pytest.raises(ConfigError, match="lies inside the results"):
        fruitdask.export(result, Path(result.output.path) / "x.parquet")


def test_parquet_and_spark_write_to_s3(
    copied: fruitdask.RunResult, tmp_path: Path, s3_bucket: tuple[str, dict[str, Any]], s3_client: Any
) -> None:
    bucket, options = s3_bucket
    for to, name in (("parquet", "fruits.parquet"), ("spark", "spark")):
        fruitdask.export(copied, f"s3://{bucket}/{name}", to, target_options=options)
        with pytest.raises(OutputError, match="expected a new place"):
            fruitdask.export(copied, f"s3://{bucket}/{name}", to, target_options=options)
        fruitdask.export(copied, f"s3://{bucket}/{name}", to, target_options=options, overwrite=True)
    keys = [each["Key"] for each in s3_client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert len(keys) == 5 and keys[:2] == ["fruits.parquet", "spark/_SUCCESS"]
    found = pq.read_table(pa.BufferReader(s3_client.get_object(Bucket=bucket, Key=keys[0])["Body"].read()))
    fruitdask.export(copied, tmp_path / "fruits.parquet")
    assert found.equals(pq.read_table(tmp_path / "fruits.parquet"))
    (tmp_path / "out" / "features.zarr" / "features" / "c" / "2" / "0").write_bytes(b"x")
    for to in ("parquet", "spark"):
        with pytest.raises(DamageError, match="is damaged"):
            fruitdask.export(copied, f"s3://{bucket}/again", to, target_options=options)
    assert s3_client.list_objects_v2(Bucket=bucket, Prefix="again")["KeyCount"] == 0


def test_command_says_what_it_wrote_and_how_to_open_it(result: fruitdask.RunResult, tmp_path: Path) -> None:
    target = str(tmp_path / "log")
    done = CliRunner().invoke(cli, ["export", result.output.url, target, "--to", "tensorboard"])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        f"Wrote 12 images to {target}",
        f"Open them: tensorboard --logdir {target}, then choose Projector",
    ]
    again = CliRunner().invoke(cli, ["export", result.output.url, target, "--to", "tensorboard"])
    assert again.exit_code == 2 and "found one that exists; choose another, or replace" in again.output

"""Tests of inventories: reports of S3 Inventory and tables of paths and sizes give the images that a listing gives."""

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet
import pytest
from moto.s3.models import S3Backend
from runs import EXTRAS, OFF, compute_colours, draw

import fruitdask
from fruitdask.core.config import InputConfig, ModelConfig
from fruitdask.errors import CatalogError, ConfigError, DamageError, FruitdaskError, StorageError
from fruitdask.store.catalog import list_input

FOLDER = "own set/été +%20&"
NAMES = (
    "plain/a.jpg",
    "a b/+ & %20 %2F = ? # ;.jpg",
    "ü/é 梨 🍎.jpg",
    "a//b.jpg",
    "dots/../up.jpg",
    "back\\slash\ttab 'quote\" [1]*.jpg",
    "marker/",
    "image.jpg/",
    "plain/clip.mov",
    ".hidden/1.jpg",
)
#: The fields of a report, as CSV and as Parquet and ORC call them.
FIELDS = {
    "Bucket": "bucket",
    "Key": "key",
    "VersionId": "version_id",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
    "Size": "size",
    "LastModifiedDate": "last_modified_date",
    "ETag": "e_tag",
    "StorageClass": "storage_class",
}
Rows = list[dict[str, Any]]


@dataclass
class Report:
    """A bucket, and a report of S3 Inventory about it in a bucket of its own, made by hand."""

    client: Any
    bucket: str
    options: dict[str, Any]
    target: str = field(init=False)
    url: str = field(init=False)

    def __post_init__(self) -> None:
        self.target = f"{self.bucket}-lists"
        self.client.create_bucket(Bucket=self.target)
        self.url = f"s3://{self.target}/all/{self.bucket}/weekly/2026-11-29T01-00Z/manifest.json"

    def describe(self) -> Rows:
        """Describe all objects of the bucket, as a report does."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        common = {"bucket": self.bucket, "version_id": None, "is_latest": True, "is_delete_marker": False}
        return [
            common
            | {"key": each["Key"], "size": each["Size"], "last_modified_date": each["LastModified"].isoformat()}
            | {"e_tag": each["ETag"].strip('"'), "storage_class": "STANDARD"}
            for page in pages
            for each in page["Contents"]
        ]

    def put(self, kind: str, chunks: Iterable[Rows], *, fields: Iterable[str] = FIELDS, **changes: Any) -> None:
        """Write chunks of rows and the manifest, some of whose entries may be changed."""
        columns, parts = {name: FIELDS[name] for name in fields}, []
        for number, rows in enumerate(chunks):
            data = write_chunk(kind, rows, columns)
            key = f"all/{self.bucket}/weekly/data/{number}.{'csv.gz' if kind == 'CSV' else kind.lower()}"
            self.client.put_object(Bucket=self.target, Key=key, Body=data)
            parts.append({"key": key, "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()})
        schema = ", ".join(columns) if kind == "CSV" else "message s3.inventory { ... }"
        manifest = {
            "sourceBucket": self.bucket,
            "destinationBucket": f"arn:aws:s3:::{self.target}",
            "version": "2016-11-30",
            "creationTimestamp": "1795827600000",
            "fileFormat": kind,
            "fileSchema": schema,
            "files": parts,
        }
        key = self.url.partition(f"{self.target}/")[2]
        self.client.put_object(Bucket=self.target, Key=key, Body=json.dumps(manifest | changes))

    def configure(self, folder: str, **options: Any) -> InputConfig:
        """Configure an input in the bucket."""
        return InputConfig(url=f"s3://{self.bucket}/{folder}", storage_options=self.options, **options)


def write_chunk(kind: str, rows: Rows, columns: dict[str, str]) -> bytes:
    """Write a chunk of a report: CSV has encoded keys, no header, and all values in quotation marks."""
    if kind == "CSV":
        text = io.StringIO()
        writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
        for row in rows:
            values = row | {"key": quote_plus(row["key"], safe="/", errors="surrogateescape")}
            writer.writerow([_spell(values[name]) for name in columns.values()])
        return gzip.compress(text.getvalue().encode())
    types = {"size": pa.int64(), "is_latest": pa.bool_(), "is_delete_marker": pa.bool_()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns.values()])
    table = pa.Table.from_pylist([{name: row[name] for name in columns.values()} for row in rows], schema)
    sink = io.BytesIO()
    (pyarrow.parquet if kind == "Parquet" else pyarrow.orc).write_table(table, sink)
    return sink.getvalue()


def _spell(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.fixture
def report(s3_client: Any, s3_bucket: tuple[str, dict[str, Any]]) -> Report:
    return Report(s3_client, *s3_bucket)


@pytest.mark.parametrize("kind", ["CSV", "Parquet", "ORC"])
def test_list_input_gives_the_same_by_report_as_by_listing(report: Report, kind: str) -> None:
    for key in [*(f"{FOLDER}/{name}" for name in NAMES), f"{FOLDER}2/x.jpg", "other/y.jpg", f"{FOLDER}.jpg"]:
        report.client.put_object(Bucket=report.bucket, Key=key, Body=key.encode())
    rows = report.describe()
    old = rows[0] | {"key": f"{FOLDER}/plain/a.jpg", "is_latest": False, "e_tag": "old"}
    gone = old | {"key": f"{FOLDER}/gone.jpg", "is_latest": True, "is_delete_marker": True, "size": None, "e_tag": None}
    # Chunks are in no order, and one may be empty.
    report.put(kind, [[*rows[5:], old], [], [gone, *rows[:5]]])
    for rule in ({}, {"split_from": "first", "group_from": "parent", "classes": ["ü", "a b", "plain"], "limit": 2}):
        listed, named = (
            list_input(report.configure(FOLDER, hidden=False, inventory=url, **rule)) for url in (None, report.url)
        )
        pd.testing.assert_frame_equal(named.files, listed.files)
        assert (named.left_out, named.notes) == (listed.left_out, listed.notes)
    everything = list_input(report.configure("", inventory=report.url))
    pd.testing.assert_frame_equal(everything.files, list_input(report.configure("")).files)
    assert {f"{FOLDER}/{NAMES[1]}", "other/y.jpg"} < set(everything.files["path"])
    # This server cannot store such a name.
    report.put(kind, [[rows[0] | {"key": "set/line\nbreak/1.jpg"}]])
    assert list(list_input(report.configure("set/", inventory=report.url)).files["path"]) == ["line\nbreak/1.jpg"]


def test_run_by_report_lists_nothing_and_listing_again_changes_nothing(
    report: Report, client: Any, tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{label}/{number}.png" for label in ("apple", "pear") for number in range(4)]
    draw(tmp_path / "in", *names)
    for name in names:
        report.client.put_object(Bucket=report.bucket, Key=f"set/{name}", Body=(tmp_path / "in" / name).read_bytes())
    rows = report.describe()
    report.put("CSV", [rows[3:], [*rows[:3], rows[0] | {"key": "set/pear/gone.png"}]])
    listed: list[str] = []
    for name in ("list_objects", "list_object_versions"):
        monkeypatch.setattr(S3Backend, name, _note(getattr(S3Backend, name), listed))
    config = fruitdask.load_config(
        {
            "input": report.configure("set", inventory=report.url).model_dump(include={"url", "inventory"})
            | {"storage_options": report.options},
            "output": {"url": str(tmp_path / "out")},
            "model": tiny_model.model_dump(),
            "featurize": {"images_per_partition": 5, "max_failed_fraction": 0.5},
            "reduce": {"n_components": 2, "tsne": OFF},
            **dict.fromkeys(EXTRAS, OFF),
        }
    )
    result = fruitdask.run(config, client=client)
    assert (result.n_computed, listed) == (9, [])
    status = result.table.set_index("path")["status"]
    assert status[status != "ok"].to_dict() == {"pear/gone.png": "missing"}
    np.testing.assert_allclose(
        result.features.compute(), compute_colours(tmp_path / "in", list(result.table["path"])), rtol=1e-6
    )
    by_listing = config.model_copy(update={"input": config.input.model_copy(update={"inventory": None})})
    assert fruitdask.run(by_listing, client=client).n_computed == 0
    assert listed == [report.bucket]
    estimate = fruitdask.plan(config)
    assert "the images are those of input.inventory, so input.url is not listed" in estimate.assumptions
    assert listed == [report.bucket]


def _note(method: Callable[..., Any], noted: list[str]) -> Callable[..., Any]:
    """Wrap a method of the server so that it notes the bucket that is listed."""

    def note(self: S3Backend, bucket: Any, *args: Any, **options: Any) -> Any:
        noted.append(getattr(bucket, "name", bucket))
        return method(self, bucket, *args, **options)

    return note


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sourceBucket": "plums"}, ConfigError, r"expected input\.url in s3://plums, .*; correct input\.url"),
        (
            {"destinationBucket": "arn:aws:s3:::lists"},
            ConfigError,
            r"expected input\.inventory in s3://lists, .* found",
        ),
        ({"files": [{"key": "none.csv.gz", "MD5checksum": "0"}]}, StorageError, r"cannot read s3://.*none\.csv\.gz"),
        ({"files": []}, CatalogError, r"expected files below input\.url s3://\S+ in input\.inventory, found no row"),
        (
            {"files": [{}]},
            ConfigError,
            r"expected manifest\.json of an S3 Inventory.* found other JSON \(KeyError: 'key'",
        ),
        ({"fileSchema": None}, ConfigError, r"found other JSON \('NoneType'.*; correct input\.inventory"),
        ({"fileSchema": "Bucket, Key, Size"}, ConfigError, "found the columns Bucket, Key, Size without version"),
        ({"fileSchema": "Bucket, Key, Size, ETag"}, ConfigError, "Expected 4 columns, got 9"),
    ],
    ids=["source", "destination", "chunk", "no chunk", "no key", "no schema", "no ETag", "other schema"],
)
def test_report_is_refused(report: Report, changes: dict[str, Any], error: type[FruitdaskError], message: str) -> None:
    report.client.put_object(Bucket=report.bucket, Key="set/a.jpg", Body=b"x")
    report.put("CSV", [report.describe()], **changes)
    with pytest.raises(error, match=message):
        list_input(report.configure("set", inventory=report.url))


def test_report_with_a_damaged_chunk_is_refused(report: Report) -> None:
    report.client.put_object(Bucket=report.bucket, Key="set/a.jpg", Body=b"x")
    report.put("CSV", [report.describe()])
    config = report.configure("set", inventory=report.url)
    key = f"all/{report.bucket}/weekly/data/0.csv.gz"
    report.client.put_object(Bucket=report.target, Key=key, Body=b"\x1f\x8bother")
    with pytest.raises(DamageError, match=r"0\.csv\.gz: expected the MD5 \w{32} of .*; name the manifest\.json of ano"):
        list_input(config)


def test_report_with_a_name_that_is_not_utf_8_is_refused(report: Report) -> None:
    report.client.put_object(Bucket=report.bucket, Key="set/a.jpg", Body=b"x")
    report.put("CSV", [[report.describe()[0] | {"key": "set/\udcff.jpg"}]])
    with pytest.raises(CatalogError, match="expected names in UTF-8; rename that file"):
        list_input(report.configure("set", inventory=report.url))


def test_report_on_this_machine_is_refused(report: Report, tmp_path: Path) -> None:
    manifest = {"sourceBucket": report.bucket, "destinationBucket": "lists", "fileFormat": "CSV", "fileSchema": "Key"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"files": []}))
    with pytest.raises(ConfigError, match=r"expected input\.inventory in s3://lists, .* found /.*manifest\.json; cor"):
        list_input(report.configure("set", inventory=str(tmp_path / "manifest.json")))


PATHS = ["b/2.jpg", "a/1.JPG", "./a/ü\n'x',1.jpg", "a/.x.jpg", "a/clip.mov", "a/", "s3://elsewhere/3.jpg", "/4.jpg"]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "semicolons.csv", "bom.csv"])
def test_list_input_by_table(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    paths = [*PATHS, f"{tmp_path}/in/c/5.jpg"]
    table = pd.DataFrame({"other": "x", " Path": paths, "Size": range(len(paths)), "e_tag": [f'"{p}"' for p in paths]})
    if name.endswith("parquet"):
        table.astype({" Path": "category"}).to_parquet(tmp_path / name)
    else:
        separator, encoding = (";" if name.startswith("semi") else ","), "utf-8-sig" if name == "bom.csv" else "utf-8"
        table.to_csv(tmp_path / name, index=False, sep=separator, encoding=encoding, lineterminator="\r\n")
    listing = list_input(InputConfig(url=str(tmp_path / "in"), inventory=str(tmp_path / name)))
    files = listing.files.set_index("path")
    assert files["bytes"].to_dict() == {"a/1.JPG": 1, "a/ü\n'x',1.jpg": 2, "b/2.jpg": 0, "c/5.jpg": 8}
    assert files["label"].to_dict()["c/5.jpg"] == "c" and files["version"].nunique() == 4
    assert listing.left_out == {".mov": 1, "hidden": 1}


def test_list_input_by_table_joins_labels_and_versions_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "t.csv").write_text("path,bytes\nx/1.jpg,5\nx/2.jpg,6\nx/3.jpg,7\n")
    (tmp_path / "labels.csv").write_text("path,label\nx/2.jpg,pear\nx/1.jpg,apple\ngone.jpg,apple\n")
    options = {"url": str(tmp_path / "in"), "inventory": str(tmp_path / "t.csv")}
    files = list_input(InputConfig(**options, manifest=str(tmp_path / "labels.csv"))).files
    assert files[["path", "label", "bytes"]].values.tolist() == [
        ["gone.jpg", "apple", 0],
        ["x/1.jpg", "apple", 5],
        ["x/2.jpg", "pear", 6],
    ]
    assert list_input(InputConfig(**options)).files["version"].nunique() == 1


ZIPPED = gzip.compress(b"path,bytes\n" + b"".join(b"%d.jpg,1\n" % number**7 for number in range(3_000)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "found the columns none without path and bytes; correct it or write it again"),
        (b"path,bytes\n", r"expected files below input\.url \S+ in input\.inventory, found no row"),
        (b"path,label\na.jpg,1\n", "found the columns path, label without bytes; correct it"),
        (b"s3://lists/data/0.csv.gz\n", r"expected manifest\.json of an S3 Inventory, .* without path and bytes"),
        (b"path,bytes\na.jpg,\n", r"found 'a\.jpg' of unknown size; correct or remove that row"),
        (b"path,bytes\na.jpg,-1\n", r"found 'a\.jpg' of -1 bytes; correct or remove that row"),
        (b"path,bytes\n,1\n", "expected a path and its size in each row .* found '' of 1 bytes"),
        (b"path,bytes\na.jpg,1.5\n", r"Row #1: CSV conversion error to int64: invalid value '1\.5'; correct it"),
        (b"path,bytes\na.jpg,1,2\n", r"Row #1: Expected 2 columns, got 3: a\.jpg,1,2; correct it"),
        (b"path,bytes\n\xff.jpg,1\n", "invalid UTF8 data; correct it"),
        (b"path,bytes\nb.jpg,1\na.jpg,1\nb.jpg,2\n", r"expected each path once .* found 'b\.jpg' twice; remove one"),
        (b"path,bytes\na/../../b.jpg,1\n", r"expected paths inside input\.url, found 'a/\.\./\.\./b\.jpg'; write it"),
        (b"path,bytes\ns3://x/a.jpg,1\n", r"found none; the first path is 's3://x/a\.jpg'; correct input\.url or"),
        (b"path,bytes\na.mov,1\n", r"expected images .* found only 1 \.mov; check input\.url and input\.extensions"),
        (ZIPPED[:-900], "Compressed file ended before the end-of-stream marker was reached; correct it or write it"),
        (ZIPPED[:-8] + b"12345678", "CRC check failed .*; correct it or write it again"),
        (b"PAR1" + b"x" * 100, "Parquet magic bytes not found in footer.*; correct it or write it again"),
        (b"ORC" + b"x" * 100, "expected .* CSV, Parquet or ORC table, in input.inventory, found .*; correct it"),
    ],
    ids=[
        *(
            "nothing",
            "no row",
            "no size",
            "symlink",
            "empty size",
            "negative",
            "no path",
            "fraction",
            "ragged",
            "latin-1",
        ),
        *("twice", "outside", "elsewhere", "videos", "cut gzip", "gzip", "Parquet", "ORC"),
    ],
)
def test_table_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(FruitdaskError, match=message):
        list_input(InputConfig(url=str(tmp_path / "in"), inventory=str(tmp_path / "t.csv")))


def test_inventory_of_an_archive_is_refused() -> None:
    with pytest.raises(ConfigError, match="input: inventory expects a folder in url, found an archive"):
        fruitdask.load_config(
            {"input": {"url": "zip://::/x.zip", "inventory": "/t.csv"}, "output": {"url": "/tmp/out"}}
        )

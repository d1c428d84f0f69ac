"""Tests of the catalog, on real photographs, on odd file names and on a real S3 server."""

import hashlib
import math
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, strategies as st

from fruitdask.core import prefixes
from fruitdask.core.config import InputConfig
from fruitdask.core.partition import VANISHED_BYTES, Partition
from fruitdask.core.s3 import S3
from fruitdask.core.sample import CLASS_NAMES
from fruitdask.core.storage import Location
from fruitdask.errors import CatalogError, ConfigError, StorageError
from fruitdask.store import catalog as catalog_module
from fruitdask.store.catalog import (
    COLUMNS,
    choose_partition_size,
    hash_catalog,
    hash_listing,
    list_images,
    list_input,
    merge_listing,
    sample_evenly,
    split_catalog,
    take_rows,
)

# As published for the Test split of Fruits-360's original-size branch.
PUBLISHED_COUNTS = {
    "apple_hit_1": 234,
    "apple_red_1": 154,
    "apple_red_2": 159,
    "apple_red_3": 140,
    "apple_rotten_1": 159,
}

ODD_NAMES = (
    "top.jpg",
    "apple red/a b.jpg",
    "pomme été/ü 梨.jpg",
    "[1]/x[0-9].jpg",
    "#2/50%25 + ?&*.jpg",
    "a/b/deep.jpg",
    'quote\'s/"x".jpg',
)


def list_folder(folder: Path, **options: Any) -> pd.DataFrame:
    return list_images(InputConfig(url=str(folder), **options))


def fill(folder: Path, *names: str) -> Path:
    """Write small files; each contains its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def write_manifest(path: Path, rows: list[tuple[str, str]]) -> str:
    table = pd.DataFrame(rows, columns=["path", "label"])
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    return str(path)


def digest(version: str) -> int:
    """Shorten an ETag or a time as the catalog does."""
    return int.from_bytes(hashlib.blake2b(version.encode(), digest_size=8).digest(), "little", signed=True)


def count_labels(catalog: pd.DataFrame) -> dict[str, int]:
    return dict(Counter(catalog["label"]))


@pytest.fixture
def table() -> pd.DataFrame:
    """A catalog of three rows."""
    return pd.DataFrame(
        {
            "path": ["a/1.jpg", "a/2.jpg", "b/1.jpg"],
            "label": ["a", "a", "b"],
            "bytes": np.array([10, 20, 30], np.int64),
            "version": ["v1", "v2", "v3"],
        }
    )


@pytest.fixture(scope="module")
def clean_memory() -> Iterator[None]:
    """Empty fsspec's memory file system afterwards, because all tests of a process share it."""
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_list_images_agrees_with_the_published_counts(photographs: Path) -> None:
    assert count_labels(list_folder(photographs)) == PUBLISHED_COUNTS


def test_list_images_describes_every_file_once_and_sorted(photographs: Path) -> None:
    catalog = list_folder(photographs)
    files = sorted(path.relative_to(photographs).as_posix() for path in photographs.rglob("*.jpg"))
    assert list(catalog.columns) == ["path", "label", "bytes", "version"]
    assert list(catalog.index) == list(range(len(files)))
    assert list(catalog["path"]) == files
    assert list(catalog["label"]) == [path.split("/")[0] for path in files]
    assert list(catalog["bytes"]) == [(photographs / path).stat().st_size for path in files]
    assert list(catalog["version"]) == [digest(str((photographs / path).stat().st_mtime_ns)) for path in files]
    assert list(catalog.dtypes.astype(str)) == ["str", "category", "int64", "int64"]


def test_list_images_accepts_extensions_in_any_case(tmp_path: Path) -> None:
    wanted = ["a/1.jpg", "a/2.JPG", "a/3.JpEg", "a/4.PNG", "a/5.webp", "a/6.TIF", "a/7.tiff", "a/8.bmp", "a/9.GIF"]
    wanted += ["a/a.jpe", "a/b.jfif", "a/c.AVIF", "a/d.jp2", "a/e.j2k", "a/f.jpg_large", "a/g.jpg-orig", "a/h.dib"]
    fill(tmp_path, *wanted, "a/notes.txt", "a/jpg", "a/10.jpg.part", "a/xjpg", "a/clip.mp4", "a/i.jpg~", "a/j.svg")
    assert list(list_folder(tmp_path)["path"]) == sorted(wanted)


def test_list_images_lists_the_configured_extensions(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "a/2.JP2", "a/3.png")
    assert list(list_folder(tmp_path, extensions=["jp2", ".Png"])["path"]) == ["a/2.JP2", "a/3.png"]


@pytest.mark.parametrize("end", ["", "/"], ids=["plain", "slash at the end"])
def test_list_images_labels_files_at_the_top_by_the_folder_itself(tmp_path: Path, end: str) -> None:
    folder = fill(tmp_path / "my fruits", "1.jpg", "pear/2.jpg", "red/apple/3.jpg")
    catalog = list_images(InputConfig(url=str(folder) + end))
    assert dict(zip(catalog["path"], catalog["label"])) == {
        "1.jpg": "my fruits",
        "pear/2.jpg": "pear",
        "red/apple/3.jpg": "apple",
    }


def test_list_images_takes_any_name_literally(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos [é] #1 *", *ODD_NAMES)
    catalog = list_folder(folder)
    assert list(catalog["path"]) == sorted(ODD_NAMES)
    assert [(folder / path).read_bytes().decode() for path in catalog["path"]] == list(catalog["path"])
    assert set(catalog["label"]) == {"photos [é] #1 *", "apple red", "pomme été", "[1]", "#2", "b", "quote's"}


@pytest.mark.parametrize("target", ["a/1.jpg", "a"], ids=["file", "folder"])
def test_list_images_follows_links(tmp_path: Path, target: str) -> None:
    fill(tmp_path / "real", "a/1.jpg")
    fill(tmp_path / "fruits", "b/2.jpg")
    (tmp_path / "fruits" / target).parent.mkdir(exist_ok=True)
    (tmp_path / "fruits" / target).symlink_to(tmp_path / "real" / target)
    assert list(list_folder(tmp_path / "fruits")["path"]) == ["a/1.jpg", "b/2.jpg"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such a name")
def test_list_images_explains_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(CatalogError, match=r"caf.*\.jpg.*UTF-8"):
        list_folder(tmp_path)


def test_list_images_notices_new_and_changed_files(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg")
    before = list_folder(tmp_path)
    fill(tmp_path, "a/0.jpg")
    (tmp_path / "a" / "1.jpg").write_bytes(b"longer than before")
    os.utime(tmp_path / "a" / "1.jpg", (1, 1))
    after = list_folder(tmp_path)
    assert list(before["path"]) == ["a/1.jpg"]
    assert list(after["path"]) == ["a/0.jpg", "a/1.jpg"]
    assert (after["bytes"][1], after["version"][1]) == (18, digest("1000000000"))


def test_list_images_keeps_the_classes_that_are_named(sample_folder: Path) -> None:
    catalog = list_folder(sample_folder, classes=["pear_1", "apple_red_1"])
    assert count_labels(catalog) == {"apple_red_1": 4, "pear_1": 4}
    assert list(catalog.index) == list(range(8))
    assert catalog["path"].is_monotonic_increasing


def test_list_images_names_the_existing_classes_beside_an_unknown_one(sample_folder: Path) -> None:
    names = ", ".join(sorted(CLASS_NAMES))
    with pytest.raises(CatalogError, match=rf"names kiwi, plum, which is not there; .* are: {names}$"):
        list_folder(sample_folder, classes=["plum", "pear_1", "kiwi"])


def test_list_images_names_only_some_of_many_classes(tmp_path: Path) -> None:
    fill(tmp_path, *(f"class_{k:03}/1.jpg" for k in range(40)))
    with pytest.raises(CatalogError, match=r"class_000, .*class_029 \.\.\.$"):
        list_folder(tmp_path, classes=["kiwi"])


@pytest.mark.parametrize(
    ("limit", "counts"),
    [
        (5, [1] * 5),
        (500, [100] * 5),
        (700, [140] * 5),
        (720, [145, 145, 145, 140, 145]),
        (10_000, [234, 154, 159, 140, 159]),
    ],
    ids=["one each", "equal", "all of the smallest", "more than the smallest", "more than all"],
)
def test_list_images_limits_the_classes_evenly(photographs: Path, limit: int, counts: list[int]) -> None:
    catalog = list_folder(photographs, limit=limit)
    assert count_labels(catalog) == dict(zip(PUBLISHED_COUNTS, counts))
    assert catalog["path"].is_monotonic_increasing
    assert list(catalog.index) == list(range(len(catalog)))


def test_list_images_applies_the_limit_after_the_filter_of_classes(photographs: Path) -> None:
    catalog = list_folder(photographs, limit=9, classes=["apple_red_1", "apple_red_2"])
    assert sorted(count_labels(catalog).values()) == [4, 5]
    assert set(catalog["label"]) == {"apple_red_1", "apple_red_2"}


def test_list_images_limits_at_random(photographs: Path) -> None:
    chosen = set(list_folder(photographs, limit=250)["path"])
    everything = list_folder(photographs)
    first = set(everything.groupby("label").head(50)["path"])
    assert len(chosen & first) < 150  # a random choice of 50 shares about 16 of 50 with the first 50


def test_list_images_chooses_the_same_in_another_process_and_from_other_files(tmp_path: Path) -> None:
    names = [f"{label}/{k}.jpg" for label in "abc" for k in range(20)]
    one, two = fill(tmp_path / "one", *names), fill(tmp_path / "two", *reversed(names))
    code = "import sys; from fruitdask.store.catalog import *; from fruitdask.core.config import InputConfig; "
    code += "print(*list_images(InputConfig(url=sys.argv[1], limit=10))['path'])"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(two)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == list(list_folder(one, limit=10)["path"])


@pytest.mark.slow
@pytest.mark.usefixtures("clean_memory")
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), limit=st.integers(1, 40), more=st.integers(0, 15))
def test_list_images_limits_evenly_and_keeps_what_a_smaller_limit_chose(
    sizes: list[int], limit: int, more: int
) -> None:
    rows = [f"{name}/{k}.jpg,class {name}" for name, size in enumerate(sizes) for k in range(size)]
    files = {f"/limit/{row.partition(',')[0]}": b"x" for row in rows}
    fsspec.filesystem("memory").pipe(files | {"/limit/labels.csv": "\n".join(["path,label", *rows]).encode()})
    smaller, larger = (
        list_images(InputConfig(url="memory://limit", manifest="memory://limit/labels.csv", limit=n))
        for n in (limit, limit + more)
    )
    assert len(smaller) == min(limit, sum(sizes))
    counts = count_labels(smaller)
    for name, size in enumerate(sizes):
        count = counts.get(f"class {name}", 0)
        assert count == size or count >= max(counts.values()) - 1
    assert set(smaller["path"]) <= set(larger["path"])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"], ids=["csv", "parquet"])
def test_list_images_takes_labels_from_a_manifest(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path / "in", "x/1.jpg", "x/2.dat", "x/not listed.jpg")
    rows = [("x/2.dat", "007"), ("x/1.jpg", "pear, ripe"), ("été.jpg", "café")]
    manifest = write_manifest(tmp_path / f"labels{suffix}", rows)
    catalog = list_folder(tmp_path / "in", manifest=manifest)
    assert list(zip(catalog["path"], catalog["label"], catalog["bytes"])) == [
        ("x/1.jpg", "pear, ripe", 7),
        ("x/2.dat", "007", 7),
        ("été.jpg", "café", 0),
    ]


def test_list_images_keeps_a_missing_file_of_the_manifest(tmp_path: Path) -> None:
    fill(tmp_path, "1.jpg")
    manifest = write_manifest(tmp_path / "labels.csv", [("gone/2.jpg", "a"), ("1.jpg", "b")])
    catalog = list_folder(tmp_path, manifest=manifest)
    assert list(catalog["path"]) == ["1.jpg", "gone/2.jpg"]
    assert (catalog["bytes"][1], catalog["version"][1]) == (0, 0)
    assert catalog["version"][0] == digest(str((tmp_path / "1.jpg").stat().st_mtime_ns))
    assert list(catalog.dtypes.astype(str)) == ["str", "category", "int64", "int64"]


def test_list_images_ignores_further_columns_of_the_manifest(tmp_path: Path) -> None:
    fill(tmp_path, "1.jpg")
    (tmp_path / "labels.csv").write_text("bytes,label,fold,path,version\n999,pear,test,1.jpg,v9\n")
    catalog = list_folder(tmp_path, manifest=str(tmp_path / "labels.csv"))
    assert (list(catalog.columns), list(catalog["bytes"])) == (list(COLUMNS), [5])


def test_list_images_applies_classes_and_limit_to_a_manifest(tmp_path: Path) -> None:
    rows = [(f"{k}.jpg", "abc"[k % 3]) for k in range(30)]
    fill(tmp_path, *(path for path, _ in rows))
    manifest = write_manifest(tmp_path / "labels.csv", rows)
    catalog = list_folder(tmp_path, manifest=manifest, classes=["a", "c"], limit=6)
    assert count_labels(catalog) == {"a": 3, "c": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,class\n1.jpg,a\n", r"expected the columns path and label in input\.manifest, found file, class"),
        ("path,class\n1.jpg,a\n", r"expected the columns path and label in input\.manifest, found path, class"),
        (
            "path,label\n1.jpg,a\n2.jpg,a\n1.jpg,b\n",
            r"expected each path once in input\.manifest, found '1\.jpg' twice",
        ),
        ("", r"expected the columns path and label in input\.manifest, found none"),
        (
            "path,label\n2.jpg,a\n1.jpg,a,b,c\n3,4,5,6,7,8\n",
            r"expected a CSV or Parquet table .*, found 4 columns in row 2 and 2 in the header: '1\.jpg,a,b,c'$",
        ),
    ],
    ids=["other columns", "no label", "duplicate", "empty", "ragged"],
)
def test_list_images_refuses_a_broken_csv_manifest(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(ConfigError, match=rf"labels\.csv: {message}"):
        list_folder(tmp_path, manifest=str(tmp_path / "labels.csv"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("labels.csv", "path,label\n\xe9.jpg,a\n".encode("latin-1")), ("labels.parquet", b"path,label\n1.jpg,a\n")],
    ids=["latin-1", "not parquet"],
)
def test_list_images_refuses_a_manifest_in_another_format(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: expected a CSV or Parquet table in .*, found .+"):
        list_folder(tmp_path, manifest=str(tmp_path / name))


@pytest.mark.parametrize("row", [",a", "1.jpg,"], ids=["no path", "no label"])
def test_list_images_refuses_a_manifest_with_an_empty_field(tmp_path: Path, row: str) -> None:
    (tmp_path / "labels.csv").write_text(f"path,label\n0.jpg,a\n{row}\n")
    with pytest.raises(ConfigError, match=r"labels\.csv: "):
        list_folder(tmp_path, manifest=str(tmp_path / "labels.csv"))


@pytest.mark.parametrize("label", ["NA", "None", "null", "nan"])
def test_list_images_takes_the_words_of_a_csv_manifest_literally(tmp_path: Path, label: str) -> None:
    (fill(tmp_path, "0.jpg") / "labels.csv").write_text(f"path,label\n0.jpg,{label}\n")
    assert list(list_folder(tmp_path, manifest=str(tmp_path / "labels.csv"))["label"]) == [label]


def test_list_images_says_that_the_manifest_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*/none\.csv: .*No such file"):
        list_folder(tmp_path, manifest=str(tmp_path / "none.csv"))


def test_list_images_says_that_the_manifest_has_no_rows(tmp_path: Path) -> None:
    fill(tmp_path, "1.jpg")
    manifest = write_manifest(tmp_path / "labels.csv", [])
    with pytest.raises(CatalogError, match="found no row"):
        list_folder(tmp_path, manifest=manifest)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "none"),
        (["a/notes.txt", "b/1.mp4", "b/2.MP4", "README"], r"only 2 \.mp4, 1 \.txt, 1 without an extension"),
    ],
    ids=["empty", "other files"],
)
def test_list_images_says_that_a_folder_holds_no_images(tmp_path: Path, names: list[str], found: str) -> None:
    with pytest.raises(CatalogError, match=rf"{tmp_path}: expected images .*, found {found}; check input"):
        list_folder(fill(tmp_path, *names))


def test_list_images_says_that_a_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=rf"{tmp_path}/nope: there is no such folder"):
        list_folder(tmp_path / "nope")


def test_list_images_says_that_a_folder_is_missing_on_s3(s3_bucket: tuple[str, dict[str, Any]]) -> None:
    bucket, options = s3_bucket
    with pytest.raises(CatalogError, match=f"{bucket}/nope: there is no such folder; check input.url"):
        list_images(InputConfig(url=f"s3://{bucket}/nope", storage_options=options))


def test_list_images_lists_the_same_from_s3_as_from_disk(
    tmp_path: Path, sample_folder: Path, s3_bucket: tuple[str, dict[str, Any]], s3_client: Any
) -> None:
    bucket, options = s3_bucket
    folder = fill(tmp_path / "in [1]", *ODD_NAMES)
    for path in sample_folder.rglob("*.jpg"):
        target = folder / path.relative_to(sample_folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    for path in (path for path in folder.rglob("*") if path.is_file()):
        key = f"in [1]/{path.relative_to(folder).as_posix()}"
        s3_client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    s3_client.put_object(Bucket=bucket, Key="in [1]/empty folder/", Body=b"")
    s3_client.put_object(Bucket=bucket, Key="in [1] not/1.jpg", Body=b"x")

    from_disk = list_folder(folder)
    from_s3 = list_images(InputConfig(url=f"s3://{bucket}/in [1]", storage_options=options))
    columns = ["path", "label", "bytes"]
    pd.testing.assert_frame_equal(from_s3[columns], from_disk[columns], check_categorical=False)
    etags = [hashlib.md5((folder / path).read_bytes()).hexdigest() for path in from_disk["path"]]
    assert list(from_s3["version"]) == list(map(digest, etags))


def test_list_images_notices_changes_on_s3(s3_bucket: tuple[str, dict[str, Any]], s3_client: Any) -> None:
    bucket, options = s3_bucket
    config = InputConfig(url=f"s3://{bucket}", storage_options=options)
    s3_client.put_object(Bucket=bucket, Key="a/1.jpg", Body=b"1")
    before = list_images(config)
    s3_client.put_object(Bucket=bucket, Key="a/1.jpg", Body=b"2")
    s3_client.put_object(Bucket=bucket, Key="2.jpg", Body=b"2")
    after = list_images(config)
    assert list(before["version"]) == [digest(hashlib.md5(b"1").hexdigest())]
    assert list(after["version"]) == [digest(hashlib.md5(b"2").hexdigest())] * 2
    assert list(after["label"]) == [bucket, "a"]


TREES = {
    "one folder": [f"{n:04}.jpg" for n in range(46)],
    "two folders": [f"{label}/{n:04}.jpg" for label in "ab" for n in range(23)],
    "folders in folders": [f"{part}/{label}/{n}.jpg" for part in ("test", "train") for label in "ab" for n in range(9)],
    "files among folders": [
        *(f"{n:02}.jpg" for n in range(0, 12, 2)),
        *(f"{n:02}/{m}/x.jpg" for n in range(15) for m in range(n)),
        *("05.jpg", "05-/y.jpg", "05//y.jpg", "é/ü.jpg", "~.jpg"),
    ],
    "more folders than pages": [f"{n:03}/1.jpg" for n in range(111)],
    "deep": [f"a/b/c/d/e/{n:03}.jpg" for n in range(25)],
}


@pytest.mark.slow
@pytest.mark.parametrize("names", TREES.values(), ids=TREES)
@pytest.mark.parametrize(("n_at_once", "n_held"), [(8, 64), (2, 1)])
def test_list_images_reads_all_pages_of_s3(
    s3_bucket: tuple[str, dict[str, Any]],
    s3_client: Any,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    n_at_once: int,
    n_held: int,
) -> None:
    bucket, options = s3_bucket
    # The server, a thread of this process, returns pages of a thousand by default.
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    monkeypatch.setattr(S3, "list_page", partialmethod(S3.list_page, n_max=10))
    monkeypatch.setattr(prefixes, "_N_AT_ONCE", n_at_once)
    monkeypatch.setattr(prefixes, "_MAX_HELD", n_held)
    for name in (*names, "00/"):
        s3_client.put_object(Bucket=bucket, Key=f"top/{name}", Body=b"")
    s3_client.put_object(Bucket=bucket, Key="top.jpg", Body=b"")
    location = Location(f"s3://{bucket}/top", options)
    assert [path for path, _, _ in prefixes.list_below(location.fs, location.path)] == sorted(names)


def test_several_folders_are_listed_at_once() -> None:
    together = threading.Barrier(8)

    class Bucket:
        """Lists eight folders, each page only while seven others are being listed."""

        def list_level(self, top: str, folder: str) -> list[str]:
            return [f"{n}/" for n in range(8)]

        def list_page(self, top: str, token: str | None = None, folder: str = "") -> tuple[list[Any], str | None]:
            if folder:
                together.wait(timeout=60)
            return [(f"{folder or '0/'}{token or 1}.jpg", 1, "")], None if token else "2"

    found = [path for path, _, _ in prefixes.list_below(Bucket(), "")]
    assert found == [f"{folder}/{n}.jpg" for folder in range(8) for n in (1, 2)]


def test_folder_that_a_server_does_not_report_is_listed() -> None:
    class Bucket:
        """Lists files of two folders, but reports only one of the folders."""

        def list_level(self, top: str, folder: str) -> list[str]:
            return ["b/"]

        def list_page(self, top: str, token: str | None = None, folder: str = "") -> tuple[list[Any], str | None]:
            return [("b/2.jpg" if token else "a/1.jpg", 1, "")], None if token else "2"

    assert [path for path, _, _ in prefixes.list_below(Bucket(), "")] == ["a/1.jpg", "b/2.jpg"]


def test_list_images_refuses_a_name_that_s3fs_cannot_ask_for(
    s3_bucket: tuple[str, dict[str, Any]], s3_client: Any
) -> None:
    bucket, options = s3_bucket
    s3_client.put_object(Bucket=bucket, Key="a/x?versionId=1.jpg", Body=b"x")
    with pytest.raises(CatalogError, match=r"object 'a/x\?versionId=1\.jpg', expected names .*; rename"):
        list_images(InputConfig(url=f"s3://{bucket}", storage_options=options))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "s3://no-such-bucket/x",
            r"cannot list s3://no-such-bucket/x: ListObjectsV2: .* \(NoSuchBucket\): there is no",
        ),
        ("s3://Not_A_Bucket!/x", r"cannot list s3://Not_A_Bucket!/x: .*Invalid bucket name.*: check the name"),
        ("s3://BUCKET/none", r"^s3://.*/none: there is no such folder; check input\.url$"),
    ],
    ids=["no bucket", "no name of a bucket", "no folder"],
)
def test_list_images_names_what_is_missing_on_s3(s3_bucket: tuple[str, dict[str, Any]], url: str, message: str) -> None:
    bucket, options = s3_bucket
    with pytest.raises((CatalogError, StorageError), match=message):
        list_images(InputConfig(url=url.replace("BUCKET", bucket), storage_options=options))


@pytest.mark.parametrize("links", [{"loop": "loop"}, {"gone": "nowhere.jpg"}], ids=["to itself", "to nothing"])
def test_list_images_skips_broken_links(tmp_path: Path, links: dict[str, str]) -> None:
    fill(tmp_path, "a/1.jpg")
    for name, target in links.items():
        (tmp_path / f"{name}.jpg").symlink_to(tmp_path / (f"{name}.jpg" if target == name else target))
    assert list(list_folder(tmp_path)["path"]) == ["a/1.jpg"]


@given(names=st.sets(st.text("ab-/0 é\U0001f34e", min_size=1, max_size=6), max_size=20))
def test_list_images_lists_a_disk_in_the_order_of_paths(names: set[str]) -> None:
    paths = {f"{os.path.normpath(name).strip('/.') or 'x'}.jpg" for name in names}
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), *paths, "last.jpg")
        assert list(list_folder(Path(folder))["path"]) == sorted({*paths, "last.jpg"})


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["b/*"], ["a/1.jpg", "a/x/2.jpg", "top.jpg"]),
        (["*/2.jpg", "top*"], ["a/1.jpg", "b/3.jpg"]),
        (["a/[!1]*", "none/*", "A/*"], ["a/1.jpg", "b/3.jpg", "top.jpg"]),
        (["1.jpg"], ["a/1.jpg", "a/x/2.jpg", "b/3.jpg", "top.jpg"]),
    ],
    ids=["folder", "several", "set, nothing, case", "whole path"],
)
def test_list_images_leaves_out_excluded_files(tmp_path: Path, patterns: list[str], left: list[str]) -> None:
    fill(tmp_path, "a/1.jpg", "a/x/2.jpg", "b/3.jpg", "top.jpg")
    catalog = list_folder(tmp_path, exclude=patterns)
    assert (list(catalog["path"]), list(catalog.index)) == (left, list(range(len(left))))


def test_list_images_excludes_a_file_whose_name_is_a_pattern_of_another(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "a/[1].jpg", "a/b1.jpg", "a/b[1].jpg", "a/?.jpg")
    catalog = list_folder(tmp_path, exclude=["a/[1].jpg", "*/b[1].jpg", "a/?.jpg"])
    assert list(catalog["path"]) == ["a/1.jpg", "a/b[1].jpg"]


def test_list_input_notes_archives_whose_folders_are_written_as_on_windows(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in ("red\\1.jpg", "red\\2.jpg", "blue/1.jpg"):
            archive.writestr(name, b"bytes")
    listing = list_input(InputConfig(url=f"zip://::{tmp_path}/photos.zip"))
    (note,) = listing.notes
    assert note.startswith(r"2 paths have a backslash, such as 'red\\1.jpg', which counts as part of a name")
    assert Counter(listing.files["label"]) == {"photos": 2, "blue": 1}


@pytest.mark.parametrize(
    ("classes", "note"),
    [
        (["apple", "pear", "apples", "1", "01", "-1", "c", "c++"], None),
        (["Apple", "apple"], "'Apple' and 'apple' differ"),
        (["red apple", "red_apple"], "'red apple' and 'red_apple' differ"),
        (["p\u00eache", "pe\u0302che"], "'pe\u0302che' and 'p\u00eache' differ"),
        (["a", "A", "b", "B ", "c"], "'A' and 'a', and 1 more, differ"),
    ],
    ids=["different", "case", "spaces", "Unicode", "several"],
)
def test_list_input_notes_classes_that_may_be_one(tmp_path: Path, classes: list[str], note: str | None) -> None:
    fill(tmp_path, *(f"{name}/1.jpg" for name in classes))
    notes = list_input(InputConfig(url=str(tmp_path))).notes
    assert len(notes) == (note is not None)
    assert note is None or f"the classes {note} only in case, spaces or form of Unicode" in notes[0]


@pytest.mark.parametrize(
    ("rule", "note"),
    [
        (r"/(\d+)_", "2 groups span several classes, such as '0' in 'apple' and 'pear'; "),
        (r"_(\d)", "2 groups span several classes, such as '0' in 'apple' and 'pear'; "),
        (r"(0_|.*1_)", "one group spans several classes, such as '0_' in 'apple' and 'pear'; "),
        (r"(.*/[^/_]+)_", None),
        ("parent", None),
    ],
    ids=["numbers", "last numbers", "one", "with the class", "folder"],
)
def test_list_input_notes_groups_across_classes(tmp_path: Path, rule: str, note: str | None) -> None:
    fill(tmp_path, *(f"{name}/{group}_{n}.jpg" for name in ("apple", "pear") for group in "01" for n in range(2)))
    notes = list_input(InputConfig(url=str(tmp_path), group_from=rule)).notes
    assert len(notes) == (note is not None)
    assert note is None or notes[0].startswith(note)


def test_list_input_notes_objects_in_several_splits(tmp_path: Path) -> None:
    fill(
        tmp_path,
        *(f"{split}/apple/{group}_1.jpg" for split in ("test", "train") for group in "01"),
        "test/apple/2_1.jpg",
    )
    config = InputConfig(url=str(tmp_path), split_from="first", group_from=r"/(apple/\d+)_")
    (note,) = list_input(config).notes
    assert note.startswith("2 groups span several splits, such as 'apple/0' in 'test' and 'train'; ")
    assert not list_input(config.model_copy(update={"group_from": r"(.*/\d+)_"})).notes


@pytest.mark.slow
def test_list_images_takes_a_few_bytes_per_file(tmp_path: Path) -> None:
    names = [f"class_{number // 1000}/{number:08}.jpg" for number in range(20_000)]
    fill(tmp_path, *names)
    catalog = list_folder(tmp_path)
    # Path and its offset, code of the class, size, version.
    assert catalog.memory_usage(deep=True).sum() / len(names) < len(names[0]) + 1 + 8 + 4 + 8 + 8


@pytest.mark.usefixtures("clean_memory")
@pytest.mark.parametrize("n_at_once", [1, 10], ids=["all folders at once", "folder by folder"])
def test_list_images_of_other_storages_lists_each_file_once_in_the_order_of_paths(
    monkeypatch: pytest.MonkeyPatch, n_at_once: int
) -> None:
    names = ["a/1.jpg", "a/b/c/2.jpg", "a-/3.jpg", "a.jpg", "b/4.jpg", "b/.hidden/5.jpg", "b/notes.txt", "é/ü.jpg"]
    fs = fsspec.filesystem("memory")
    fs.pipe({f"/photographs/{name}": name.encode() for name in names})
    searched = list[str]()
    monkeypatch.setattr("fruitdask.core.listing._MAX_FOLDERS", n_at_once)
    find = fs.find
    monkeypatch.setattr(fs, "find", lambda path, **options: searched.append(path) or find(path, **options))
    catalog = list_images(InputConfig(url="memory://photographs"))
    assert list(catalog["path"]) == sorted(["a/1.jpg", "a/b/c/2.jpg", "a-/3.jpg", "a.jpg", "b/4.jpg", "é/ü.jpg"])
    assert list(catalog["bytes"]) == [len(path.encode()) for path in catalog["path"]]
    folders = ["/photographs"] if n_at_once == 1 else [f"/photographs/{name}" for name in ("a-", "a", "b", "é")]
    assert searched == folders


@given(n_images=st.integers(1, 5_000_000))
def test_choose_partition_size_stays_in_its_range_and_makes_about_16_partitions(n_images: int) -> None:
    size = choose_partition_size(n_images)
    assert 32 <= size <= 512
    if 32 * 16 <= n_images <= 512 * 16:
        assert size == math.ceil(n_images / 16)
    else:
        assert size == (32 if n_images < 32 * 16 else 512)


@given(n_images=st.integers(0, 120), size=st.integers(1, 130))
def test_split_catalog_covers_each_row_once_and_in_order(n_images: int, size: int) -> None:
    paths, labels = [f"{k}.jpg" for k in range(n_images)], [f"class {k % 7}" for k in range(n_images)]
    catalog = pd.DataFrame({"path": paths, "label": labels, "bytes": 1, "version": "v"})
    partitions = list(split_catalog(catalog, size))
    assert [path for partition in partitions for path in partition.paths] == paths
    assert [label for partition in partitions for label in partition.labels] == labels
    assert [partition.index for partition in partitions] == list(range(math.ceil(n_images / size)))
    assert [partition.start for partition in partitions] == list(range(0, n_images, size))
    assert {len(partition.paths) for partition in partitions[:-1]} <= {size}


@pytest.mark.slow
@given(
    numbers=st.lists(st.integers(0, 15), unique=True),
    changed=st.integers(0, 15),
    later=st.sets(st.integers(0, 15), min_size=1),
)
def test_merge_listing_moves_no_row_and_gives_the_listing_back(
    numbers: list[int], changed: int, later: set[int]
) -> None:
    def list_numbers(numbers: Iterable[int], version: int) -> pd.DataFrame:
        rows = [[f"{n % 3}/{n:02d}.jpg", f"{n % 3}", n, version if n == changed else n] for n in numbers]
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        return table.astype({"path": "str", "label": "str", "bytes": np.int64, "version": np.int64}).astype(
            {"label": "category"}
        )

    stored, listing = list_numbers(numbers, 100), list_numbers(later, 200).sort_values("path", ignore_index=True)
    merged = merge_listing([stored.iloc[start : start + 5] for start in range(0, max(1, len(stored)), 5)], listing)
    assert list(merged["path"][: len(stored)]) == list(stored["path"])
    added = list(merged["path"][len(stored) :])
    assert added == sorted(added) and len(merged) == len(later | set(numbers))
    assert set(merged["path"][merged["bytes"] == VANISHED_BYTES]) == set(stored["path"]) - set(listing["path"])
    assert hash_listing([merged.iloc[:3], merged.iloc[3:]]) == hash_catalog(listing)
    pd.testing.assert_frame_equal(merge_listing([merged], listing), merged)
    written = merged.assign(label=merged["label"].astype("str"))
    assert hash_listing([written]) == hash_catalog(listing)


@given(chosen=st.sets(st.integers(0, 19)), n_rows=st.integers(1, 25))
def test_take_rows_equals_pandas(chosen: set[int], n_rows: int) -> None:
    catalog = pd.DataFrame({"path": [f"{n}.jpg" for n in range(20)], "label": pd.Categorical(list("abcde" * 4))})
    rows = np.array(sorted(chosen), np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog_module, "ROWS_IN_MEMORY", n_rows)
        pd.testing.assert_frame_equal(take_rows(catalog, rows), catalog.iloc[rows])


@given(labels=st.lists(st.sampled_from("abc")), limit=st.integers(1, 30), n_rows=st.integers(1, 10))
def test_sample_evenly_takes_the_first_ranks_of_each_class(labels: list[str], limit: int, n_rows: int) -> None:
    catalog = pd.DataFrame({"path": [f"{n}.jpg" for n in range(len(labels))], "label": labels}, dtype="str")
    hashes = pd.util.hash_pandas_object(catalog["path"], index=False)
    turns = hashes.groupby(catalog["label"]).rank(method="first")
    expected = pd.DataFrame({"turn": turns, "hash": hashes}).sort_values(["turn", "hash"]).index[:limit]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog_module, "ROWS_AT_ONCE", n_rows)
        assert sample_evenly(catalog, limit).tolist() == sorted(expected)
        among = np.arange(len(labels)) % 3 > 0
        some = sample_evenly(catalog[among].reset_index(drop=True), limit)
        assert sample_evenly(catalog, limit, among=among).tolist() == np.flatnonzero(among)[some].tolist()


@pytest.mark.parametrize("among", [{1}, {0, 3}, set()], ids=["one", "ends", "none"])
def test_split_catalog_returns_the_same_partitions_alone_and_among_all(among: set[int]) -> None:
    paths = [f"{n}.jpg" for n in range(10)]
    catalog = pd.DataFrame({"path": paths, "label": "a", "bytes": range(10), "version": range(10)})
    wanted = [partition for partition in split_catalog(catalog, 3) if partition.index in among]
    assert list(split_catalog(catalog, 3, among=among)) == wanted


def test_partition_lists_the_images_to_read() -> None:
    partition = Partition(1, 4, ("a", "b", "c", "d"), ("x", "x", "y", "y"), (1, VANISHED_BYTES, 1, 1), (0, 0, 0, 0))
    assert partition.places_to_read == (0, 2, 3)
    assert replace(partition, rows=(1, 3)).places_to_read == (3,)
    chosen = partition.select((0, 2, 3))
    assert (chosen.paths, chosen.labels, chosen.start) == (("a", "c", "d"), ("x", "y", "y"), 4)
    assert (chosen.bytes, chosen.versions, chosen.rows) == ((1, 1, 1), (0, 0, 0), None)
    whole = Partition(0, 0, ("a",), ("x",))
    assert whole.select(whole.places_to_read) is whole


def test_split_catalog_gives_partitions_that_survive_pickle(table: pd.DataFrame) -> None:
    partitions = list(split_catalog(table, 2))
    assert pickle.loads(pickle.dumps(partitions)) == partitions
    assert {type(path) for partition in partitions for path in partition.paths} == {str}


@pytest.mark.parametrize(
    ("column", "value"),
    [("path", "a/3.jpg"), ("label", "c"), ("bytes", 21), ("version", "v9")],
    ids=["path", "label", "bytes", "version"],
)
def test_hash_catalog_changes_with_each_column(table: pd.DataFrame, column: str, value: Any) -> None:
    changed = table.copy()
    changed.loc[1, column] = value
    assert hash_catalog(changed) != hash_catalog(table)


def test_hash_catalog_changes_with_the_rows_and_their_order(table: pd.DataFrame) -> None:
    swapped = table.rename(columns={"path": "label", "label": "path"})
    variants = [table, table.iloc[::-1], table.iloc[:2], table.iloc[:0], pd.concat([table, table]), swapped]
    assert len({hash_catalog(variant) for variant in variants}) == len(variants)


def test_hash_catalog_depends_on_nothing_else(table: pd.DataFrame, tmp_path: Path) -> None:
    table.to_parquet(tmp_path / "catalog.parquet")
    variants = [
        table.copy(),
        table.set_index(pd.Index([7, 8, 9])),
        table[["version", "bytes", "label", "path"]],
        table.assign(status="ok"),
        table.astype({"path": object, "label": object}),
        pickle.loads(pickle.dumps(table)),
        pd.read_parquet(tmp_path / "catalog.parquet"),
    ]
    assert {hash_catalog(variant) for variant in variants} == {hash_catalog(table)}
    assert len(bytes.fromhex(hash_catalog(table))) == 32


def test_hash_catalog_changes_with_the_time_of_a_file(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "a/2.jpg")
    before = hash_catalog(list_folder(tmp_path))
    assert hash_catalog(list_folder(tmp_path)) == before
    os.utime(tmp_path / "a" / "1.jpg", (1, 1))
    assert hash_catalog(list_folder(tmp_path)) != before

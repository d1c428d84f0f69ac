"""Tests of the user's table of labels: as people, spreadsheets and pandas write it, and matched with the files in the
input.
"""

import codecs
import decimal
import gzip
import io
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fruitdask.core.config import InputConfig
from fruitdask.core.escaping import format_csv
from fruitdask.errors import CatalogError, ConfigError, FruitdaskError
from fruitdask.store.catalog import list_images

PATHS = ("a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg")
#: Labels that programs often misread.
LABELS = ("007", "NA", "True", "null")
CSV = "path,label\n" + "".join(f"{path},{label}\n" for path, label in zip(PATHS, LABELS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of four files of 5 bytes."""
    for path in PATHS:
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(b"bytes")
    return tmp_path / "in"


def look(folder: Path, table: Path, **options: Any) -> pd.DataFrame:
    return list_images(InputConfig(url=str(folder), manifest=str(table), **options))


def write(folder: Path, data: bytes | str, name: str = "labels.csv") -> Path:
    table = folder.parent / name
    table.write_bytes(data if isinstance(data, bytes) else data.encode())
    return table


@pytest.mark.parametrize(
    "data",
    [
        CSV.encode(),
        codecs.BOM_UTF8 + CSV.encode(),
        CSV.replace("\n", "\r\n").encode(),
        CSV.replace("\n", "\r").encode(),
        CSV.replace(",", ";").encode(),
        codecs.BOM_UTF8 + CSV.replace(",", ";").replace("\n", "\r\n").encode(),
        ("sep=;\r\n" + CSV.replace(",", ";").replace("\n", "\r\n")).encode(),
        CSV.replace(",", "\t").encode("utf-16"),
        CSV.replace(",", "\t").encode(),
        CSV.replace(",", ", ").encode(),
        CSV.replace(",", ", ").replace(", label", ",label").encode(),
        CSV.replace("path,label", "Path,LABEL").encode(),
        pd.read_csv(io.StringIO(CSV), dtype=str, keep_default_na=False).to_csv().encode(),
        gzip.compress(CSV.encode()),
        (CSV + "\n,\n,\n").encode(),
        CSV.replace("a/0.jpg", '"a/0.jpg"').encode().removesuffix(b"\n"),
        "\n".join(",".join(reversed(line.split(","))) for line in CSV.split()).encode(),
    ],
    ids=[
        *("plain", "BOM", "CRLF", "CR", "semicolons", "Excel", "Excel's sep", "Excel's Unicode text", "tabs", "padded"),
        *("padded but for the header", "capitals", "index", "gzip", "empty rows", "quotes", "other order"),
    ],
)
def test_table_is_read_as_it_was_meant(folder: Path, data: bytes) -> None:
    catalog = look(folder, write(folder, data))
    assert list(zip(catalog["path"], catalog["label"])) == list(zip(PATHS, LABELS))
    assert list(catalog["bytes"]) == [5] * 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (CSV.replace("007", "pêche").encode("latin-1"), r"not UTF-8 in line 2 \(byte 0xea\); save it as CSV UTF-8"),
        (
            CSV.partition("\n")[2].encode(),
            r"expected the columns path and label in input\.manifest, found a/0\.jpg, 007",
        ),
        ((CSV + "b/1.jpg,x,y\n").encode(), r"found 3 columns in row 5 and 2 in the header: 'b/1\.jpg,x,y'"),
        ((CSV + "b/1.jpg\n").encode(), r"found 1 columns in row 5 and 2 in the header"),
        (CSV.replace("NA", "").encode(), r"row 2 lacks one"),
        (CSV.replace("NA", " \t").encode(), r"row 2 lacks one"),
        (CSV.replace(",007", ',"7', 1).encode(), r"found the label '7\\n.*' of several lines in row 1; close the quot"),
        (CSV.encode("utf-16-le"), r"found null bytes, which no text contains"),
        (
            gzip.compress(CSV.encode())[:30],
            r"expected a CSV or Parquet table in input\.manifest, found Compressed file ended",
        ),
        (b"PAR1 and nothing else", r"expected a CSV or Parquet table in input\.manifest, found "),
        (CSV.replace("label", "label,label", 1).encode(), r"found the columns path, label, label with a duplicate"),
        (b"PK\3\4 and nothing else", r"found an Excel workbook or another ZIP archive; save the table as CSV"),
        ((CSV + "./a//0.jpg,x\n").encode(), r"expected each path once in input\.manifest, found 'a/0\.jpg' twice"),
        ((CSV + "../in/a/0.jpg,x\n").encode(), r"found '\.\./in/a/0\.jpg'; write it without"),
    ],
    ids=[
        *(
            "latin-1",
            "no header",
            "ragged",
            "short",
            "no label",
            "blank label",
            "open quotation mark",
            "UTF-16 without a mark",
            "cut",
            "not Parquet",
            "twice",
            "Excel",
        ),
        *("same path", "leads out"),
    ],
)
def test_invalid_table_is_one_sentence(folder: Path, data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        look(folder, write(folder, data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (lambda path: path.replace("/", "\\"), r"found 'a\\\\0\.jpg' for 'a/0\.jpg'; write / between folders"),
        (
            lambda path: f"in/{path}",
            r"found 'in/a/0\.jpg' for 'a/0\.jpg'; leave out the name of the input's own folder",
        ),
        (lambda path: path.removesuffix(".jpg"), r"found 'a/0' for 'a/0\.jpg'; add the file's extension"),
        (lambda path: path.upper(), r"found 'A/0\.JPG' for 'a/0\.jpg'; use the upper and lower case"),
        (lambda path: f"/elsewhere/{path}", r"found '/elsewhere/a/0\.jpg', which is not inside it"),
        (lambda path: f"/{path}", r"found '/a/0\.jpg', which is not inside it; write it like 'a/0\.jpg'"),
        (lambda path: f"https://example.org/{path}", r"found 'https://example\.org/a/0\.jpg', which is not inside it"),
        (lambda path: f"C:\\photos\\{path}", r"found 'C:\\\\photos\\\\a/0\.jpg', which is not inside it"),
        (
            lambda path: f"x{path}",
            r"none of its 4 exists: the first path in the table is 'xa/0\.jpg', the first file is 'a/0\.jpg'",
        ),
    ],
    ids=["backslashes", "own folder", "no ending", "capitals", "elsewhere", "slash", "URL", "Windows", "other names"],
)
def test_paths_in_another_notation_are_explained(folder: Path, rewrite: Callable[[str], str], message: str) -> None:
    rows = [f"{rewrite(path)},x\n" for path in PATHS]
    expected = rf"labels\.csv: expected paths of input\.manifest relative to input\.url {folder}, .*{message}"
    with pytest.raises((ConfigError, CatalogError), match=expected):
        look(folder, write(folder, "".join(["path,label\n", *rows])))


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda path, top: f"./{path}",
        lambda path, top: path.replace("/", "//"),
        lambda path, top: path.replace("/", "/./"),
        lambda path, top: f"{top}/{path}",
        lambda path, top: f"file://{top}/{path}",
    ],
    ids=["dot", "two slashes", "dot within", "absolute", "URL"],
)
def test_equivalent_paths_match_the_listing(folder: Path, rewrite: Callable[[str, Path], str]) -> None:
    rows = [f"{rewrite(path, folder)},x\n" for path in (*PATHS, "a/gone.jpg")]
    catalog = look(folder, write(folder, "".join(["path,label\n", *rows])))
    plain = look(folder, write(folder, CSV))
    assert list(catalog["path"]) == sorted((*PATHS, "a/gone.jpg"))
    listed = catalog[catalog["path"] != "a/gone.jpg"].reset_index(drop=True)
    pd.testing.assert_frame_equal(listed[["path", "bytes", "version"]], plain[["path", "bytes", "version"]])
    assert (plain["version"] != 0).all()


def test_names_in_different_unicode_forms_match(tmp_path: Path) -> None:
    names = {form: unicodedata.normalize(form, "pêche/é.jpg") for form in ("NFC", "NFD")}
    assert names["NFC"] != names["NFD"]
    for there, written in (("NFC", "NFD"), ("NFD", "NFC")):
        folder = tmp_path / there
        (folder / names[there]).parent.mkdir(parents=True)
        (folder / names[there]).write_bytes(b"x")
        catalog = look(folder, write(folder, f"path,label\n./{names[written]},p\n"))
        assert list(zip(catalog["path"], catalog["bytes"])) == [(names[there], 1)]
        classes = list_images(InputConfig(url=str(folder), classes=[names[written].partition("/")[0]]))
        assert list(classes["path"]) == [names[there]]


def test_files_that_differ_only_in_unicode_form_stay_distinct(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    for form in forms:
        (tmp_path / "in" / form).mkdir(parents=True)
        (tmp_path / "in" / form / "1.jpg").write_bytes(b"x" * len(form))
    catalog = look(
        tmp_path / "in", write(tmp_path / "in", "path,label\n" + "".join(f"{form}/1.jpg,{form}\n" for form in forms))
    )
    assert dict(zip(catalog["path"], catalog["bytes"])) == {f"{form}/1.jpg": len(form) for form in forms}
    assert set(list_images(InputConfig(url=str(tmp_path / "in"), classes=[forms[1]]))["label"]) == {forms[1]}


def test_table_takes_hidden_files_other_endings_and_paths_through_links(folder: Path) -> None:
    (folder / ".x").mkdir()
    (folder / ".x" / "1.dat").write_bytes(b"123")
    (folder / "link").symlink_to(folder / "a")
    catalog = look(folder, write(folder, "path,label\n.x/1.dat,h\nlink/0.jpg,l\na/1.jpg,a\n"))
    plain = list_images(InputConfig(url=str(folder)))
    assert list(zip(catalog["path"], catalog["bytes"])) == [(".x/1.dat", 3), ("a/1.jpg", 5), ("link/0.jpg", 5)]
    assert catalog["version"][2] == plain.set_index("path")["version"]["a/0.jpg"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pd.array([1, 1, 2, 2], "Int64"), ["1", "1", "2", "2"]),
        ([7.0, 7.0, 8.0, 8.5], ["7", "7", "8", "8.5"]),
        ([True, False, True, True], ["True", "False", "True", "True"]),
        (pd.Categorical(["b", "a", "b", "b"]), ["b", "a", "b", "b"]),
        (pd.Categorical([3, 1, 3, 3]), ["3", "1", "3", "3"]),
        ([b"007", b"NA", b"x", b"y"], ["007", "NA", "x", "y"]),
        ([decimal.Decimal("1.0"), decimal.Decimal(2), decimal.Decimal(3), decimal.Decimal(4)], ["1", "2", "3", "4"]),
        (
            [decimal.Decimal(f"1234567890123456789{end}") for end in ("0.00", "1.00", "1.50", "1.05")],
            [f"1234567890123456789{end}" for end in ("0", "1", "1.5", "1.05")],
        ),
        (np.array([0.1, 7, 8.5, 30000], np.float32), ["0.1", "7", "8.5", "30000"]),
        (["apple ", " apple", "apple", "red apple\u00a0"], ["apple", "apple", "apple", "red apple"]),
        (list(LABELS), list(LABELS)),
    ],
    ids=[
        *("Int64", "floats", "bools", "categories", "categories of numbers", "bytes", "decimals", "long decimals"),
        *("floats of 32 bits", "padded", "text"),
    ],
)
@pytest.mark.parametrize("is_index", [False, True], ids=["columns", "path as index"])
def test_labels_of_parquet_are_text(folder: Path, labels: Any, expected: list[str], is_index: bool) -> None:
    table = pd.DataFrame({"path": PATHS, "label": labels})
    (table.set_index("path") if is_index else table).to_parquet(folder.parent / "labels.pq")
    assert list(look(folder, folder.parent / "labels.pq")["label"]) == expected


@pytest.mark.parametrize(
    "labels",
    [
        pd.array([1, 1, None, 2], "Int64"),
        pd.Categorical(["a", "a", None, "b"]),
        [7.0, 7.0, float("nan"), 8.0],
        ["a", "b", None, "c"],
    ],
    ids=["Int64", "categories", "floats", "text"],
)
def test_a_null_label_in_parquet_is_reported(folder: Path, labels: Any) -> None:
    pd.DataFrame({"path": PATHS, "label": labels}).to_parquet(folder.parent / "labels.parquet")
    with pytest.raises(ConfigError, match="row 3 lacks one"):
        look(folder, folder.parent / "labels.parquet")


def test_lists_in_parquet_are_not_labels(folder: Path) -> None:
    pd.DataFrame({"path": PATHS, "label": [["a"]] * 4}).to_parquet(folder.parent / "labels.parquet")
    with pytest.raises(ConfigError, match=r"found the column label of type list<.*>; expected text"):
        look(folder, folder.parent / "labels.parquet")


def test_columns_split_and_group_of_the_table_are_taken(folder: Path) -> None:
    rows = [
        f"{path},{split},x,{n // 2}\n" for n, (path, split) in enumerate(zip(PATHS, ("train", "test", "", "train")))
    ]
    table = write(folder, "".join(["path,Split,label, GROUP\n", *rows]))
    catalog = look(folder, table)
    assert list(catalog.columns) == ["path", "label", "bytes", "version", "split", "group"]
    assert list(catalog["split"]) == ["train", "test", "", "train"] and str(catalog["split"].dtype) == "category"
    assert list(catalog["group"]) == ["0", "0", "1", "1"] and str(catalog["group"].dtype) == "category"
    for name in ("split", "group"):
        assert list(look(folder, table, **{f"{name}_from": "first"})[name]) == ["a", "a", "b", "b"]
    with pytest.raises(ValueError, match="label_from and manifest both set"):
        look(folder, table, label_from="first")


def test_table_that_fruitdask_wrote_is_read_back(folder: Path) -> None:
    labels = ["-1", "=x", "'tis", "@b", "0", "+1", "it's"]
    for label in labels:
        (folder / label).mkdir()
        (folder / label / "-0.jpg").write_bytes(b"bytes")
    (folder / "-5.jpg").write_bytes(b"bytes")
    expected = list_images(InputConfig(url=str(folder)))
    assert len(expected) == len(PATHS) + len(labels) + 1
    catalog = look(folder, write(folder, format_csv(expected)))
    assert list(zip(catalog["path"], catalog["label"])) == list(zip(expected["path"], expected["label"]))
    assert (catalog["bytes"] == 5).all()


def test_table_of_an_empty_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(CatalogError, match="in: expected the files that input.manifest names, found none"):
        look(tmp_path / "in", write(tmp_path / "in", CSV))


@pytest.mark.parametrize(
    "data", [b"\xff\xfe\x00", b'path,label\n"a', b"\x1f\x8b\x08", b"path,label\n\xff", b"PAR1PAR1", b"sep=;"]
)
def test_hostile_tables_end_in_a_sentence(folder: Path, data: bytes) -> None:
    with pytest.raises(FruitdaskError, match="labels.csv: expected "):
        look(folder, write(folder, data))

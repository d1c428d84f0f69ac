"""Untrusted texts in spreadsheets and on terminals."""

import csv
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from fruitdask.core.escaping import escape_controls, format_csv, read_csv

NAMES = [
    "apple",
    "=cmd|' /C calc'!A0",
    "+1",
    "-1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "a\r=1",
    "a\n=1",
    "'=1",
    "''=1",
    "'quoted'",
    'a","=1',
    "a,=1",
    "",
    "NA",
    "é 漢",
]


def test_format_csv_writes_no_formula_and_keeps_numbers() -> None:
    table = pd.DataFrame({"path": NAMES, "pca_1": np.linspace(-1, 1, len(NAMES)), "n": range(-3, len(NAMES) - 3)})
    table["label"] = table["path"].astype("category")
    text = format_csv(table)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == len(NAMES)
    cells = [row[name] for row in rows for name in ("path", "label")]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") and cell]
    assert [cell.lstrip("'") for cell in cells[::2]] == [name.lstrip("'") for name in NAMES]
    assert [float(row["pca_1"]) for row in rows] == list(table["pca_1"])
    assert [int(row["n"]) for row in rows] == list(table["n"])


def test_format_csv_leaves_other_tables_as_they_are() -> None:
    table = pd.DataFrame(
        {
            "path": ["a", None],
            "width_px": pd.array([64, None], dtype="object"),
            "size": pd.array([64, None], dtype="Int64"),
            "is": [True, False],
            "mean": [0.5, np.nan],
        },
        index=[7, 7],
    )
    assert format_csv(table) == table.to_csv(index=False, lineterminator="\r\n")
    assert format_csv(table[["mean"]], with_header=False) == '0.5\r\n""\r\n'


@pytest.mark.parametrize("name", NAMES)
def test_read_csv_restores_a_name(name: str) -> None:
    table = pd.DataFrame({"path": [name, "other"], "attempts": [1, 2]})
    pd.testing.assert_frame_equal(read_csv(format_csv(table).encode(), {"path": str}), table)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=5))
def test_read_csv_restores_any_names(names: list[str]) -> None:
    table = pd.DataFrame({"path": names, "attempts": 1})
    assert read_csv(format_csv(table).encode(), {"path": str})["path"].tolist() == names


def test_escape_controls_keeps_names_and_escapes_commands() -> None:
    assert escape_controls("é 漢 👩‍🌾 a\u202fb") == "é 漢 👩‍🌾 a\u202fb"
    hostile = "\x1b]0;title\x07\x9b2J\r\n\t\x7f\u202egpj.exe\u2028"
    assert escape_controls(hostile) == r"\x1b]0;title\x07\x9b2J\r\n\t\x7f\u202egpj.exe\u2028"
    assert escape_controls("a\nb\x1b", keeps_lines=True) == "a\nb\\x1b"

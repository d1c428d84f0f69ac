"""Tables for people and programs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fruitdask import report
from fruitdask.core.storage import Location


def make_outcomes() -> list[pd.DataFrame]:
    """Make outcomes in two pieces, with names that are awkward in a CSV."""
    columns = ["path", "label", "status", "error", "attempts"]
    first = [["a/1.jpg", "a", "ok", "", 1], ['a/2, "two".jpg', "a", "unreadable", "the image is broken", 1]]
    return [pd.DataFrame(first, columns=columns), pd.DataFrame([["é/3.jpg", "é", "ok", "", 2]], columns=columns)]


PCA = np.array([[1.5, -2.0], [np.nan, np.nan], [0.25, 3.0]], np.float32)
TSNE = np.array([[1.0, 2.0], [np.nan, np.nan], [np.nan, np.nan]], np.float32)


@pytest.mark.parametrize("tsne", [None, TSNE], ids=["pca", "pca and t-SNE"])
def test_write_results_tables_agree(tmp_path: Path, tsne: np.ndarray | None) -> None:
    output = Location(str(tmp_path))
    counts, digests = report.write_results(output, make_outcomes(), pca=PCA, tsne=tsne)
    table = report.read_results(output)
    expected = ["path", "label", "status", "pca_1", "pca_2"] + (["tsne_1", "tsne_2"] if tsne is not None else [])
    assert list(table.columns) == expected
    np.testing.assert_array_equal(table[["pca_1", "pca_2"]].to_numpy(), PCA)
    csv = pd.read_csv(tmp_path / "results.csv").astype({name: np.float32 for name in expected[3:]})
    pd.testing.assert_frame_equal(csv, table)
    failures = pd.read_csv(tmp_path / "failures.csv")
    assert failures.to_dict("records") == [
        {"path": 'a/2, "two".jpg', "label": "a", "status": "unreadable", "error": "the image is broken", "attempts": 1}
    ]
    assert counts.by_class() == {"a": {"ok": 1, "failed": 1}, "é": {"ok": 1, "failed": 0}}
    assert counts.by_status == {"ok": 2, "unreadable": 1}


def test_write_results_replaces_earlier_tables(tmp_path: Path) -> None:
    output = Location(str(tmp_path))
    report.write_results(output, make_outcomes(), pca=PCA, tsne=TSNE)
    report.write_results(output, make_outcomes()[1:], pca=PCA[2:], tsne=None)
    assert list(report.read_results(output)["path"]) == ["é/3.jpg"]
    assert not (tmp_path / "failures.csv").exists()


def test_write_results_leaves_the_csv_out_where_it_would_be_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report.tables, "_MAX_CSV_ROWS", 2)
    report.write_results(Location(str(tmp_path)), make_outcomes(), pca=PCA, tsne=None)
    assert not (tmp_path / "results.csv").exists()
    assert len(report.read_results(Location(str(tmp_path)))) == 3

"""Files and classes with hostile names: for a disk, a spreadsheet, a page or a terminal."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from playwright.sync_api import sync_playwright

from fruitdask import report
from fruitdask.cli import cli
from fruitdask.core.config import InputConfig, ModelConfig
from fruitdask.core.storage import Location
from fruitdask.errors import ConfigError
from fruitdask.store.catalog import list_images

pytestmark = pytest.mark.slow

NAMES = [
    "<img src=x onerror=window.harmed=1>",
    "<script>window.harmed=2<",
    "{{ 7 * 7 }}{% raw %}",
    '=HYPERLINK("http:||example.org","a")',
    "+1+1",
    "-rf",
    "--overwrite",
    "@SUM(A1)",
    "\ttab",
    "\rreturn",
    "two\nlines\r=1+1",
    "'=1",
    "..",
    "...",
    "%2e%2e%2f",
    "%s%n{0}",
    "$(touch harmed)",
    "`touch harmed`",
    "back\\..\\slash",
    "C:\\harmed",
    "quote'and\"quotes",
    "semi;colon & pipe|",
    "*?[a-z]",
    "[red]rich[bold]",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b2J\x7f",
    "\u202egpj.exe",
    "Ünïcödé 漢字 👩‍🌾",
    " spaces ",
    "~",
    "#anchor?query=1",
    "NA",
    "manifest.json",
]
CONTROLS = ("\x1b", "\x07", "\x9b", "\x7f", "\r", "\u202e")


@pytest.fixture(scope="module")
def finished(
    tiny_model: ModelConfig, sample_folder: Path, client: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Folder of a finished run on images with such names, one of them broken in each class, and its output."""
    folder = tmp_path_factory.mktemp("names")
    images = sorted(sample_folder.rglob("*.jpg"))
    for number, name in enumerate(NAMES):
        label = folder / "in" / (name if name != ".." else "..a")
        label.mkdir(parents=True)
        shutil.copy(images[number % len(images)], label / f"{name}.jpg")
        (label / f"{name} broken.jpg").write_bytes(b"no image")
    sections = {
        "input": {"url": "in"},
        "model": tiny_model.model_dump(exclude_defaults=True),
        "cluster": {"kind": "address", "address": client.scheduler.address},
        "featurize": {"max_failed_fraction": 0.5},
        "explore": {"input_px": 32},
        "plots": {"enabled": False},
        "reduce": {"tsne": {"enabled": True, "perplexity": 5}},
        "output": {"url": "out"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    said = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in ("explore", "run"):
            done = CliRunner(env={"COLUMNS": "200"}).invoke(cli, [command, "run.yaml", "--verbose"])
            said += done.output
            assert done.exit_code == 0, said
    return folder, said


def list_paths(folder: Path) -> list[str]:
    """List the files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_each_image_has_one_outcome_under_its_own_name(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    table = report.read_results(Location(str(folder / "out")))
    assert sorted(table["path"]) == list_paths(folder / "in")
    assert list(table["label"]) == [path.split("/")[0] for path in table["path"]]
    is_broken = table["path"].str.endswith(" broken.jpg")
    assert (table["status"] == is_broken.map({True: "unreadable", False: "ok"})).all()
    failures = report.read_failures(Location(str(folder / "out")))
    assert list(failures["path"]) == list(table["path"][is_broken])
    explored = pd.read_parquet(folder / "out" / "explore.parquet")
    assert list(explored["path"]) == list(table["path"])


def test_nothing_escapes_the_output_folder(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["in", "out", "run.yaml"]
    known = {*report.tables.RESULTS.split(), "config.yaml", "report.html"}
    known |= {"manifest.json", "quality.json", "explore.json"}
    known |= {"results.csv", "failures.csv", "explore.csv", "explore_classes.csv", "explore.parquet"}
    known |= {
        "issues.csv",
        "issues.parquet",
        "explore_classes.parquet",
        "explore.zarr",
        "features.zarr",
        "pca.zarr",
        "partitions",
        "catalog.parquet",
    }
    assert {path.name for path in (folder / "out").iterdir()} == known


@pytest.mark.parametrize("name", ["results", "failures", "explore", "explore_classes"])
def test_no_cell_is_a_formula(finished: tuple[Path, str], name: str) -> None:
    folder, _ = finished
    with (folder / "out" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    n_per_class = {"results": 2, "failures": 1, "explore": 2, "explore_classes": 1}[name]
    assert len(rows) == n_per_class * len(NAMES)
    texts = {"path", "label", "error", "most_typical", "least_typical"} & set(rows[0])
    cells = [row[column] for row in rows for column in texts]
    assert [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))] == []
    assert sum(cell.startswith("'") for cell in cells) >= 8


def test_terminal_gets_no_control_characters(finished: tuple[Path, str]) -> None:
    _, said = finished
    assert [control for control in CONTROLS if control in said] == []
    # A table shows only the names of the first classes.
    assert r"\ttab" in said and "\ttab" not in said


def test_page_shows_names_as_text(finished: tuple[Path, str]) -> None:
    page = (finished[0] / "out" / "report.html").read_text()
    assert "<img src=x" not in page and "<script>window.harmed" not in page
    assert "&lt;img src=x onerror=window.harmed=1&gt;" in page
    assert "{{ 7 * 7 }}{% raw %}" in page


@pytest.fixture
def chromium() -> Iterator[str]:
    """Path of Debian's Chromium."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs a chromium on the PATH, such as Debian's package of that name")
    yield path


@pytest.mark.browser
def test_browser_runs_no_script_in_a_name(finished: tuple[Path, str], chromium: str) -> None:
    page_url = (finished[0] / "out" / "report.html").as_uri()
    requests: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("request", lambda each: requests.append(each.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(page_url)
        page.wait_for_selector("html[data-maps=ready]", state="attached")
        assert page.evaluate("() => window.harmed") is None
        assert page.locator("img[src='x']").count() == 0
        labels = page.evaluate("() => JSON.parse(document.getElementById('maps-data').textContent).labels")
        browser.close()
    assert set(labels) == {"..a" if name == ".." else name for name in NAMES}
    assert (requests, complaints) == ([page_url], [])


def test_error_with_a_name_is_one_escaped_line(finished: tuple[Path, str]) -> None:
    arguments = ["run", str(finished[0] / "run.yaml"), "--set", "input.classes=[none]", "--set", "output.url=o"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2 and "the classes are: " in done.stderr.splitlines()[-1]
    assert [control for control in CONTROLS if control in done.stderr] == []


@pytest.mark.parametrize("path", ["../secret.jpg", "a/../../secret.jpg", "..", "a\\..\\..\\secret.jpg/.."])
def test_manifest_cannot_lead_out_of_the_input(tmp_path: Path, path: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    pd.DataFrame({"path": [path], "label": ["a"]}).to_csv(tmp_path / "list.csv", index=False)
    config = InputConfig(url=str(tmp_path / "in"), manifest=str(tmp_path / "list.csv"))
    with pytest.raises(ConfigError, match=r"paths inside input\.url in input\.manifest, found '.*\.\.'?"):
        list_images(config)

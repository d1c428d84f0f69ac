"""The command that shows the page: in a browser, or where it is."""

import webbrowser
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner, Result
from runs import ON, Finish, configure, draw

from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig


def invoke(*arguments: str) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(cli, arguments)


@pytest.fixture(autouse=True)
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File with the URL that the only browser of this machine has opened."""
    monkeypatch.setattr(webbrowser, "_browsers", {})
    monkeypatch.setattr(webbrowser, "_tryorder", [])
    script = tmp_path / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" > "{tmp_path}/shown"\n')
    script.chmod(0o700)
    webbrowser.register("ours", None, webbrowser.GenericBrowser([str(script), "%s"]))
    return tmp_path / "shown"


@pytest.mark.slow
def test_open_shows_the_page_of_results_and_of_a_configuration(
    tiny_model: ModelConfig, finish: Finish, tmp_path: Path, shown: Path
) -> None:
    draw(tmp_path / "in", "fig/1.png", "fig/2.png")
    finish(configure(tmp_path / "in", tmp_path / "my out", tiny_model, report=ON))
    page, own = tmp_path / "my out" / "report.html", tmp_path / "run.yaml"
    own.write_text("{input: {url: in}, output: {url: my out}}")
    for place in (page.parent, own):
        done = invoke("open", str(place))
        assert (done.exit_code, done.stdout) == (0, f"Opened {page}\n")
        assert shown.read_text() == f"{page.as_uri()}\n"
        shown.unlink()
    page.unlink()
    missing = invoke("open", str(page.parent))
    assert missing.exit_code == 2 and "found results without a page; draw it with fruitdask report" in missing.stderr
    assert invoke("report", str(page.parent)).exit_code == 0 and invoke("open", str(page.parent)).exit_code == 0


def test_open_copies_the_page_of_a_url(tmp_path: Path, shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fsspec.filesystem("memory").pipe("/opened/report.html", "<p>Äpfel</p>".encode())
    done = invoke("open", "memory://opened/")
    copy = Path(done.stdout.strip().removeprefix("Opened "))
    assert copy.parent == tmp_path and copy.read_text(encoding="utf-8") == "<p>Äpfel</p>"
    assert shown.read_text() == f"{copy.as_uri()}\n" and copy.stat().st_mode & 0o077 == 0


def test_open_says_where_the_page_is_without_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webbrowser, "_tryorder", [])
    (tmp_path / "report.html").write_text("<p>")
    done = invoke("open", str(tmp_path))
    assert done.stdout == f"Found no browser; open this file yourself: {tmp_path}/report.html\n"


@pytest.mark.parametrize("place", ["", "nowhere"], ids=["empty", "missing"])
def test_open_without_results_is_one_sentence(place: str, tmp_path: Path) -> None:
    done = invoke("open", str(tmp_path / place))
    assert done.exit_code == 2
    assert done.stderr == (
        f"fruitdask: {tmp_path / place / 'report.html'}: expected the page of a run or an exploration, found no "
        "results; check the folder\n"
    )

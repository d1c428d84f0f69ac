"""Progress in a log and on a terminal."""

import io
import os
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from fruitdask.core import progress
from fruitdask.core.progress import (
    LineProgress,
    LiveProgress,
    NotebookProgress,
    RunProgress,
    choose_progress,
    resolve_progress,
)


def read_lines(reporter: LiveProgress) -> list[str]:
    """Read the lines that are drawn now."""
    return [str(line) for line in reporter._bar.get_renderables()]


def show(reporter: RunProgress) -> None:
    """Go through a run of 100 images, 20 of them done before, 3 of them failed."""
    with reporter:
        reporter.begin("Listing images")
        reporter.begin("Featurizing")
        reporter.say("Dask dashboard: http://127.0.0.1:8787/status")
        reporter.begin_images(100, n_done=20, ask_cluster=lambda: {"n_workers": 2, "dollars": 0.125})
        reporter.advance(40, failures={})
        reporter.advance(40, failures={"unreadable": 3})
        reporter.begin("Reducing")


def test_line_progress_counts_images(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 4.0, 6.0, 12.0])
    # Do not patch the clock of the process, which loops of Dask in other threads use.
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    out = io.StringIO()
    with LineProgress(Console(file=out, width=200)) as reporter:
        answers = iter([{}, {"n_workers": 1}, {"n_workers": 1_000, "dollars": 1234.5}])
        reporter.begin_images(100, n_done=20, ask_cluster=lambda: next(answers))
        reporter.advance(20, failures={})
        reporter.advance(20, failures={"unreadable": 1})
        reporter.advance(40, failures={"unreadable": 2})
    assert out.getvalue().splitlines() == [
        "60 of 100 images, 6.7 images/s, 6 s remaining, 1 failed, 1 worker",
        "100 of 100 images, 6.7 images/s, 0 s remaining, 3 failed, 1,000 workers, $1,234.50",
    ]


def test_line_progress_says_every_few_seconds_how_many_images_were_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    with LineProgress(Console(file=out, width=200)) as reporter:
        for now in (1.0, 4.0, 6.0, 8.0, 12.0):
            reporter.show_listed(int(1_000 * now), now)
    assert out.getvalue().splitlines() == [
        "6,000 images listed, 1,000 images/s",
        "12,000 images listed, 1,000 images/s",
    ]


def test_live_progress_shows_how_many_images_were_listed_of_an_unknown_number() -> None:
    with LiveProgress(Console(file=io.StringIO(), width=80, force_terminal=True)) as reporter:
        reporter.begin("Listing images")
        reporter.show_listed(400, 4.0)
        assert read_lines(reporter)[-1].endswith(" Listing images")
        reporter.show_listed(2_000_000, 10.0)
        assert read_lines(reporter)[-1].endswith(" Listing images 2,000,000 200,000 images/s")


def test_line_progress_writes_stages_and_the_last_count() -> None:
    out = io.StringIO()
    show(LineProgress(Console(file=out, width=200)))
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["Listing images ...", "Featurizing ...", "Dask dashboard: http://127.0.0.1:8787/status"]
    assert lines[-2].startswith("100 of 100 images") and lines[-2].endswith("3 failed, 2 workers, $0.12")


def test_live_progress_shows_bar_rate_and_failures() -> None:
    out = io.StringIO()
    show(LiveProgress(Console(file=out, width=200, force_terminal=True, color_system=None)))
    text = out.getvalue()
    shown = ("Listing images", "100/100", "images/s", "3 failed", "2 workers", "$0.12", "Reducing")
    for expected in (*shown, "http://127.0.0.1:8787/status"):
        assert expected in text


@pytest.mark.parametrize(
    ("width", "n_images", "n_figures"),
    [(60, 90, 3), (60, 1_000_000, 2), (80, 90, 4), (80, 1_000_000, 4), (200, 90, 4), (200, 10_000_000, 4)],
)
def test_figures_of_a_live_line_are_whole_at_any_width(width: int, n_images: int, n_figures: int) -> None:
    reporter = LiveProgress(Console(file=io.StringIO(), width=width, force_terminal=True))
    reporter.begin("Starting the cluster and building the network")
    reporter.begin("Featurizing")
    reporter.begin_images(n_images, n_done=0)
    reporter._started -= 10
    reporter.advance(n_images // 2, failures={"unreadable": 2})
    before, line = read_lines(reporter)
    # Two columns are left for the ^C of a terminal.
    assert before == "✓ 0:00:00 Starting the cluster and building the network" and len(line) <= min(width - 2, 140)
    figures = [f"{n_images // 2:,}/{n_images:,}", "2 failed", r"[\d,.]+ images/s", r"0:00:1\d left"]
    assert re.fullmatch(rf". 0:00:00 Featurizing (━+─+ )?{' '.join(figures[:n_figures])}", line), line
    assert "━" in line or n_images > 90


def test_each_stage_has_one_line_and_the_interrupted_one_says_so() -> None:
    reporter = LiveProgress(Console(file=io.StringIO(), width=80, force_terminal=True))
    with pytest.raises(KeyboardInterrupt, match="^pressed$"), reporter:
        reporter.begin("Listing images")
        reporter.begin("Featurizing")
        reporter.begin_images(8, n_done=4)
        raise KeyboardInterrupt("pressed")
    first, second = read_lines(reporter)
    assert first == "✓ 0:00:00 Listing images"
    assert re.fullmatch("✗ 0:00:00 Featurizing ━+─+ 4/8 0.0 images/s -:--:-- left", second)


def test_live_progress_on_a_terminal_without_unicode() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    show(LiveProgress(Console(file=out, width=200, force_terminal=True, color_system=None)))
    out.seek(0)
    assert "100/100" in out.read()


def test_choose_progress_looks_at_the_console() -> None:
    assert type(choose_progress(Console(file=io.StringIO()))) is LineProgress
    assert type(choose_progress(Console(file=io.StringIO(), force_terminal=True))) is LiveProgress


def test_notebook_progress_replaces_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []

    class Handle:
        def update(self, data: dict[str, str], *, raw: bool) -> None:
            assert raw
            shown.append(data)

    def display(data: object, *, raw: bool = False, display_id: bool = False) -> Handle | None:
        # rich displays messages as separate outputs.
        return Handle() if raw and display_id else None

    monkeypatch.setattr("IPython.display.display", display)
    found = choose_progress(Console(force_jupyter=True))
    assert type(found) is NotebookProgress
    show(found)
    assert "100/100" in shown[-1]["text/plain"] and "100/100" in shown[-1]["text/html"]
    assert shown[-1]["text/html"].startswith("<pre>") and "<b>" not in shown[-1]["text/html"]


def test_resolve_progress_shows_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    own = RunProgress()
    assert resolve_progress(own) is own
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    # Some set this for all programs, also for those whose output goes into a file.
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert type(resolve_progress(None)) is RunProgress and type(resolve_progress(False)) is RunProgress
    monkeypatch.delenv("FORCE_COLOR")
    assert type(resolve_progress(True)) is LineProgress
    ends = os.openpty()
    with os.fdopen(ends[0]), os.fdopen(ends[1], "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert type(resolve_progress(None)) is LiveProgress and type(resolve_progress(False)) is RunProgress

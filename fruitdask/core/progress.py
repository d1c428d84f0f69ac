"""Progress of a run: a live bar on a terminal or in a notebook, plain lines elsewhere."""

import html
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Self

from rich.console import Console, RenderableType
from rich.progress import Progress, Task
from rich.text import Text

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

_SECONDS_BETWEEN_LINES, _SECONDS_BETWEEN_DRAWINGS = 5.0, 0.2
#: Columns of a bar; a shorter one is left out.
_SHORTEST_BAR, _LONGEST_BAR = 4, 40
#: Columns of what a terminal writes when Ctrl-C is pressed.
_INTERRUPTED_WIDTH = len("^C")
#: Returns the ``n_workers`` of a cluster and the ``dollars`` spent on it so far, where known.
AskCluster = Callable[[], Mapping[str, float]]
_SIGNS = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class RunProgress:
    """Progress of a run that shows nothing; a context manager around the run."""

    _n_images = _n_done = _n_before = 0
    _started = _asked = 0.0
    _failures: Mapping[str, int] = {}
    _cluster: Mapping[str, float] = {}

    def __enter__(self) -> Self:
        """Start to show progress."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Stop showing progress."""

    def say(self, message: str) -> None:
        """Show a message."""

    def begin(self, stage: str) -> None:
        """Show that a stage begins."""
        self.say(f"{stage} ...")

    def show_listed(self, n_images: int, seconds: float) -> None:
        """Show how many images were listed so far, of an unknown number, and in how many seconds."""

    def begin_images(self, n_images: int, *, n_done: int, ask_cluster: AskCluster = dict) -> None:
        """Start to count images, and their time; the cluster is asked every few seconds."""
        self._n_images, self._n_done, self._n_before, self._failures = n_images, n_done, n_done, Counter()
        self._started = time.monotonic()
        self._ask_cluster, self._asked, self._cluster = ask_cluster, self._started, ask_cluster()

    def advance(self, n_images: int, *, failures: Mapping[str, int]) -> None:
        """Count images, of which some failed, by kind; and show the counts."""
        self._n_done += n_images
        self._failures = Counter(self._failures) + Counter(failures)
        now = time.monotonic()
        if now - self._asked >= _SECONDS_BETWEEN_LINES:
            self._asked, self._cluster = now, self._ask_cluster()
        self._show(now, (self._n_done - self._n_before) / max(now - self._started, 1e-9))

    @property
    def _n_failed(self) -> int:
        """Number of images that have failed."""
        return sum(self._failures.values())

    def _show(self, now: float, rate: float) -> None:
        """Show the counts, and the rate in images per second."""


class LineProgress(RunProgress):
    """Plain lines every few seconds, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._written = time.monotonic()

    def say(self, message: str) -> None:
        """Write a line."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def show_listed(self, n_images: int, seconds: float) -> None:
        """Write a line if the last one is some seconds old."""
        if seconds >= _SECONDS_BETWEEN_LINES <= time.monotonic() - self._written:
            self._written = time.monotonic()
            self.say(f"{n_images:,} images listed, {n_images / seconds:,.0f} images/s")

    def _show(self, now: float, rate: float) -> None:
        """Write a line if the last one is some seconds old, or if all images are done."""
        if now - max(self._written, self._started) < _SECONDS_BETWEEN_LINES and self._n_done < self._n_images:
            return
        self._written = now
        remaining = (self._n_images - self._n_done) / rate if rate else 0
        self.say(
            f"{self._n_done:,} of {self._n_images:,} images, {rate:.1f} images/s, {remaining:.0f} s remaining, "
            f"{', '.join([f'{self._n_failed:,} failed', *_describe_cluster(self._cluster)])}"
        )


class LiveProgress(LineProgress):
    """A live line for each stage: its time, and a bar with images, images per second, remaining time and failures."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = _Stages(console=console)
        self._task = self._bar.add_task("", visible=False)

    def __enter__(self) -> Self:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Finish the last stage and stop drawing."""
        if kind is None:
            self._finish()
        else:
            self._bar.stop_task(self._task)
        self._bar.stop()

    def begin(self, stage: str) -> None:
        """Finish the previous stage and draw a line for the next one."""
        self._finish()
        self._task = self._bar.add_task(stage, total=None)

    def show_listed(self, n_images: int, seconds: float) -> None:
        """Show them if the stage takes some seconds."""
        if seconds >= _SECONDS_BETWEEN_LINES:
            figures = [(f"{n_images:,}", "green"), (f"{n_images / seconds:,.0f} images/s", "cyan")]
            self._bar.update(self._task, figures=figures)

    def begin_images(self, n_images: int, *, n_done: int, ask_cluster: AskCluster = dict) -> None:
        """Turn the stage's line into a bar."""
        super().begin_images(n_images, n_done=n_done, ask_cluster=ask_cluster)
        self._bar.update(self._task, total=n_images, completed=n_done, figures=self._format_figures(0.0))

    def _show(self, now: float, rate: float) -> None:
        """Update the bar."""
        self._bar.update(self._task, completed=self._n_done, figures=self._format_figures(rate))

    def _format_figures(self, rate: float) -> list[tuple[str, str]]:
        """Format images, failures, images per second and remaining time, each with its style."""
        remaining = timedelta(seconds=round((self._n_images - self._n_done) / rate)) if rate else "-:--:--"
        return [
            (f"{self._n_done:,}/{self._n_images:,}", "green"),
            *([(f"{self._n_failed:,} failed", "red")] if self._n_failed else []),
            (f"{rate:,.{1 if rate < 100 else 0}f} images/s", "cyan"),
            *([(f"{remaining} left", "yellow")] if self._n_done < self._n_images else []),
            *((text, "dim") for text in _describe_cluster(self._cluster)),
        ]

    def _finish(self) -> None:
        """Mark the current stage as finished."""
        task = next(task for task in self._bar.tasks if task.id == self._task)
        total = task.total if task.total is not None else 1
        self._bar.update(self._task, total=total, completed=total)


class NotebookProgress(LiveProgress):
    """The same lines in the output of a notebook's cell, without widgets, drawn again whenever they change."""

    _display: "DisplayHandle | None" = None
    _drawn = 0.0

    def __enter__(self) -> Self:
        """Start drawing."""
        from IPython.display import display

        self._display = display(self._render(), raw=True, display_id=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Finish the last stage."""
        super().__exit__(kind, *details)
        self._draw()

    def begin(self, stage: str) -> None:
        """Finish the previous stage and draw a line for the next one."""
        super().begin(stage)
        self._draw()

    def show_listed(self, n_images: int, seconds: float) -> None:
        """Update the figures, unless that was done a moment ago."""
        super().show_listed(n_images, seconds)
        if time.monotonic() - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self._drawn = time.monotonic()
            self._draw()

    def _show(self, now: float, rate: float) -> None:
        """Update the bar, unless that was done a moment ago."""
        super()._show(now, rate)
        if now - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self._drawn = now
            self._draw()

    def _draw(self) -> None:
        """Draw the lines in place of those before."""
        if self._display is not None:
            self._display.update(self._render(), raw=True)

    def _render(self) -> dict[str, str]:
        """Render the lines as text and as HTML."""
        text = "\n".join(str(line) for line in self._bar.get_renderables())
        return {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}


class _Stages(Progress):
    """A line for each stage, whose width does not depend on the names of other stages."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Render the lines."""
        # The base class calls this in its constructor, before there is a console.
        for task in self.tasks:
            # A terminal writes ^C where the cursor is: a full last line would break there, and be drawn twice.
            width = self.console.width - _INTERRUPTED_WIDTH
            if task.visible:
                yield _render_stage(task, width, is_unicode=self.console.encoding.startswith("utf"))


def _render_stage(task: Task, width: int, *, is_unicode: bool) -> RenderableType:
    """Render a stage: its state, time and name; if it counts images, also the figures and the bar that fit."""
    elapsed = timedelta(seconds=int(task.finished_time if task.finished_time is not None else task.elapsed or 0))
    line = Text.assemble(_choose_sign(task, is_unicode), " ", (str(elapsed), "yellow"), " ", task.description)
    figures = Text()
    for text, style in task.fields.get("figures", ()):
        if line.cell_len + figures.cell_len + len(text) + 1 <= width:
            figures.append(" ").append(text, style)
    n_free = width - line.cell_len - figures.cell_len - 1
    if figures and task.total is not None and n_free >= _SHORTEST_BAR:
        full, empty = ("━", "─") if is_unicode else ("#", "-")
        n_cells = min(n_free, _LONGEST_BAR)
        n_full = int(n_cells * task.percentage / 100)
        line.append(" ").append(full * n_full, "green").append(empty * (n_cells - n_full), "dim")
    line.append(figures).truncate(width)
    return line


def _describe_cluster(figures: Mapping[str, float]) -> Iterator[str]:
    """Describe how many workers a cluster has, and what it has cost so far."""
    if "n_workers" in figures:
        yield f"{figures['n_workers']:,} worker{'s' * (figures['n_workers'] != 1)}"
    if "dollars" in figures:
        yield f"${figures['dollars']:,.2f}"


def _choose_sign(task: Task, is_unicode: bool) -> tuple[str, str]:
    """Choose the sign before a stage: finished, stopped or running."""
    if task.finished:
        return ("✓" if is_unicode else "*", "green")
    if task.stop_time is not None:
        return ("✗" if is_unicode else "x", "red")
    signs = _SIGNS if is_unicode else "-\\|/"
    return signs[int(10 * (task.elapsed or 0)) % len(signs)], "green"


def choose_progress(console: Console | None = None) -> RunProgress:
    """
    Choose how to show progress on a console.

    Parameters
    ----------
    console : Console, optional
        Where to show it; standard error, or the notebook, by default.

    Returns
    -------
    RunProgress
        A live bar on a terminal or in a notebook, lines elsewhere.
    """
    console = console or Console(stderr=True)
    if console.is_jupyter:
        return NotebookProgress(console)
    return LiveProgress(console) if console.is_terminal else LineProgress(console)


def resolve_progress(progress: RunProgress | bool | None) -> RunProgress:
    """Resolve an argument: True shows progress, False does not, None does on a terminal and in a notebook."""
    if isinstance(progress, RunProgress):
        return progress
    console = Console(stderr=True)
    is_shown = console.is_jupyter or console.file.isatty() if progress is None else progress
    return choose_progress(console) if is_shown else RunProgress()

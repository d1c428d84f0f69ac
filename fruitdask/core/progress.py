"""Progress of a run: a live bar on a terminal or in a notebook, plain lines elsewhere."""

import time
from importlib.util import find_spec
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_SECONDS_BETWEEN_LINES = 5.0


class RunProgress:
    """Progress of a run that shows nothing; a context manager around the run."""

    _n_images = _n_done = _n_failed = _n_before = 0
    _started = 0.0

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

    def begin_images(self, n_images: int, *, n_done: int) -> None:
        """Start to count images, and their time."""
        self._n_images, self._n_done, self._n_before, self._n_failed = n_images, n_done, n_done, 0
        self._started = time.monotonic()

    def advance(self, n_images: int, *, n_failed: int) -> None:
        """Count images, and show the counts."""
        self._n_done += n_images
        self._n_failed += n_failed
        now = time.monotonic()
        self._show(now, (self._n_done - self._n_before) / max(now - self._started, 1e-9))

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

    def _show(self, now: float, rate: float) -> None:
        """Write a line if the last one is some seconds old, or if all images are done."""
        if now - max(self._written, self._started) < _SECONDS_BETWEEN_LINES and self._n_done < self._n_images:
            return
        self._written = now
        remaining = (self._n_images - self._n_done) / rate if rate else 0
        self.say(
            f"{self._n_done:,} of {self._n_images:,} images, {rate:.1f} images/s, {remaining:.0f} s remaining, "
            f"{self._n_failed:,} failed"
        )


class LiveProgress(LineProgress):
    """A live bar with images, images per second, remaining time and failures."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        is_unicode = console.encoding.startswith("utf")
        self._bar = Progress(
            SpinnerColumn("dots" if is_unicode else "line", finished_text="[green]✓" if is_unicode else "*"),
            TextColumn("{task.description}"),
            _ForImages(BarColumn(bar_width=28)),
            _ForImages(MofNCompleteColumn()),
            _ForImages(_RateColumn()),
            _ForImages(TimeRemainingColumn()),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", visible=False)

    def __enter__(self) -> Self:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Finish the last stage and stop drawing."""
        if kind is None:
            self._finish()
        self._bar.stop()

    def begin(self, stage: str) -> None:
        """Finish the previous stage and draw a line for the next one."""
        self._finish()
        self._task = self._bar.add_task(stage, total=None)

    def begin_images(self, n_images: int, *, n_done: int) -> None:
        """Turn the stage's line into a bar."""
        super().begin_images(n_images, n_done=n_done)
        self._bar.update(self._task, total=n_images, completed=n_done, rate=0.0, failed=0, counts_images=True)

    def _show(self, now: float, rate: float) -> None:
        """Update the bar."""
        self._bar.update(self._task, completed=self._n_done, rate=rate, failed=self._n_failed)

    def _finish(self) -> None:
        """Mark the current stage as finished."""
        task = next(task for task in self._bar.tasks if task.id == self._task)
        total = task.total if task.total is not None else 1
        self._bar.update(self._task, total=total, completed=total)


class _ForImages(ProgressColumn):
    """A column that is empty until a stage counts images."""

    def __init__(self, column: ProgressColumn) -> None:
        self._column = column
        super().__init__()

    def render(self, task: Task) -> Text:
        """Render the wrapped column, or nothing."""
        return self._column(task) if task.fields.get("counts_images") else Text("")  # type: ignore[return-value]


class _RateColumn(ProgressColumn):
    """Images per second, and the number of failures if there are any."""

    def render(self, task: Task) -> Text:
        """Render both."""
        text = Text(f"{task.fields['rate']:.1f} images/s", style="cyan")
        if task.fields["failed"]:
            text.append(f"  {task.fields['failed']:,} failed", style="red")
        return text


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
        A live bar on a terminal or in a notebook that has ipywidgets, lines elsewhere.
    """
    console = console or Console(stderr=True)
    # In a notebook without ipywidgets, rich would warn at each update of its bar.
    is_live = console.is_terminal or console.is_jupyter and find_spec("ipywidgets") is not None
    return LiveProgress(console) if is_live else LineProgress(console)

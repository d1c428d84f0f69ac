"""Progress as lines of JSON, for monitoring a long run from elsewhere."""

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

from fruitdask.core.progress import AskCluster, RunProgress
from fruitdask.errors import ConfigError

_SECONDS_BETWEEN_LINES = 5.0


class JsonLog(RunProgress):
    """Wraps another progress, and appends a line to a file when a stage begins, every few seconds during a count, and
    at the end.
    """

    _stage = ""
    _written = 0.0

    def __init__(self, shown: RunProgress, path: Path) -> None:
        self._shown = shown
        try:
            self._file: IO[str] = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--log-json {path}: cannot be written: {error.strerror}; name another file") from error

    def __enter__(self) -> Self:
        """Start the wrapped progress and the log."""
        self._shown.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Stop both, and log how the run ended."""
        self._shown.__exit__(kind, *details)
        self._write(ended="complete" if kind is None else kind.__name__)
        self._file.close()

    def say(self, message: str) -> None:
        """Pass a message on."""
        self._shown.say(message)

    def begin(self, stage: str) -> None:
        """Begin a stage in both."""
        self._stage = stage
        self._shown.begin(stage)
        self._write()

    def show_listed(self, n_images: int, seconds: float) -> None:
        """Pass the number of listed images on."""
        self._shown.show_listed(n_images, seconds)

    def begin_images(self, n_images: int, *, n_done: int, ask_cluster: AskCluster = dict) -> None:
        """Begin to count in both."""
        super().begin_images(n_images, n_done=n_done, ask_cluster=ask_cluster)
        self._shown.begin_images(n_images, n_done=n_done, ask_cluster=ask_cluster)

    def advance(self, n_images: int, *, failures: Mapping[str, int]) -> None:
        """Count in both."""
        self._shown.advance(n_images, failures=failures)
        super().advance(n_images, failures=failures)

    def _show(self, now: float, rate: float) -> None:
        """Write the counts if the last line is some seconds old, or if all images are done."""
        if now - self._written >= _SECONDS_BETWEEN_LINES or self._n_done >= self._n_images:
            self._write(
                n_images=self._n_images,
                n_done=self._n_done,
                n_failed=self._n_failed,
                failures=dict(self._failures),
                images_per_second=round(rate, 2),
                remaining_seconds=round((self._n_images - self._n_done) / rate, 1) if rate else None,
                **self._cluster,
            )

    def _write(self, **figures: Any) -> None:
        """Write a line at once, so that a reader sees it."""
        self._written = time.monotonic()
        line = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "stage": self._stage, **figures}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

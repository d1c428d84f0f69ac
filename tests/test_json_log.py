"""Progress as lines of JSON."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from test_progress import show

from fruitdask.core.json_log import JsonLog
from fruitdask.core.progress import RunProgress
from fruitdask.errors import ConfigError


class Noted(RunProgress):
    """Records what it should show."""

    def __init__(self) -> None:
        self.noted: list[object] = []

    def say(self, message: str) -> None:
        self.noted.append(message)

    def _show(self, now: float, rate: float) -> None:
        self.noted.append((self._n_done, self._n_failed))


def test_json_log_has_stages_counts_and_the_end(tmp_path: Path) -> None:
    path, noted = tmp_path / "log.jsonl", Noted()
    show(JsonLog(noted, path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["Listing images", "Featurizing", "Featurizing", "Reducing", "Reducing"]
    counted = lines[2]
    assert (counted["n_images"], counted["n_done"], counted["failures"]) == (100, 100, {"unreadable": 3})
    assert (counted["n_workers"], counted["dollars"]) == (2, 0.125)
    assert counted["images_per_second"] > 0 and counted["remaining_seconds"] == 0
    assert lines[-1]["ended"] == "complete" and datetime.fromisoformat(lines[-1]["at"]).tzinfo is not None
    assert noted.noted[0] == "Listing images ..." and (100, 3) in noted.noted


def test_json_log_is_appended_to_and_says_what_ended_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"stage": "before"}\n')
    with pytest.raises(LookupError, match="in this test"), JsonLog(RunProgress(), path) as log:
        log.begin("Featurizing")
        raise LookupError("in this test")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("ended") for line in lines] == [None, None, "LookupError"]


def test_json_log_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    message = "^--log-json .*cannot be written: No such file or directory; name another file$"
    with pytest.raises(ConfigError, match=message):
        JsonLog(RunProgress(), tmp_path / "none" / "log.jsonl")

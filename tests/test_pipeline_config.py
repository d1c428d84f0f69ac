"""The configuration in the results: it is the one that ran, it can be run again, and it holds no secrets."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from runs import EXTRAS, OFF, Finish, MakeConfig, configure, draw

import fruitdask
from fruitdask.core.config import Config, ModelConfig, load_config
from fruitdask.core.storage import Location
from fruitdask.errors import OutputError, SettingsError
from fruitdask.pipeline.config import describe_config, read_config, write_config


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: ModelConfig) -> MakeConfig:
    """Configure runs on three images."""
    draw(tmp_path / "in", "fig/1.png", "fig/2.png", "kiwi/1.png")

    def make(**sections: dict[str, object]) -> Config:
        return configure(tmp_path / "in", tmp_path / "out", tiny_model, **sections)

    return make


def test_the_configuration_of_a_run_runs_again(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    finish(config := make_config(input={"label_from": "first"}))
    # The runs of a session are computed elsewhere and copied.
    again = load_config(tmp_path / "out" / "config.yaml", overrides=[f"output.url={tmp_path / 'out'}"])
    assert again == config
    assert fruitdask.run(again).n_computed == 0


@pytest.mark.slow
def test_a_change_without_new_images_is_written(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    finish(make_config())
    changed = make_config(reduce={"n_components": 1}, output={"overwrite": False})
    assert fruitdask.run(changed).n_computed == 0
    assert load_config(tmp_path / "out" / "config.yaml") == changed


def test_overwriting_is_not_stored(make_config: MakeConfig, client: Any, tmp_path: Path) -> None:
    fruitdask.run(make_config(output={"overwrite": True}), client=client)
    assert load_config(tmp_path / "out" / "config.yaml") == make_config()


@pytest.mark.slow
def test_an_exploration_writes_its_configuration_but_keeps_that_of_a_run(
    make_config: MakeConfig, finish: Finish, client: Any, tmp_path: Path
) -> None:
    (other := make_config(output={"url": str(tmp_path / "explored")}, explore={"scale": "unit"}))
    fruitdask.explore(other, client=client)
    assert load_config(tmp_path / "explored" / "config.yaml") == other
    # A run in the same folder accepts this file.
    assert fruitdask.run(other, client=client).n_computed == 3
    before = (tmp_path / "explored" / "config.yaml").read_bytes()
    fruitdask.explore(make_config(output={"url": str(tmp_path / "explored")}), client=client)
    assert (tmp_path / "explored" / "config.yaml").read_bytes() == before


def test_foreign_file_is_not_overwritten(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("mine")
    with pytest.raises(OutputError, match=r"found config\.yaml, which no fruitdask run wrote; choose"):
        fruitdask.run(make_config())
    assert (tmp_path / "out" / "config.yaml").read_text() == "mine"


def test_secrets_and_names_of_images_become_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"key": "secret-1", "anon": False, "client_kwargs": {"endpoint_url": "https://secret-2"}, "port": 9}
    sections: dict[str, Any] = {
        "input": {"url": "https://me:secret-3@example.org/fruits", "storage_options": options, "exclude": ["secret-4"]},
        "output": {"url": str(tmp_path / "out")},
        "cluster": {"class": "dask.distributed.LocalCluster", "n_workers": 1, "options": {"silence-logs": "secret-5"}},
        "explore": OFF,
    }
    config = load_config(sections)
    write_config(Location(config.output.url), config)
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert "secret-" not in text
    assert describe_config(config)["input"]["storage_options"] == {
        "key": "${FRUITDASK_INPUT_STORAGE_OPTIONS_KEY}",
        "anon": False,
        "client_kwargs": {"endpoint_url": "${FRUITDASK_INPUT_STORAGE_OPTIONS_CLIENT_KWARGS_ENDPOINT_URL}"},
        "port": 9,
    }
    with pytest.raises(SettingsError, match=r"yaml, line \d+: .*FRUITDASK_INPUT_EXCLUDE_1 is not set; set"):
        load_config(tmp_path / "out" / "config.yaml")
    for name, value in {
        "INPUT_URL": sections["input"]["url"],
        "INPUT_STORAGE_OPTIONS_KEY": "secret-1",
        "INPUT_STORAGE_OPTIONS_CLIENT_KWARGS_ENDPOINT_URL": "https://secret-2",
        "INPUT_EXCLUDE_1": "secret-4",
        "CLUSTER_OPTIONS_SILENCE_LOGS": "secret-5",
    }.items():
        monkeypatch.setenv(f"FRUITDASK_{name}", value)
    assert load_config(tmp_path / "out" / "config.yaml") == config


def test_read_config_follows_a_moved_folder(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    assert read_config(Location(str(tmp_path / "in"))) is None
    finish(make_config())
    (tmp_path / "out").rename(tmp_path / "moved")
    output = Location(str(tmp_path / "moved"))
    whole, part = read_config(output), read_config(output, sections=("output", "plots"))
    assert whole is not None and part is not None
    assert load_config(whole) == make_config(output={"url": output.url})
    assert (set(part), part["output"]["url"]) == ({"input", "output", "plots"}, output.url)
    # The page names the photographs.
    assert part["input"] == {"url": whole["input"]["url"], "extensions": None}
    # Photographs may have a file of that name beside them.
    for name in ("manifest.json", "explore.json"):
        (tmp_path / "moved" / name).unlink(missing_ok=True)
    assert read_config(output) is None


def test_read_config_takes_a_url(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    finish(make_config())
    fsspec.filesystem("memory").put(str(tmp_path / "out"), "/configured", recursive=True)
    read = read_config(Location("memory://configured"))
    assert read is not None
    assert load_config(read) == make_config(output={"url": "memory://configured"})


def test_the_header_says_how_to_run_it(make_config: MakeConfig, tmp_path: Path) -> None:
    write_config(Location(str(tmp_path)), make_config())
    text = (tmp_path / "config.yaml").read_text()
    assert "fruitdask run config.yaml\n" in text and "secret" not in text
    assert json.loads(json.dumps(yaml.safe_load(text)))["quality"]["enabled"] is ("quality" not in EXTRAS)

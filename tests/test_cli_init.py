"""The command that writes a configuration: its files run, and it overwrites nothing."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from runs import EXTRAS, draw

from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig, load_config


def invoke(*arguments: str) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(cli, arguments)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_init_writes_a_configuration_that_runs(home: Path, tiny_model: ModelConfig, client: Any) -> None:
    draw(home / "my: fruits", "fig/1.png", "kiwi/1.png", "kiwi/2.png")
    done = invoke("init", "my: fruits", "fruits.yaml")
    assert (done.exit_code, done.stdout) == (0, "Wrote fruits.yaml. Next: fruitdask run fruits.yaml\n")
    settings = [f"cluster.address={client.scheduler.address}", "model.preprocessing=none"]
    settings += [f"{name}.enabled=false" for name in EXTRAS]
    options = [part for setting in settings for part in ("--set", setting)]
    ran = invoke("run", "fruits.yaml", f"--weights={tiny_model.weights}", *options)
    assert ran.exit_code == 0, ran.output
    assert len(pd.read_csv(home / "my: fruits-results" / "results.csv")) == 3


def test_init_without_photographs_draws_a_sample(home: Path) -> None:
    done = invoke("init")
    assert (done.exit_code, done.stdout) == (0, "Wrote fruitdask.yaml. Next: fruitdask run fruitdask.yaml\n")
    config = load_config("fruitdask.yaml")
    assert (config.input.url, config.output.url) == (f"{home}/photographs", f"{home}/photographs-results")
    assert config.input.sample is not None
    assert config == load_config({"input": config.input.model_dump(), "output": {"url": config.output.url}})


def test_init_of_a_url_is_valid(home: Path) -> None:
    assert invoke("init", "s3://fruits/Test").exit_code == 0
    assert load_config("fruitdask.yaml").output.url == "s3://fruits/Test-results"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["in"], "fruitdask.yaml: expected a new file, found one; name another as the second argument"),
        (["nothing"], "nothing: expected a folder, an archive or a URL of photographs, found nothing"),
        (["fruitdask.yaml"], "fruitdask.yaml: expected a folder, an archive or a URL of photographs, found a file"),
        (["in", "no/such/folder.yaml"], "no/such/folder.yaml: cannot be written: No such file or directory; name anot"),
        (["s3://bucket"], "results cannot be stored beside a whole bucket"),
        (["results"], "results: expected photographs or a configuration file, found the results of a run"),
    ],
    ids=["existing", "nothing", "file", "folder", "bucket", "results"],
)
def test_init_refuses_in_one_sentence(home: Path, arguments: list[str], sentence: str) -> None:
    (home / "in").mkdir()
    (home / "results").mkdir()
    (home / "results" / "manifest.json").write_text("{}")
    (home / "fruitdask.yaml").write_text("mine")
    refused = invoke("init", *arguments)
    assert refused.exit_code == 2 and sentence in refused.stderr and refused.stderr.count("\n") == 1
    assert (home / "fruitdask.yaml").read_text() == "mine"

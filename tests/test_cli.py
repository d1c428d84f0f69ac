"""The command line as users see it: sentences, exit codes, no traceback."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner, Result
from commands import CommandHost
from runs import EXTRAS, OFF, ON, Finish, break_image, configure, draw

from fruitdask.cli import cli
from fruitdask.cli.common import print_rows, reported
from fruitdask.core.config import ModelConfig
from fruitdask.worker.models import build_artifact
from fruitdask.worker.models.cache import keep_artifact

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def invoke(*arguments: str) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(cli, arguments)


@pytest.fixture
def config_path(tiny_model: ModelConfig, sample_folder: Path, client: Any, tmp_path: Path) -> Path:
    """Configuration file of a run of the tiny model on the drawn images, on this session's cluster, without the stages
    that take longest.
    """
    sections = {
        "input": {"url": str(sample_folder)},
        "model": tiny_model.model_dump(exclude_defaults=True),
        "cluster": {"kind": "address", "address": client.scheduler.address},
        "featurize": {"images_per_partition": 4},
        **dict.fromkeys(EXTRAS, OFF),
        "output": {"url": "out"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def change(path: Path, **sections: dict[str, Any]) -> None:
    """Replace sections of a configuration file."""
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | sections))


def use_own_cluster(path: Path) -> None:
    """Make a configuration start its own cluster."""
    change(path, cluster={"n_workers": 1, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"})


def run_in_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m fruitdask`` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "fruitdask", *arguments], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.slow
def test_run_shows_progress_and_a_summary_and_does_nothing_the_second_time(
    config_path: Path, commands: CommandHost
) -> None:
    use_own_cluster(config_path)
    change(config_path, **dict.fromkeys(EXTRAS, ON))
    log = config_path.parent / "log.jsonl"
    arguments = ["--set", "reduce.tsne.enabled=true", "--log-json", str(log)]
    first = commands.run("run", str(config_path), *arguments, environment=os.environ | {"COLUMNS": "120"})
    assert (first.returncode, "Traceback" in first.stderr) == (0, False)
    for expected in ("Listing images", "Dask dashboard: http://127.0.0.1:", "24 of 24 images", "0 failed", "Reducing"):
        assert expected in first.stderr
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert {"Listing images", "Reducing"} < {line["stage"] for line in lines} and lines[-1]["ended"] == "complete"
    assert [line["n_failed"] for line in lines if line.get("n_done") == 24] == [0]
    report = config_path.parent / "out" / "report.html"
    for expected in ("pear_1", "24 ok, 0 failed", "images/s", "predict", "idle", "by 2 components", str(report)):
        assert expected in first.stdout
    assert ", layer colours, 6 features, " in first.stdout
    assert json.loads(report.with_name("manifest.json").read_text())["model"]["layer"] == "colours"
    assert "tsne_2" in pd.read_csv(report.with_name("results.csv")).columns
    page = report.read_text()
    assert page.startswith("<!DOCTYPE html>") and ", layer colours)" in page
    second = invoke("run", str(config_path), "--set", "reduce.tsne.enabled=true")
    assert second.exit_code == 0 and "All 24 images were already done: nothing to compute." in second.stdout


@pytest.mark.slow
def test_names_that_an_output_cannot_print_are_replaced(config_path: Path, sample_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "苹果").symlink_to(sample_folder / "apple_red_1")
    (tmp_path / "in" / "über").symlink_to(sample_folder / "pear_1")
    arguments = ("run", str(config_path), "--set", f"input.url={tmp_path / 'in'}")
    for encoding, expected in (("ascii", {"??", "?ber"}), ("cp1252", {"??", "über"})):
        done = subprocess.run(
            [sys.executable, "-m", "fruitdask", *arguments],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )
        assert done.returncode == 0, done.stderr
        assert expected < set(done.stdout.decode(encoding).split())
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(table["label"]) == {"苹果", "über"}


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--set", "model.nam=VGG16"], 2, "unknown key model.nam; did you mean name?"),
        (["--set", "input.limit=many"], 2, "input.limit: .*integer.*found 'many'"),
        (["--set", "input.url=/no/such/folder"], 2, "/no/such/folder: there is no such folder; check input.url"),
        (["--set", "input.url={empty}"], 2, "empty: expected images .*found none"),
        (
            ["--set", "input.classes=[pineapple]"],
            2,
            "input.classes names pineapple, which is not there; the classes are: .*pear_1",
        ),
        (["--set", "input.url=gs://bucket/photos"], 2, "protocol 'gs' needs a package that is not installed. .*gcsfs"),
        (["--set", "input.manifest=/no/such.csv"], 2, "cannot read /no/such.csv: .*check the path and the permissions"),
        (["--set", "output.url={input}/out"], 2, "lies inside input.url"),
        (["--set", "reduce.n_components=100"], 2, "n_components is 100, but there are only 24 images"),
        (["--set", "model.weights=/no/such.h5"], 2, "cannot read /no/such.h5"),
        (
            ["--set", "model.weights={text}.h5", "--set", "model.name=SqueezeNet"],
            2,
            r"text\.h5: expected Keras weights or a Keras model, found something else or a damaged file",
        ),
        (
            ["--set", "input.url={broken}"],
            3,
            "3 of 3 images failed, more than featurize.max_failed_fraction .0.05. allows",
        ),
    ],
    ids=[
        "key",
        "type",
        "folder",
        "empty",
        "class",
        "protocol",
        "manifest",
        "inside",
        "components",
        "weights",
        "weights misfit",
        "failures",
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(
    config_path: Path, sample_folder: Path, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.h5").write_text("no weights")
    (tmp_path / "broken" / "apple").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "broken" / "apple" / f"{number}.jpg").write_bytes(b"no image")
    places = {
        "empty": tmp_path / "empty",
        "input": sample_folder,
        "text": tmp_path / "text",
        "broken": tmp_path / "broken",
    }
    result = invoke("run", str(config_path), *(argument.format(**places) for argument in arguments))
    assert result.exit_code == code, result.output
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("fruitdask: ")
    assert pd.Series([last_line]).str.contains(sentence).all(), last_line
    if code == 2:
        assert not (tmp_path / "out").exists()


def test_wrong_file_of_dasks_settings_is_one_sentence(config_path: Path, tmp_path: Path) -> None:
    use_own_cluster(config_path)
    (tmp_path / "dask.yaml").write_text("distributed: [\n")
    done = run_in_process("run", str(config_path), DASK_CONFIG=str(tmp_path / "dask.yaml"))
    assert done.returncode == 2
    assert re.fullmatch(
        rf"fruitdask: A dask config file at '{tmp_path}/dask\.yaml' is malformed, .*; correct or delete it\n",
        done.stderr,
    )


def test_unreachable_scheduler_is_one_sentence(config_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
    change(config_path, cluster={"kind": "address", "address": address, "timeout_seconds": 0.5})
    result = invoke("run", str(config_path))
    assert result.exit_code == 5
    sentence = f"fruitdask: cluster.address {address}: no scheduler answered within 0.5 s; check that it runs there"
    assert result.stderr.strip().splitlines()[-1] == sentence
    assert not (config_path.parent / "out").exists()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_one_sentence(config_path: Path) -> None:
    config_path.parent.joinpath("locked").mkdir(mode=0o500)
    result = invoke("run", str(config_path), "--set", f"output.url={config_path.parent}/locked/out")
    assert result.exit_code == 2 and "no permission to write in" in result.stderr


def test_unwritable_place_is_one_sentence(config_path: Path) -> None:
    result = invoke("run", str(config_path), "--set", "output.url=/proc/fruitdask/out")
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith("fruitdask: ")


@pytest.mark.slow
def test_storage_that_fails_while_running_is_not_a_wrong_configuration(config_path: Path) -> None:
    resource = pytest.importorskip("resource")
    page = config_path.parent / "out" / "report.html"
    change(config_path, report=ON, quality=ON)
    # Enough for all files but the page, which the client writes last.
    result = subprocess.run(
        [sys.executable, "-m", "fruitdask", "run", str(config_path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert result.returncode == 1, result.stderr
    assert re.match(rf"fruitdask: cannot write {page}: .*File too large", result.stderr.splitlines()[-1])
    again = invoke("run", str(config_path))
    assert again.exit_code == 0 and "nothing to compute" in again.stdout and page.stat().st_size > 500_000


def test_validate_prints_each_mistake_on_its_own_line(config_path: Path) -> None:
    result = invoke("validate", str(config_path), "--set", "modle.x=1", "--set", "plots.dpi=3")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "fruitdask: --set modle.x=1: unknown key modle; did you mean model?",
        "fruitdask: --set plots.dpi=3: plots.dpi: expected at least 50, found 3",
    ]


def test_validate_checks_without_touching_the_data(config_path: Path) -> None:
    result = invoke("validate", str(config_path), "--set", "input.url=s3://no-such-bucket/photos")
    assert (result.exit_code, result.output) == (0, f"{config_path} is valid.\n")
    result = invoke("validate", str(config_path.with_name("missing.yaml")))
    assert result.exit_code == 2 and "there is no such configuration file" in result.stderr


def test_schema_describes_the_demo() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(invoke("schema").stdout)
    jsonschema.validate(yaml.safe_load(DEMO.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError, match="'colour' was unexpected"):
        jsonschema.validate({"input": {"url": "x", "colour": 1}, "output": {"url": "y"}}, schema)


def test_sample_draws_and_refuses_to_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "fruits"
    result = invoke("sample", str(folder), "--per-class", "1", "--size", "32", "--seed", "3")
    assert (result.exit_code, result.output) == (0, f"Drew 6 images into {folder}.\n")
    before = {path: path.read_bytes() for path in folder.rglob("*.jpg")}
    result = invoke("sample", str(folder))
    assert (result.exit_code, result.stderr) == (
        2,
        f"fruitdask: Expected a new or empty folder for the sample, but {folder} cannot be created "
        "(Directory not empty); name another folder.\n",
    )
    assert {path: path.read_bytes() for path in folder.rglob("*.jpg")} == before


@pytest.mark.parametrize("command", ["", *cli.commands])
def test_help_shows_whole_sentences_at_80_columns(command: str) -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli, [*filter(None, [command]), "--help"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0].startswith("Usage:") and max(map(len, lines)) <= 80
    # click truncates a sentence that is too long for one line.
    if command != "clusters":
        assert not [line for line in lines[1:] if re.search(r"[a-z]\.\.\.$", line)]


@pytest.mark.slow
def test_run_needs_only_a_folder(
    tiny_model: ModelConfig, sample_folder: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sample_folder, tmp_path / "own: fruits")
    shutil.make_archive(str(tmp_path / "packed"), "zip", sample_folder)
    monkeypatch.chdir(tmp_path)
    settings = [f"cluster.address={client.scheduler.address}", "model.preprocessing=none"]
    settings += [f"{name}.enabled=false" for name in EXTRAS]
    options = [f"--weights={tiny_model.weights}", *(part for setting in settings for part in ("--set", setting))]
    for arguments, results in (
        (["own: fruits"], "own: fruits-results"),
        (["packed.zip"], "packed-results"),
        (["own: fruits", "to: elsewhere"], "to: elsewhere"),
    ):
        done = invoke("run", *arguments, *options)
        assert done.exit_code == 0, done.output
        assert len(pd.read_csv(tmp_path / results / "results.csv")) == 24
    refused = invoke("run", "to: elsewhere", *options)
    assert refused.exit_code == 2 and "found the results of a run" in refused.output
    assert f"name {Path('to: elsewhere', 'config.yaml')}" in refused.output


@pytest.mark.slow
def test_folder_means_the_results_beside_it(tiny_model: ModelConfig, finish: Finish, tmp_path: Path) -> None:
    draw(tmp_path / "in", "fig/1.png", "fig/2.png")
    finish(configure(tmp_path / "in", tmp_path / "in-results", tiny_model))
    for command in ("verify", "validate", "report"):
        done = invoke(command, str(tmp_path / "in"))
        assert done.exit_code == 0, done.output
    assert f"{tmp_path}/in-results/report.html" in done.output
    # These are not the results beside them.
    assert invoke("check", str(tmp_path / "in" / "fig")).exit_code == 2


@pytest.mark.parametrize("command", ["run", "plan", "explore", "report", "validate"])
def test_a_missing_folder_is_one_sentence(command: str, tmp_path: Path) -> None:
    refused = invoke(command, f"{tmp_path}/apples")
    assert (refused.exit_code, refused.stderr) == (
        2,
        f"fruitdask: {tmp_path}/apples: there is no such folder, archive or configuration file; check the path\n",
    )


def test_short_options_name_the_network(config_path: Path) -> None:
    named = invoke("run", str(config_path), "--model", "MobilNetV2", "--weights", "imagenet")
    assert named.exit_code == 2 and "did you mean MobileNetV2" in named.stderr
    # The long option, which a script may append, takes precedence.
    missing = invoke("run", str(config_path), "--weights", "x.h5", "--set", "model.weights=/no/such.h5")
    assert missing.exit_code == 2 and "cannot read /no/such.h5" in missing.stderr


def test_results_may_go_elsewhere_than_a_configuration_says(config_path: Path, tmp_path: Path) -> None:
    assert invoke("run", str(config_path), str(tmp_path / "elsewhere: 🍎")).exit_code == 0
    assert (tmp_path / "elsewhere: 🍎" / "results.csv").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["s3://bucket", "s3://bucket/", "zip://Test::s3://bucket"])
def test_results_of_a_bucket_need_an_output(place: str) -> None:
    refused = invoke("plan", place)
    assert refused.exit_code == 2 and "results cannot be stored beside a whole bucket" in refused.output


@pytest.mark.slow
@pytest.mark.usefixtures("squeezenet")
def test_demo_runs_offline(commands: CommandHost, tmp_path: Path) -> None:
    places = [
        "--set",
        f"input.url={tmp_path}/photographs",
        "--set",
        f"output.url={tmp_path}/results",
        "--set",
        "input.sample.per_class=2",
        "--set",
        "plots.enabled=false",
    ]
    offline = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = commands.run("run", str(DEMO), *places, environment=os.environ | offline)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "results" / "results.csv")
    assert len(table) == 12 and {"pca_5", "tsne_2"} <= set(table.columns)


def test_verbose_shows_where_and_keeps_the_exit_code(config_path: Path) -> None:
    done = invoke("run", str(config_path), "--verbose", "--set", "reduce.n_components=99")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith(
        "fruitdask: reduce.n_components is 99"
    )


@pytest.mark.slow
def test_each_run_warns_about_random_weights(config_path: Path) -> None:
    model = ModelConfig(name="SqueezeNet", weights="random", input_px=64)
    keep_artifact(model, build_artifact(model))
    change(config_path, model=model.model_dump(exclude_defaults=True))
    for _ in range(2):
        result = invoke("run", str(config_path))
        assert result.exit_code == 0 and "Warning: model.weights is random" in result.stderr


def test_summary_names_failures_and_findings_and_only_its_own_seconds(
    tiny_model: ModelConfig, finish: Finish, client: Any, tmp_path: Path
) -> None:
    draw(tmp_path / "in", "fig/1.png", "fig/2.png", "kiwi/1.png", "kiwi/2.png")
    shutil.copyfile(tmp_path / "in" / "fig" / "1.png", tmp_path / "in" / "kiwi" / "copy.png")
    break_image(tmp_path / "in" / "fig" / "2.png")
    sections = {"explore": ON, "featurize": {"max_failed_fraction": 0.5}}
    finish(configure(tmp_path / "in", tmp_path / "out", tiny_model, **sections))
    done = invoke("run", str(tmp_path / "out" / "config.yaml"), str(tmp_path / "out"))
    rows = {name.strip(): value for name, value in re.findall(r"^(.{18})  (.*)$", done.stdout, re.MULTILINE)}
    assert done.exit_code == 0 and "nothing to compute" in done.stdout
    assert rows["failures"] == str(tmp_path / "out" / "failures.csv") and Path(rows["failures"]).exists()
    assert rows["duplicates"] == "2 images in 1 group, 1 of them across classes"
    assert rows["files that contain"] == "camera data 0, positions 0, serial numbers 0, names 0"
    assert re.fullmatch(r"list \d\.\d, total \d\.\d", rows["seconds"]) and "workers' time" not in rows


def test_rows_break_between_words_on_a_terminal_and_never_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, place = " ".join(["seconds"] * 20), "/long folder" * 12
    print_rows({"speed": words, "results": place})
    assert capsys.readouterr().out.splitlines() == [f"{'speed':>18}  {words}", f"{'results':>18}  {place}"]
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "80"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    print_rows({"speed": words, "results": place})
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines[:-1])) <= 80 and lines[-1] == f"{'results':>18}  {place}"
    assert {word for line in lines[1:-1] for word in line.split()} == {"seconds"}
    assert all(line.startswith(" " * 20 + "s") for line in lines[1:-1])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["validate", "report", "verify", "check", "iam-policy"])
def test_folder_of_results_stands_for_its_configuration_anywhere(
    command: str, tiny_model: ModelConfig, finish: Finish, tmp_path: Path
) -> None:
    draw(tmp_path / "in", "fig/1.png", "fig/2.png")
    finish(configure(tmp_path / "in", tmp_path / "out", tiny_model, check=ON))
    (tmp_path / "out").rename(tmp_path / "moved")
    for place in ("moved", "moved/"):
        done = invoke(command, str(tmp_path / place))
        assert done.exit_code == 0, done.output
        assert str(tmp_path / "out") not in done.output and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_erase_takes_a_results_folder(tiny_model: ModelConfig, finish: Finish, client: Any, tmp_path: Path) -> None:
    draw(tmp_path / "in", "fig/1.png", "fig/2.png", "fig/3.png")
    finish(configure(tmp_path / "in", tmp_path / "out", tiny_model))
    (tmp_path / "in" / "fig" / "3.png").unlink()
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    erased = invoke("erase", str(tmp_path / "copy"), "--path", "fig/3.png", "--yes")
    assert erased.exit_code == 0, erased.output
    tables = [pd.read_csv(tmp_path / name / "results.csv")["path"].tolist() for name in ("copy", "out")]
    assert tables == [["fig/1.png", "fig/2.png"], ["fig/1.png", "fig/2.png", "fig/3.png"]]
    assert "exclude" not in (tmp_path / "copy" / "config.yaml").read_text()
    for command in ("report", "validate"):
        assert invoke(command, str(tmp_path / "copy")).exit_code == 0
    erased = invoke("erase", str(tmp_path / "copy"), "--path", "fig/2.png", "--yes")
    assert erased.exit_code == 0, erased.output
    assert pd.read_csv(tmp_path / "copy" / "results.csv")["path"].tolist() == ["fig/1.png"]
    # That file still exists, so a run must be told to leave it out; no file contains its name.
    again = invoke("run", str(tmp_path / "copy" / "config.yaml"))
    assert again.exit_code == 2 and "the environment variable FRUITDASK_INPUT_EXCLUDE_1 is not set" in again.stderr


def test_explore_then_report(config_path: Path) -> None:
    change(config_path, report=ON)
    explored = CliRunner(env={"COLUMNS": "120"}).invoke(cli, ["explore", str(config_path)])
    assert explored.exit_code == 0
    assert "24 of 24 images" in explored.stderr and "Dask dashboard" not in explored.stdout
    for expected in (
        "pear_1",
        "64 x 64",
        "24 readable, 0 not",
        "camera data 0, positions 0, serial",
        "near duplicates",
    ):
        assert expected in explored.stdout
    page = config_path.parent / "out" / "report.html"
    page.unlink()
    result = invoke("report", str(config_path))
    assert (result.exit_code, result.output) == (0, f"Wrote {page}\n")
    assert "pear_1" in page.read_text()


def test_report_without_results_is_one_sentence(config_path: Path) -> None:
    result = invoke("report", str(config_path))
    assert result.exit_code == 2
    assert result.stderr.strip() == (
        f"fruitdask: {config_path.parent / 'out'}: expected a finished run or exploration, found none; "
        "use fruitdask run or fruitdask explore first"
    )
    assert not (config_path.parent / "out").exists()


def test_names_with_brackets_are_shown_as_they_are(config_path: Path, sample_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "[red]apple").symlink_to(sample_folder / "apple_red_1")
    (tmp_path / "in" / "[").mkdir()
    (tmp_path / "in" / "[" / "b]").symlink_to(sample_folder / "pear_1")
    arguments = [
        "--set",
        f"input.url={tmp_path}/in",
        "--set",
        f"output.url={tmp_path}/[out]",
        "--set",
        "explore.input_px=32",
    ]
    for command in ("explore", "run"):
        result = invoke(command, str(config_path), *arguments)
        assert result.exit_code == 0, result.output
        assert "[red]apple" in result.stdout and "b]" in result.stdout and "[out]" in result.stdout


@pytest.mark.slow
def test_verify_names_damage_and_a_run_repairs_it(config_path: Path) -> None:
    output = config_path.parent / "out"
    assert invoke("run", str(config_path)).exit_code == 0
    for place in (output, config_path):
        well = invoke("verify", str(place))
        assert (well.exit_code, "faults  none" in well.stdout) == (0, True)
        assert "24 images in 6 partitions" in well.stdout
    chunk = output / "features.zarr" / "features" / "c" / "2" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    damaged = invoke("verify", str(config_path))
    assert f"fruitdask verify {config_path} --repair, then fruitdask run {config_path}" in damaged.stdout
    damaged = invoke("verify", str(output))
    assert damaged.exit_code == 1
    assert "features.zarr/features, chunk 2: it is damaged" in damaged.stdout
    assert f"fruitdask verify {output} --repair, then fruitdask run with its configuration" in damaged.stdout
    reduced = invoke("run", str(config_path), "--set", "reduce.n_components=3")
    assert reduced.exit_code == 1 and reduced.stderr.splitlines()[-1].startswith(f"fruitdask: {chunk} is damaged")
    assert invoke("verify", str(output), "--repair").exit_code == 0
    assert "1 of 6 partitions and the results are still to be computed" in invoke("verify", str(output)).stdout
    again = invoke("run", str(config_path))
    assert again.exit_code == 0 and "24 ok, 0 failed" in again.stdout
    assert invoke("verify", str(output)).exit_code == 0


def test_report_of_damaged_results_is_one_sentence(config_path: Path) -> None:
    change(config_path, quality=ON)
    output = config_path.parent / "out"
    assert invoke("run", str(config_path)).exit_code == 0
    # A table of failures is optional, but is read if it exists.
    (output / "failures.csv").write_text("path,label,status,error,attempts\n")
    for name, content in (
        ("results.parquet/part-00000.parquet", b"PAR1"),
        ("quality.json", b"{"),
        ("failures.csv", b'"'),
    ):
        before = (output / name).read_bytes()
        (output / name).write_bytes(content)
        result = invoke("report", str(config_path))
        assert result.exit_code == 1 and f"{name} is damaged (" in result.stderr and "--repair" in result.stderr
        (output / name).write_bytes(before)


def test_verify_of_a_folder_without_results(tmp_path: Path) -> None:
    result = invoke("verify", str(tmp_path))
    assert result.exit_code == 2 and "expected the results of a run or an exploration, found none" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_signals_of_a_closing_terminal_end_a_command_unless_they_are_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match=str(128 + number)), reported():
            signal.raise_signal(number)
        assert signal.signal(number, signal.SIG_IGN) == signal.SIG_DFL
        with reported():
            signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_modules_in_the_current_folder_do_not_stand_in_for_those_of_python(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("")
    # The script fruitdask does not look in the current folder, but each process that it starts does.
    code = (
        "import sys; sys.path.remove('')\nfrom fruitdask.cli import main\nsys.argv = ['fruitdask', '--version']\n"
        "try:\n    main()\nexcept SystemExit:\n    import subprocess\n"
        "    sys.exit(subprocess.run([sys.executable, '-c', 'import tempfile']).returncode)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


@pytest.mark.parametrize("kind", ["folder", "disk"])
def test_errors_of_the_system_are_one_sentence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "folder":
        tmp_path.rmdir()
    with pytest.raises(SystemExit, match="1"), reported():
        os.getcwd() if kind == "folder" else Path("/dev/full").write_text("x")
    said = {"folder": "the current folder was deleted; change to", "disk": "no space left where this command prints"}
    assert said[kind] in capsys.readouterr().err
    monkeypatch.chdir("/")
    with pytest.raises(OSError, match="nowhere"), reported():
        Path("/nowhere").stat()

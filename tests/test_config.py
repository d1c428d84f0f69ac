"""The configuration: reading, overrides, errors, examples and schema."""

import contextlib
import json
import re
import traceback
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from PIL import Image

from fruitdask.core.config import (
    PILLOW_LIMIT_PIXELS,
    AddressClusterConfig,
    AzureClusterConfig,
    Config,
    CustomClusterConfig,
    EC2ClusterConfig,
    LocalClusterConfig,
    build_reference,
    build_schema,
    load_config,
)
from fruitdask.core.storage import Location
from fruitdask.errors import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
SECTIONS = {"input": {"url": "s3://fruits/Test"}, "output": {"url": "s3://fruits/run"}}
MINIMAL = "input: {url: s3://fruits/Test}\noutput: {url: s3://fruits/run}\n"


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(**sections: Any) -> Config:
    return load_config({**SECTIONS, **sections})


def test_load_config_fills_in_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL)).model_dump() == {
        "input": {
            "url": "s3://fruits/Test",
            "storage_options": {},
            "region": None,
            "classes": None,
            "exclude": (),
            "exclude_from": None,
            "extensions": None,
            "hidden": False,
            "label_from": "parent",
            "split_from": None,
            "group_from": None,
            "limit": None,
            "manifest": None,
            "inventory": None,
            "sample": None,
        },
        "model": {
            "name": "MobileNetV2",
            "weights": "imagenet",
            "storage_options": {},
            "region": None,
            "input_px": None,
            "pooling": "avg",
            "layer": None,
            "preprocessing": None,
            "allow_code": False,
            "engine": "auto",
            "precision": "float32",
        },
        "cluster": {
            "kind": "local",
            "n_workers": None,
            "threads_per_worker": None,
            "memory_limit": None,
            "dashboard_address": "127.0.0.1:8787",
        },
        "featurize": {
            "images_per_partition": None,
            "batch_size": None,
            "max_failed_fraction": 0.05,
            "max_pixels": 50_000_000,
            "decode": "exact",
            "fetch_attempts": 5,
            "concurrent_reads": 16,
        },
        "reduce": {
            "enabled": True,
            "n_components": 2,
            "solver": "covariance_eigh",
            "seed": 0,
            "refit": "auto",
            "tsne": {"enabled": False, "max_rows": 5000, "perplexity": 30.0, "seed": 0},
        },
        "explore": {
            "enabled": True,
            "input_px": None,
            "scale": "signed",
            "near_duplicate_bits": 2,
            "thumbnail_px": None,
            "max_thumbnails": 2000,
        },
        "quality": {"enabled": True, "n_neighbors": 5, "metric": "euclidean", "max_rows": 5000, "seed": 0},
        "check": {"enabled": True, "n_neighbors": 10, "max_rows": 10_000},
        "plots": {"enabled": True, "components": (1, 2), "dpi": 150},
        "report": {"enabled": True, "title": None, "max_points": 10_000, "examples_per_class": 6},
        "privacy": {
            "allowed_regions": None,
            "require_encryption": False,
            "controller": None,
            "purpose": None,
            "retention_days": None,
        },
        "limits": {"max_cost": None, "max_hours": None},
        "output": {
            "url": "s3://fruits/run",
            "storage_options": {},
            "region": None,
            "attempts": 5,
            "overwrite": False,
        },
    }


def test_load_config_accepts_mappings_like_a_file(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL)) == load_config(SECTIONS)


def test_load_config_does_not_change_the_mapping_of_the_caller() -> None:
    sections = {**SECTIONS, "input": {"url": "photographs"}, "cluster": {"n_workers": 2}}
    before = json.dumps(sections)
    load_config(sections, overrides=["input.limit=3", "cluster.n_workers=4"])
    assert json.dumps(sections) == before


def test_overrides_take_precedence_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "model: {pooling: max, input_px: 96}\nreduce: {n_components: 9}\n")
    config = load_config(path, overrides=["model.pooling=flatten", "reduce.n_components=4", "reduce.n_components=7"])
    assert config.model.pooling == "flatten"
    assert config.model.input_px == 96
    assert config.model.name == "MobileNetV2"
    assert config.reduce.n_components == 7


def test_load_config_overrides_one_key_of_a_nested_mapping(tmp_path: Path) -> None:
    text = "input: {url: s3://b/in, storage_options: {endpoint_url: 'http://localhost:9000', anon: false}}\n"
    path = write(tmp_path, text + "output: {url: s3://b/out}\nreduce: {tsne: {enabled: true, seed: 4}}\n")
    config = load_config(path, overrides=["input.storage_options.anon=true", "reduce.tsne.seed=5"])
    assert config.input.storage_options == {"endpoint_url": "http://localhost:9000", "anon": True}
    assert (config.reduce.tsne.enabled, config.reduce.tsne.seed) == (True, 5)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("input.limit=10", "input", "limit", 10),
        ("input.classes=[pear_1, apple_red_1]", "input", "classes", ("pear_1", "apple_red_1")),
        ("output.overwrite=true", "output", "overwrite", True),
        ("reduce.n_components=0.8", "reduce", "n_components", 0.8),
        ("cluster.dashboard_address=null", "cluster", "dashboard_address", None),
        ("cluster.dashboard_address=", "cluster", "dashboard_address", None),
        ("cluster.memory_limit=4GiB", "cluster", "memory_limit", "4GiB"),
        ("input.url=s3://b/a=b", "input", "url", "s3://b/a=b"),
    ],
    ids=["integer", "list", "boolean", "float", "null", "nothing", "string", "equals sign in the value"],
)
def test_load_config_reads_the_value_of_an_override_as_yaml(override: str, section: str, key: str, value: Any) -> None:
    found = getattr(getattr(load_config(SECTIONS, overrides=[override]), section), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "override",
    ["pooling=max", "model.pooling", "", "=", "model"],
    ids=["no section", "no value", "empty", "equals", "word"],
)
def test_load_config_refuses_an_override_without_a_section_or_a_value(override: str) -> None:
    with pytest.raises(ConfigError, match=rf"--set {override}: expected section\.key=value, for example"):
        load_config(SECTIONS, overrides=[override])


def test_load_config_refuses_an_override_that_is_not_yaml() -> None:
    with pytest.raises(ConfigError, match=r"input.classes=\[pear_1: '\[pear_1' is not a YAML value"):
        load_config(SECTIONS, overrides=["input.classes=[pear_1"])


def test_load_config_says_what_is_wrong_with_the_value_of_an_override() -> None:
    with pytest.raises(ConfigError, match=r"^--set model\.pooling=mean: model\.pooling: .*'mean'$"):
        load_config(SECTIONS, overrides=["model.pooling=mean"])


def test_load_config_resolves_paths_of_the_file_against_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        "input: {url: ../photographs, manifest: ./labels.csv, inventory: all.parquet}\n"
        "model: {weights: w/m.weights.h5}\noutput: {url: out/}\n"
    )
    write(tmp_path / "conf", text)
    config = load_config("conf/run.yaml")
    assert config.input.url == str(tmp_path / "photographs")
    assert config.input.manifest == str(tmp_path / "conf" / "labels.csv")
    assert config.input.inventory == str(tmp_path / "conf" / "all.parquet")
    assert config.model.weights == str(tmp_path / "conf" / "w" / "m.weights.h5")
    assert config.output.url == str(tmp_path / "conf" / "out")


def test_load_config_resolves_paths_of_overrides_against_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "conf", "input: {url: a}\noutput: {url: b}\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = load_config(path, overrides=["input.url=photographs", "model.weights=../m.weights.h5"])
    assert config.input.url == str(tmp_path / "here" / "photographs")
    assert config.model.weights == str(tmp_path / "m.weights.h5")
    assert config.output.url == str(tmp_path / "conf" / "b")


def test_load_config_resolves_paths_of_mappings_against_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(output={"url": "out"}).output.url == str(tmp_path / "out")


@pytest.mark.parametrize("how", ["file", "override"])
def test_load_config_expands_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write(tmp_path, MINIMAL.replace("s3://fruits/run", "~/run"))
    config = load_config(path) if how == "file" else load_config(SECTIONS, overrides=["output.url=~/run"])
    assert config.output.url == str(tmp_path / "home" / "run")


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/a/../b", "abfs://c@account.dfs.core.windows.net/x", "memory://x", "file:///data/x", "/data/x"],
    ids=["s3", "abfs", "memory", "file", "absolute path"],
)
def test_load_config_keeps_urls_and_absolute_paths(tmp_path: Path, url: str) -> None:
    path = write(tmp_path, f"input: {{url: '{url}'}}\noutput: {{url: '{url}'}}\nmodel: {{weights: '{url}'}}\n")
    config = load_config(path)
    assert (config.input.url, config.output.url, config.model.weights) == (url, url, url)


@pytest.mark.parametrize("word", ["imagenet", "random"])
def test_special_values_of_weights_are_not_paths(tmp_path: Path, word: str) -> None:
    assert load_config(write(tmp_path, MINIMAL + f"model: {{weights: {word}}}\n")).model.weights == word


@pytest.mark.parametrize("word", ["imagenet", "random"])
def test_load_config_resolves_a_folder_named_like_special_weights(tmp_path: Path, word: str) -> None:
    path = write(tmp_path, f"input: {{url: {word}}}\noutput: {{url: s3://fruits/run}}\n")
    assert load_config(path).input.url == str(tmp_path / word)


def test_load_config_expands_environment_variables_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUITS_BUCKET", "fruits-7")
    monkeypatch.setenv("FRUITS_CLASS", "pear_1")
    text = """
    input:
      url: s3://${FRUITS_BUCKET}/${FRUITS_CLASS}
      classes: ["${FRUITS_CLASS}"]
      storage_options: {a: {b: "${FRUITS_BUCKET}"}}
    output: {url: "${FRUITS_BUCKET}/run"}
    """
    path = write(tmp_path, text)
    config = load_config(path, overrides=["model.layer=${FRUITS_CLASS}_$HOME_{x}"])
    assert config.input.url == "s3://fruits-7/pear_1"
    assert config.input.classes == ("pear_1",)
    assert config.input.storage_options == {"a": {"b": "fruits-7"}}
    assert config.output.url == str(tmp_path / "fruits-7" / "run")
    assert config.model.layer == "pear_1_$HOME_{x}"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "input: {url: 's3://${FRUITS_UNSET}/x'}",
            [],
            r"run\.yaml, line 1: input\.url: the environment variable FRUITS_UNSET is not set; "
            r"set it or write the value out$",
        ),
        (
            "input:\n  url: ${FRUITS_UNSET}\n  classes: [a, '${FRUITS_UNSET2}']",
            [],
            r"run\.yaml, line 2: input\.url: the environment variable FRUITS_UNSET is not set; .*\n"
            r".*run\.yaml, line 3: input\.classes\.1: the environment variable FRUITS_UNSET2 is not set; .*$",
        ),
        (
            MINIMAL,
            ["input.url=${FRUITS_UNSET}"],
            r"^--set .*: input\.url: the environment variable FRUITS_UNSET is not set; ",
        ),
    ],
    ids=["file", "several", "override"],
)
def test_load_config_names_an_unset_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, overrides: list[str], message: str
) -> None:
    monkeypatch.delenv("FRUITS_UNSET", raising=False)
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), overrides=overrides)


def test_load_config_needs_no_environment_variable_that_is_overridden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FRUITS_UNSET", raising=False)
    text = 'input: {url: in, exclude: ["${FRUITS_UNSET}"], storage_options: {key: "${FRUITS_UNSET}", b: c}}\n'
    path = write(tmp_path, text + "output: {url: out}")
    overrides = ["input.exclude=[a]", "input.storage_options.key=d"]
    config = load_config(path, overrides=overrides)
    assert config.input.exclude == ("a",) and config.input.storage_options == {"key": "d", "b": "c"}
    with pytest.raises(ConfigError, match=r"storage_options\.key: the environment variable FRUITS_UNSET"):
        load_config(path, overrides=overrides[:1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", r"line 3: unknown key modle; did you mean model\?"),
        (
            "xyz: 1",
            r"line 3: unknown key xyz; valid keys: check, cluster, explore, featurize, input, limits, model, output, "
            "plots, privacy, quality, reduce, report",
        ),
        ("model:\n  name: VGG16\n  poling: max", r"line 5: unknown key model\.poling; did you mean pooling\?"),
        (
            "reduce:\n  tsne:\n    perplexty: 3",
            r"line 5: unknown key reduce\.tsne\.perplexty; did you mean perplexity\?",
        ),
        ("cluster:\n  kind: local\n  n_worker: 3", r"line 5: unknown key cluster\.n_worker; did you mean n_workers\?"),
        ("cluster:\n  n_worker: 3", r"line 4: unknown key cluster\.n_worker; did you mean n_workers\?"),
        (
            "cluster:\n  kind: address\n  address: tcp://h:1\n  timeout_second: 3",
            r"line 6: unknown key cluster\.timeout_second; did you mean timeout_seconds\?",
        ),
    ],
    ids=["top level", "nothing near", "section", "nested", "union", "union by default", "other member of the union"],
)
def test_load_config_suggests_the_nearest_key_for_an_unknown_one(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(tmp_path))}/run\.yaml, {message}$"):
        load_config(write(tmp_path, MINIMAL + text))


def test_load_config_suggests_the_nearest_key_of_an_optional_section(tmp_path: Path) -> None:
    text = "input:\n  url: x\n  sample:\n    perclass: 3\noutput: {url: y}\n"
    with pytest.raises(ConfigError, match=r"line 4: .*input\.sample\.perclass; did you mean per_class\?"):
        load_config(write(tmp_path, text))


def test_load_config_suggests_only_keys_of_the_given_kind_of_cluster() -> None:
    with pytest.raises(ConfigError, match=r"unknown key cluster\.timeout_secs; ") as caught:
        load(cluster={"kind": "local", "timeout_secs": 3})
    assert "timeout_seconds" not in str(caught.value)


def test_address_implies_a_running_cluster() -> None:
    assert load(cluster={"address": "tcp://10.0.0.5:8786"}).cluster.kind == "address"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "featurize:\n  batch_size: many",
            r"line 4: featurize\.batch_size: expected an integer, found 'many'$",
        ),
        ("featurize:\n  batch_size: 0", r"line 4: featurize\.batch_size: expected at least 1, found 0$"),
        (
            "featurize:\n  max_failed_fraction: 1.5",
            r"line 4: featurize\.max_failed_fraction: expected at most 1, found 1\.5$",
        ),
        (
            "featurize:\n  max_failed_fraction: .nan",
            r"line 4: featurize\.max_failed_fraction: expected a finite number, found \.nan$",
        ),
        ("model: fast", r"line 3: model: expected keys and values, found 'fast'; write model: \{name: fast\}$"),
        (
            "model:",
            r"line 3: model: expected keys and values, found nothing; write its keys below it, or leave it out$",
        ),
        ("model: {pooling: mean}", r"line 3: model\.pooling: expected avg, max or flatten, found 'mean'$"),
        ("model: {input_px: 16}", r"line 3: model\.input_px: expected at least 32, found 16$"),
        (
            "cluster:\n  kind: slurm",
            r"line 4: cluster\.kind: expected local, address, ec2, azure or custom, found 'slurm'$",
        ),
        (
            "cluster:\n  kind: loacl",
            r"line 4: cluster\.kind: expected local, address, ec2, azure or custom, found 'loacl'; "
            r"did you mean local\?$",
        ),
        (
            "cluster: local",
            r"line 3: cluster: expected keys and values, found 'local'; write cluster: \{kind: local\}$",
        ),
        (
            "cluster:\n  kind: local\n  n_workers: 0",
            r"line 5: cluster\.n_workers: expected at least 1, found 0$",
        ),
        ("1: {}", r"line 3: 1: expected text as a key; put it in quotes$"),
    ],
    ids=[
        "string for an integer",
        "too small",
        "too large",
        "nan",
        "word for a section",
        "empty section",
        "not a choice",
        "image too small",
        "unknown kind",
        "kind with a typo",
        "word for a cluster",
        "inside the union",
        "number as a key",
    ],
)
def test_load_config_reports_line_key_and_value_of_a_mistake(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(tmp_path))}/run\.yaml, {message}"):
        load_config(write(tmp_path, MINIMAL + text))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"input": {"url": "x", "classes": "pear_1"}},
            r"input\.classes: expected a list, found 'pear_1'; write \[pear_1\]$",
        ),
        ({"input": {"url": "x", "classes": []}}, r"input\.classes: expected a list of at least 1, found \[\]$"),
        (
            {"input": {"url": "x", "classes": ["a", 7]}},
            r'input\.classes\.1: expected text, found 7; put it in quotes: "7"$',
        ),
        ({"input": {"url": "x", "extensions": []}}, r"input\.extensions: expected a list of at least 1, found \[\]$"),
        ({"input": {"url": "x", "limit": 0}}, r"input\.limit: expected at least 1, found 0$"),
        ({"input": {"url": "x", "sample": {"size_px": 8}}}, r"input\.sample\.size_px: .* 16, found 8"),
    ],
    ids=["classes as a word", "no classes", "class as a number", "no extensions", "limit 0", "sample too small"],
)
def test_load_config_refuses_wrong_lists_and_limits(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^the configuration: {message}"):
        load(**sections)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input: {url: x}", r"run\.yaml: the key output is missing; add it"),
        ("output: {url: x}", r"run\.yaml: the key input is missing; add it"),
        ("input: {url: x}\noutput:\n  overwrite: true", r"run\.yaml, line 2: the key output\.url is missing; add it"),
    ],
    ids=["no output", "no input", "no url"],
)
def test_load_config_names_a_missing_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_load_config_names_a_missing_address(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 3: the key cluster\.address is missing"):
        load_config(write(tmp_path, MINIMAL + "cluster: {kind: address}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r": the file is empty; it needs at least the sections input: and output:, each with a url:"),
        ("# words", r": the file is empty; "),
        ("- input", r": expected sections .*, found a list; write the sections without the leading -"),
        ("just words", r": expected sections such as input: and output:, found 'just words'"),
        ("input: {url: x", r", line 1: not valid YAML: expected ',' or '}'.*; close the brackets, and put a value"),
        ("input: a: b", r", line 1: not valid YAML: mapping values are not allowed here; .* in quotes"),
        ("input:\n\turl: x", r", line 2: not valid YAML: found character '\\t' .*; write spaces instead of tabs"),
        ("input:\n  url: *x", r", line 2: not valid YAML: found undefined alias 'x'; put a value that begins with \*"),
        ("input:\n  url: @x", r", line 2: not valid YAML: found character '@' .*; put a value that begins with this"),
        ("input:\n  url: 'x", r", line 2: not valid YAML: found unexpected end of stream; close the quotes"),
        ("input:\n  url: x\n a: 1", r", line 3: not valid YAML: expected <block end>.*; check the indentation"),
        ("a: 1\n---\nb: 1", r", line 2: not valid YAML: expected a single document .*; write one document"),
        ("? [a]\n: 1", r", line 1: not valid YAML: found unhashable key; write keys as plain words"),
        ("input: !!python/object:os.PathLike {}", r", line 1: not valid YAML: could not determine a constructor"),
        (
            "input: !!python/object/apply:os.mkdir [MARK]",
            r", line 1: not valid YAML: could not determine a constructor",
        ),
    ],
    ids=[
        "empty",
        "comment",
        "list",
        "words",
        "open brace",
        "two colons",
        "tab",
        "star",
        "at",
        "open quote",
        "indentation",
        "two documents",
        "list as a key",
        "python object",
        "python call",
    ],
)
def test_load_config_refuses_what_is_not_a_mapping_in_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(tmp_path))}/run\.yaml{message}"):
        load_config(write(tmp_path, text))
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("address", ["127.0.0.1:8787", "localhost:0", "[::1]:8787", "127.9.9.9:1", None])
def test_load_config_accepts_a_dashboard_on_this_machine(address: str | None) -> None:
    assert load(cluster={"dashboard_address": address}).cluster.dashboard_address == address


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:8787",
        ":8787",
        "8787",
        "[::]:0",
        "10.0.0.5:8787",
        "example.org:8787",
        "127.0.0.1",
        "127.0.0.1:x",
        "127.0.0.1:99999",
        "",
    ],
)
def test_load_config_refuses_a_dashboard_that_other_machines_reach(address: str) -> None:
    message = r"^the configuration: cluster\.dashboard_address: expected an address that only this machine reaches"
    with pytest.raises(ConfigError, match=rf"{message}, .*, found {re.escape(repr(address))}"):
        load(cluster={"dashboard_address": address})


def build_laughs(n_levels: int, *, merges: bool = False) -> str:
    """Build YAML in which aliases expand to ten to the power of ``n_levels`` values."""
    lines = ["l0: &l0 {k: x}" if merges else "l0: &l0 [x]"]
    for level in range(1, n_levels):
        several = ", ".join([f"*l{level - 1}"] * 10)
        lines.append(f"l{level}: &l{level} {{<<: [{several}]}}" if merges else f"l{level}: &l{level} [{several}]")
    return "\n".join(lines)


@pytest.mark.parametrize("merges", [False, True], ids=["lists", "merges"])
@pytest.mark.parametrize("n_levels", [7, 60, 400])
def test_load_config_refuses_a_billion_laughs(tmp_path: Path, n_levels: int, merges: bool) -> None:
    message = (
        r"^.*run\.yaml: not valid YAML: expected at most 100,000 values, found aliases \(\*\) that stand for more$"
    )
    # The aliases are not expanded: those of the last two files would not fit into any memory.
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, build_laughs(n_levels, merges=merges)))


def test_load_config_accepts_aliases(tmp_path: Path) -> None:
    text = (
        "input: {url: s3://a, storage_options: &options {anon: true}}\noutput: {url: s3://b, storage_options: *options}"
    )
    assert load_config(write(tmp_path, text)).output.storage_options == {"anon": True}


def test_load_config_refuses_a_huge_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 1,048,576 characters"):
        load_config(write(tmp_path, MINIMAL + "#" * 2_000_000))


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [MARK]",
        "!!python/object/new:os.mkdir [MARK]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "${MARK:-$(touch MARK)}",
        "$(touch MARK)",
        "`touch MARK`",
        "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
    ],
)
@pytest.mark.parametrize("key", ["input.url", "model.weights", "output.url", "report.title"])
def test_load_config_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    # Whether the value is refused or read as text, nothing is executed.
    with contextlib.suppress(ConfigError):
        config = load_config(SECTIONS, overrides=[f"{key}={value}"])
        Location(config.output.url).child("x").path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("input", "storage_options", "hunter2"),
        ("model", "storage_options", ["hunter2"]),
        ("output", "storage_options", {1: "hunter2"}),
        ("cluster", "env_vars", {"NAME": ["hunter2"]}),
        ("cluster", "docker_args", ["hunter2"]),
    ],
)
def test_load_config_does_not_quote_a_secret(section: str, key: str, value: Any) -> None:
    ec2 = {"kind": "ec2", "docker_image": "x"}
    sections = SECTIONS | {section: SECTIONS.get(section, ec2 if section == "cluster" else {}) | {key: value}}
    with pytest.raises(ConfigError, match=rf"^the configuration: {section}\.{key}.*: expected [a-z ;]*$") as caught:
        load_config(sections)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_templates_of_a_file_system_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}"
    references = {"version": 1, "templates": {"f": code}, "refs": {"a/b.jpg": ["{{ f(c=1) }}"], "a/c.jpg": code}}
    options = {"fo": references, "simple_templates": False}
    with contextlib.suppress(Exception):
        location = Location("reference://", options)
        location.fs.cat_file("a/c.jpg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["file", "override"])
def test_load_config_explains_a_date_that_does_not_exist(tmp_path: Path, how: str) -> None:
    source = write(tmp_path, MINIMAL.replace("s3://fruits/run", "2026-02-30")) if how == "file" else SECTIONS
    with pytest.raises(ConfigError, match=r"YAML.*day" if how == "file" else r"--set output\.url=2026-02-30: .*YAML"):
        load_config(source, overrides=["output.url=2026-02-30"] if how == "override" else [])


def test_load_config_reports_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: there is no such configuration file"):
        load_config(tmp_path / "nope.yaml")


def test_load_config_reports_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: .*directory"):
        load_config(tmp_path)
    (tmp_path / "run.yaml").write_bytes("input: {url: é}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml: .*cannot be read: .*utf-8"):
        load_config(tmp_path / "run.yaml")


def test_load_config_explains_a_home_folder_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"~no_such_user_here"):
        load(output={"url": "~no_such_user_here/x"})


def test_load_config_attributes_a_mistake_to_the_override(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "model: {pooling: avg}\n")
    with pytest.raises(ConfigError, match=r"model\.pooling: .*, found 'mean'") as caught:
        load_config(path, overrides=["model.pooling=mean"])
    assert "line 3" not in str(caught.value)


@pytest.mark.parametrize("value", [1, 2, 1280, 0.001, 0.8, 0.999], ids=str)
def test_load_config_keeps_n_components_as_written(value: float) -> None:
    found = load(reduce={"n_components": value}).reduce.n_components
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        ({"n_components": 0}, r"reduce\.n_components: expected a number greater than 0, found 0"),
        ({"n_components": -3}, r"reduce\.n_components: expected a number greater than 0, found -3"),
        ({"n_components": -0.5}, r"reduce\.n_components: expected a number greater than 0, found -0\.5"),
        ({"n_components": 1.0}, r"reduce: n_components must be an integer, or a fraction between 0 and 1, not 1\.0"),
        ({"n_components": 2.5}, r"reduce: n_components must be an integer, or a fraction between 0 and 1, not 2\.5"),
        (
            {"n_components": 0.8, "solver": "randomized"},
            r"reduce: a fraction as n_components needs .* use solver: covariance_eigh",
        ),
    ],
    ids=["zero", "negative", "negative fraction", "one as a float", "above one", "randomized fraction"],
)
def test_load_config_refuses_meaningless_n_components(reduce: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^the configuration: {message}"):
        load(reduce=reduce)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("reduce", "n_components", "all"), ("reduce", "n_components", None), ("cluster", "memory_limit", [4])],
    ids=["word", "nothing", "list"],
)
def test_load_config_names_a_key_of_several_types(section: str, key: str, value: Any) -> None:
    found = "nothing" if value is None else re.escape(repr(value))
    with pytest.raises(
        ConfigError,
        match=f"^the configuration: {section}.{key}: .*, found {found}$",
    ):
        load(**{section: {key: value}})


def test_keras_file_needs_preprocessing() -> None:
    with pytest.raises(ConfigError, match="model: preprocessing must be given"):
        load(model={"weights": "s3://models/mine.keras"})
    own = {"weights": "s3://models/mine.keras", "preprocessing": "none"}
    assert load(model=own).model.preprocessing == "none"
    with pytest.raises(ConfigError, match="model: precision cannot be chosen"):
        load(model=own | {"precision": "mixed_float16"})


@pytest.mark.parametrize(
    ("cluster", "kind"),
    [
        ({}, LocalClusterConfig),
        ({"n_workers": 2}, LocalClusterConfig),
        ({"kind": "local"}, LocalClusterConfig),
        ({"kind": "address", "address": "tcp://10.0.0.5:8786"}, AddressClusterConfig),
        ({"class": "dask_jobqueue.PBSCluster", "n_workers": 2}, CustomClusterConfig),
    ],
    ids=["empty", "kind left out", "local", "address", "class"],
)
def test_load_config_chooses_the_kind_of_cluster(cluster: dict[str, Any], kind: type) -> None:
    assert type(load(cluster=cluster).cluster) is kind


@pytest.mark.parametrize(
    ("written", "read"),
    [("jpg", ".jpg"), (".JPG", ".jpg"), ("..Png", ".png"), ("tar.gz", ".tar.gz")],
    ids=["no dot", "capitals", "dots", "two parts"],
)
def test_load_config_normalizes_extensions(written: str, read: str) -> None:
    assert load(input={"url": "x", "extensions": [written]}).input.extensions == (read,)


def test_max_pixels_is_limited_by_pillow() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert PILLOW_LIMIT_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    assert load(featurize={"max_pixels": PILLOW_LIMIT_PIXELS}).featurize.max_pixels == PILLOW_LIMIT_PIXELS
    with pytest.raises(ConfigError, match=r"featurize\.max_pixels: .*178956970, found 178956971$"):
        load(featurize={"max_pixels": PILLOW_LIMIT_PIXELS + 1})


@pytest.mark.parametrize("section", [None, "input", "model", "cluster", "featurize", "reduce", "output"], ids=str)
def test_config_is_frozen(section: str | None) -> None:
    config = load()
    part, key = (config, "model") if section is None else (getattr(config, section), "url")
    key = next(iter(type(part).model_fields)) if section else key
    with pytest.raises(pydantic.ValidationError, match="Instance is frozen"):
        setattr(part, key, "other")


def test_config_does_not_share_mutable_defaults() -> None:
    load().input.storage_options["anon"] = True
    assert load().input.storage_options == {}


def test_config_error_is_a_value_error_and_keeps_its_cause() -> None:
    with pytest.raises(ValueError, match="unknown key modle") as caught:
        load(modle={})
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_load_config_reads_the_examples(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in re.findall(r"\$\{(\w+)\}", path.read_text(encoding="utf-8")):
        monkeypatch.setenv(name, "given")
    config = load_config(path)
    is_on_s3 = path.name.startswith(("aws", "fargate", "kubernetes", "s3"))
    first = "s" if is_on_s3 else "a" if path.name == "azure.yaml" else "/"
    assert (config.input.url[0], config.output.url[0]) == (first, first)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.name.startswith("aws")], ids=lambda path: path.name)
def test_examples_on_aws_stay_in_the_eu_and_have_limits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BUCKET", "DOCKER_IMAGE", "INSTANCE_PROFILE"):
        monkeypatch.setenv(f"FRUITDASK_{name}", "given")
    config = load_config(path)
    assert isinstance(config.cluster, EC2ClusterConfig)
    assert config.privacy.allowed_regions == "eu" and str(config.cluster.region).startswith("eu-")
    assert (config.cluster.docker_image, config.cluster.iam_instance_profile) == ("given", {"Name": "given"})
    assert config.limits.max_cost and config.limits.max_hours
    is_gpu = config.cluster.types[1].startswith("g")
    assert is_gpu == (config.model.engine == "tensorflow") == ("gpu" in path.name)


def test_example_on_azure_stays_in_the_eu_and_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCOUNT", "DOCKER_IMAGE", "IDENTITY"):
        monkeypatch.setenv(f"FRUITDASK_{name}", "given")
    config = load_config(next(path for path in CONFIGS if path.name == "azure.yaml"))
    assert isinstance(config.cluster, AzureClusterConfig) and config.privacy.allowed_regions == "eu"
    assert {config.input.region, config.output.region, config.cluster.location} == {"westeurope"}
    assert (config.cluster.identity, config.cluster.public_ingress) == ("given", False)
    assert set(config.cluster.types) <= set(config.cluster.hourly_prices)
    assert config.limits.max_cost and config.limits.max_hours


@pytest.mark.parametrize(
    ("size", "has_gpu", "n_cpus"),
    [
        ("Standard_D4s_v5", False, 4),
        ("Standard_NC4as_T4_v3", True, 4),
        ("standard_nd96isr_h100_v5", True, 96),
        ("Standard_NV8as_v4", False, 8),
        ("Standard_ND96isr_MI300X_v5", False, 96),
    ],
)
def test_names_of_azure_sizes_reveal_gpus_and_cpus(size: str, has_gpu: bool, n_cpus: int) -> None:
    names = dict.fromkeys(("resource_group", "vnet", "security_group", "docker_image"), "x")
    cluster = AzureClusterConfig(kind="azure", location="westeurope", vm_size=size, **names)
    assert (cluster.has_gpu, cluster.n_cpus) == (has_gpu, n_cpus)


def test_examples_include_the_demo() -> None:
    names = "demo local s3-local-cluster aws aws-gpu azure fargate kubernetes slurm"
    assert {f"{name}.yaml" for name in names.split()} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_build_schema_accepts_the_examples(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(build_schema())
    validator.check_schema(build_schema())
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert [error.message for error in validator.iter_errors(tree)] == []


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"modle": {}}, "'modle' was unexpected"),
        ({"model": {"pooling": "mean"}}, "'mean' is not one of"),
        ({"featurize": {"max_pixels": 0}}, "0 is less than the minimum of 1"),
        ({"output": {}}, "'url' is a required property"),
    ],
    ids=["unknown key", "not a choice", "too small", "missing"],
)
def test_build_schema_refuses_what_load_config_refuses(section: dict[str, Any], message: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.Draft202012Validator(build_schema()).validate({**SECTIONS, **section})
    with pytest.raises(ConfigError, match="^the configuration: "):
        load(**section)


def list_properties(node: Any) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(node, list):
        return [found for item in node for found in list_properties(item)]
    if not isinstance(node, dict):
        return []
    properties = node.get("properties", {})
    inner = [value for key, value in node.items() if key != "properties"]
    return [*properties.items(), *list_properties(inner), *list_properties(list(properties.values()))]


def test_build_schema_describes_every_key() -> None:
    sections = {*Config.model_fields, "tsne", "kind"}
    properties = list_properties(build_schema())
    assert len(properties) > 40
    assert [name for name, node in properties if not node.get("description") and name not in sections] == []


def test_reference_matches_the_schema() -> None:
    reference = (CONFIGS[0].parent / "README.md").read_text(encoding="utf-8")
    assert reference == build_reference(), "write it again: fruitdask schema --markdown > configs/README.md"
    for section, fields in build_schema()["$defs"].items():
        missing = [key for key in fields["properties"] if f"{key}` |" not in reference and key != "kind"]
        assert missing == [] or {*missing} <= {"tsne"}, section


def test_load_config_refuses_to_plot_missing_components(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plots.components names component 3"):
        load_config(write(tmp_path, MINIMAL), overrides=["plots.components=[1, 3]"])
    assert load_config(write(tmp_path, MINIMAL), overrides=["reduce.n_components=1"]).plots.components == (1, 2)


def explain(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """Load an invalid configuration; returns the lines of the message, without the folder of the file."""
    with pytest.raises(ConfigError, match=".") as caught:
        load_config(write(tmp_path, text), overrides=overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").split("\n")


def test_load_config_reports_all_mistakes_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "ouput: {url: y}\ninput: /folder\nmodle: {name: x}\nfeaturize:\n  batch_size: many\n  max_pixels: 0\n"
    assert explain(tmp_path, text, "plots.dpi=high", "report.titel=x") == [
        "run.yaml, line 1: unknown key ouput; did you mean output?",
        "run.yaml, line 2: input: expected keys and values, found '/folder'; write input: {url: /folder}",
        "run.yaml, line 3: unknown key modle; did you mean model?",
        "run.yaml, line 5: featurize.batch_size: expected an integer, found 'many'",
        "run.yaml, line 6: featurize.max_pixels: expected at least 1, found 0",
        "--set plots.dpi=high: plots.dpi: expected an integer, found 'high'",
        "--set report.titel=x: unknown key report.titel; did you mean title?",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "plots: no",
            "plots: expected keys and values, found no, which YAML reads as false; write plots: {enabled: false}",
        ),
        ("reduce: {tsne: true}", "reduce.tsne: expected keys and values, found true; write tsne: {enabled: true}"),
        ("model: ['name']", "model: expected keys and values, found ['name']; its keys are allow_code, "),
        ("model:\n  name:x", "model: expected keys and values, found 'name:x'; put a space after the colon"),
        ("pooling: max", "unknown key pooling; did you mean model.pooling?"),
        ("model.pooling: max", "unknown key model.pooling; write model: {pooling: ...}"),
        ("Model: {}", "unknown key Model; did you mean model?"),
        ("featurize: {batch-size: 3}", "unknown key featurize.batch-size; did you mean batch_size?"),
        ("cluster: {spot: true}", "unknown key cluster.spot; only a cluster with kind: ec2 or azure has this key"),
        ("cluster: {kind: address, adress: x}", "unknown key cluster.adress; did you mean address?"),
        ("model: {name: 1}", 'model.name: expected text, found 1; put it in quotes: "1"'),
        ("model: {name: 007}", 'model.name: expected text, found 007; put it in quotes: "007"'),
        (
            "report: {title: 2024-01-01}",
            'report.title: expected text, found 2024-01-01; put it in quotes: "2024-01-01"',
        ),
        (
            "output2: {}\nreport: {title: on}",
            'report.title: expected text, found on, which YAML reads as true; put it in quotes: "on"',
        ),
        ("model: {engine: openvno}", "expected auto, tensorflow or openvino, found 'openvno'; did you mean openvino?"),
        (
            "featurize: {batch_size: yes}",
            "featurize.batch_size: expected an integer, found yes, which YAML reads as true",
        ),
        ("reduce: {n_components: true}", "reduce.n_components: expected a number, found true"),
        ("featurize: {max_failed_fraction: off}", "expected a number, found off, which YAML reads as false"),
        ("plots: {components: [1]}", "plots.components: expected a list of 2 values, found [1]"),
        ("plots: {components: [1, 2, 3]}", "plots.components: expected a list of at most 2, found [1, 2, 3]"),
        ("privacy: {allowed_regions: eu-west-3}", "expected eu or a list, found 'eu-west-3'; write [eu-west-3]"),
        ("privacy: {allowed_regions: [0]}", 'privacy.allowed_regions.0: expected text, found 0; put it in quotes: "0"'),
        ("privacy: {allowed_regions: [1]}", 'privacy.allowed_regions.0: expected text, found 1; put it in quotes: "1"'),
        ("cluster: {memory_limit: -5}", "cluster.memory_limit: expected an amount of memory such as 4GiB, found -5"),
        ("limits: {max_cost: cheap}", "limits.max_cost: expected a number, found 'cheap'"),
        ("quality: {metric: []}", "quality.metric: expected euclidean or cosine, found []"),
        ('"a\\nb\\e[31m": 1', r"unknown key a\nb\x1b[31m; valid keys"),
        (f"limits: {{max_cost: {'x' * 500}}}", f"expected a number, found '{'x' * 99}..."),
    ],
    ids=lambda value: value[:30],
)
def test_load_config_explains_a_mistake(tmp_path: Path, text: str, sentence: str) -> None:
    assert any(sentence in line for line in explain(tmp_path, MINIMAL + text))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("input=/x", "did you mean input.url=/x?"),
        ("pooling=max", "did you mean model.pooling=max?"),
        ("input.url", "did you mean input.url=VALUE?"),
        ("input.url /x", "did you mean input.url=/x?"),
        ("model..name=x", "expected section.key=value, for example model.pooling=max"),
        ("report.title=2024", "expected text, found 2024; put it in quotes: --set 'report.title=\"2024\"'"),
        ("input.classes=pear_1", "input.classes: expected a list, found 'pear_1'; write input.classes=[pear_1]"),
        ("input.exclude=*.jpg", "'*.jpg' is not a YAML value; if it is text, write --set 'input.exclude=\"*.jpg\"'"),
        ("input.url=/photos #2", "YAML reads '#2' as a comment; if it is text, write --set 'input.url=\"/photos #2\"'"),
        ("report.title=#2", "YAML reads '#2' as a comment; if it is text, write --set 'report.title=\"#2\"'"),
        ("reduce.seed=4294967296", "reduce.seed: expected at most 4294967295, found 4294967296"),
        ("reduce.tsne.seed=4294967296", "reduce.tsne.seed: expected at most 4294967295, found 4294967296"),
        ("featurize.batch_size=1000001", "featurize.batch_size: expected at most 1000000, found 1000001"),
        ("reduce.tsne=true", "reduce.tsne: expected keys and values, found true; write reduce.tsne.enabled=true"),
        (
            "cluster.kind=loacl",
            "cluster.kind: expected local, address, ec2, azure or custom, found 'loacl'; did you mean local?",
        ),
        ("modle.name=x", "--set modle.name=x: unknown key modle; did you mean model?"),
    ],
    ids=lambda value: value[:30],
)
def test_load_config_explains_a_mistake_in_an_override(tmp_path: Path, override: str, sentence: str) -> None:
    (line,) = explain(tmp_path, MINIMAL, override)
    assert sentence in line and line.startswith(f"--set {override}: ")


def test_load_config_refuses_duplicate_keys(tmp_path: Path) -> None:
    text = "input:\n  url: x\n  url: y\noutput: {url: z}\ninput: {url: w, classes: [a]}\n"
    assert explain(tmp_path, text) == [
        "run.yaml, line 3: the key input.url is a duplicate of that in line 2; keep one of them",
        "run.yaml, line 5: the key input is a duplicate of that in line 1; keep one of them",
    ]


@pytest.mark.parametrize("path", [r"C:\Users\me", r"C:\temp\new", r"d:\x\1"], ids=["users", "temp", "drive"])
def test_load_config_explains_a_windows_path_in_double_quotes(tmp_path: Path, path: str) -> None:
    (line,) = explain(tmp_path, f'input:\n  url: "{path}"\noutput: {{url: y}}\n')
    assert line.startswith("run.yaml, line 2: ")
    assert line.endswith("write Windows paths in single quotes or with forward slashes")
    doubled = path.replace("\\", "\\\\")
    for right in (f"'{path}'", path, f'"{doubled}"'):
        config = load_config(write(tmp_path, f"input:\n  url: {right}\noutput: {{url: y}}\n"))
        assert config.input.url == str(tmp_path / path)


def test_load_config_accepts_path_objects(tmp_path: Path) -> None:
    assert load(output={"url": tmp_path / "out"}).output.url == str(tmp_path / "out")


@pytest.mark.parametrize("escape", [r"\0", r"\ud800"], ids=["null", "half a character"])
def test_load_config_refuses_invalid_characters(tmp_path: Path, escape: str) -> None:
    text = f'input: {{url: "a{escape}b"}}\noutput: {{url: y}}\nreport:\n  title: "{escape}"\n'
    assert explain(tmp_path, text) == [
        "run.yaml, line 1: input.url: expected text in UTF-8 without null characters",
        "run.yaml, line 4: report.title: expected text in UTF-8 without null characters",
    ]

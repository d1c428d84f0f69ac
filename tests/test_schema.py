"""What manifests contain: their format, entries of other versions, and errors about invalid ones."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
import zarr
from click.testing import CliRunner
from hypothesis import given, strategies as st

import fruitdask
from fruitdask import store
from fruitdask.cli import cli
from fruitdask.core import fingerprint
from fruitdask.core.config import Config, ExploreConfig, ModelConfig
from fruitdask.core.config.sections import FeaturizeConfig
from fruitdask.core.fingerprint import compare_fingerprints, describe_settings
from fruitdask.core.storage import Location
from fruitdask.store.schema import seal

#: The settings behind a fingerprint. A setting added here must be in `ADDED_LATER` too, or every output must be
#: computed again.
FROZEN = {
    "model": "name weights input_px pooling layer preprocessing precision",
    "featurize": "decode max_pixels",
    "explore": "input_px scale near_duplicate_bits thumbnail_px max_thumbnails",
}


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, sample_folder: Path, tiny_model: ModelConfig, client: Any
) -> tuple[Path, dict[str, Any]]:
    """A finished run, and its configuration."""
    folder = tmp_path_factory.mktemp("finished")
    settings = {
        "input": {"url": str(sample_folder)},
        "model": tiny_model.model_dump(mode="json"),
        "check": {"enabled": False},
        "plots": {"enabled": False},
        "output": {"url": str(folder / "out")},
    }
    fruitdask.run(Config.model_validate(settings), client=client)
    return folder / "out", settings


@pytest.fixture
def output(finished: tuple[Path, dict[str, Any]], client: Any, tmp_path: Path) -> Path:
    """A copy of that run's folder, beside its configuration."""
    folder, settings = finished
    shutil.copytree(folder, tmp_path / "out")
    cluster = {"kind": "address", "address": client.scheduler.address}
    settings = settings | {"output": {"url": str(tmp_path / "out")}, "cluster": cluster}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "out"


def list_commands(output: Path) -> Iterator[list[str]]:
    """List all commands that read an output folder."""
    config = str(output.parent / "run.yaml")
    yield ["run", config]
    yield ["run", config, "--overwrite"]
    yield ["plan", config]
    yield ["explore", config]
    yield ["report", config]
    yield ["erase", config, "--path", "*_1/*", "--yes"]
    yield ["verify", str(output)]
    yield ["verify", str(output), "--repair"]


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file, and renew its checksum."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(seal(tree)))


def rewrite_attributes(path: Path) -> None:
    """Make a Zarr group claim a later format."""
    group = zarr.open_group(path, mode="r+")
    group.attrs.update(seal(dict(group.attrs) | {"format": 2}))


def test_all_manifests_and_groups_carry_the_format(output: Path) -> None:
    files = [json.loads((output / name).read_text()) for name in ("manifest.json", "explore.json", "quality.json")]
    groups = [dict(zarr.open_group(path, mode="r").attrs) for path in sorted(output.glob("*.zarr"))]
    assert len(groups) == 3 and [tree["format"] for tree in files + groups] == [1] * 6


@pytest.mark.parametrize("name", ["manifest.json", "explore.json"])
def test_every_command_refuses_a_later_format(output: Path, name: str) -> None:
    rewrite(output / name, lambda tree: tree.update(format=2))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for command in list_commands(output):
        done = CliRunner().invoke(cli, command)
        sentence = done.stderr.splitlines()[-1]
        assert done.exit_code == 2, command
        assert sentence.startswith(f"fruitdask: {output / name}: expected format 1, found format 2"), (
            command,
            sentence,
        )
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["features.zarr", "pca.zarr", "explore.zarr"])
def test_verify_refuses_arrays_of_a_later_format(output: Path, name: str) -> None:
    rewrite_attributes(output / name)
    done = CliRunner().invoke(cli, ["verify", str(output), "--repair"])
    assert done.exit_code == 2 and f"{name}: expected format 1, found format 2" in done.stderr.splitlines()[-1]


def test_unknown_entries_are_kept(output: Path) -> None:
    for name in ("manifest.json", "explore.json"):
        rewrite(output / name, lambda tree: tree.update(later={"a": [1]}))
    rewrite(output / "manifest.json", lambda tree: tree["model"].update(later=2))
    done = CliRunner().invoke(cli, ["report", str(output.parent / "run.yaml")])
    assert done.exit_code == 0, done.stderr
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["later"] == {"a": [1]} and manifest["model"]["later"] == 2


def test_outputs_from_before_solvers_were_renamed_are_read(output: Path) -> None:
    def rename(tree: dict[str, Any]) -> None:
        for settings in (tree["config"]["reduce"], tree["pca"]["fit"]):
            assert settings["solver"] == "covariance_eigh"
            settings["solver"] = "exact"

    rewrite(output / "manifest.json", rename)
    result = fruitdask.run(fruitdask.load_config(str(output.parent / "run.yaml")))
    assert result.n_computed == 0 and result.manifest["pca"]["fit"]["solver"] == "covariance_eigh"
    assert result.pca.svd_solver == "covariance_eigh" and fruitdask.verify(str(output)).is_well


#: Invalid manifests, by what was changed.
STRANGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"no {key}": lambda tree, key=key: tree.pop(key)
        for key in (
            "fruitdask",
            "status",
            "fingerprint",
            "n_images",
            "images_per_partition",
            "model",
            "config",
            "counts",
            "finished",
        )
    },
    "no catalog in the fingerprint": lambda tree: tree["fingerprint"].pop("catalog"),
    "no n_features": lambda tree: tree["model"].pop("n_features"),
    "no fit": lambda tree: tree["pca"].pop("fit"),
    "no section": lambda tree: tree["config"].pop("reduce"),
    "wrong setting": lambda tree: tree["config"]["reduce"].update(solver=3),
    "status": lambda tree: tree.update(status="beautiful"),
    "text for a number": lambda tree: tree.update(n_images="many"),
    "no partition size": lambda tree: tree.update(images_per_partition=0),
    "list for an object": lambda tree: tree.update(model=[]),
    "list for counts": lambda tree: tree.update(counts=[1]),
    "old format": lambda tree: tree.update(format="1.0.0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE)
def test_an_invalid_manifest_is_one_sentence(output: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite(output / "manifest.json", change)
    for command in list_commands(output):
        if command[1:] != [str(output), "--repair"]:
            done = CliRunner().invoke(cli, command)
            assert done.exit_code in (1, 2) and not isinstance(done.exception, Exception), (command, done.exception)
            assert "manifest.json: " in done.output, (command, done.output)
    assert CliRunner().invoke(cli, ["verify", str(output), "--repair"]).exit_code in (0, 1)
    command = ["run", str(output.parent / "run.yaml"), "--set", "report.enabled=false"]
    assert CliRunner().invoke(cli, command).exit_code == 0


@pytest.mark.slow
@given(data=st.data())
def test_a_manifest_of_any_json_is_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
    known = st.sampled_from(sorted(store.RunManifest.model_fields))
    tree = data.draw(st.dictionaries(known | st.text(), values))
    folder = tmp_path_factory.mktemp("strange")
    (folder / "manifest.json").write_text(json.dumps(seal(tree)))
    with pytest.raises(fruitdask.FruitdaskError, match="expected (the manifest of a fruitdask run|format 1), found "):
        store.read_run(Location(str(folder)))


def test_fingerprints_are_made_of_explicit_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"model": fingerprint.MODEL, "featurize": fingerprint.DECODING, "explore": fingerprint.EXPLORATION}
    assert {section: " ".join(settings) for section, settings in names.items()} == FROZEN
    kinds = {"model": ModelConfig, "featurize": FeaturizeConfig, "explore": ExploreConfig}
    before = {section: describe_settings(section, kind(), names[section]) for section, kind in kinds.items()}
    assert before["featurize"] == {"decode": "exact", "max_pixels": 50_000_000}

    class LaterConfig(FeaturizeConfig):
        colours: str = "rgb"

    monkeypatch.setattr(fingerprint, "ADDED_LATER", {"featurize.colours": "rgb"})
    later = (*fingerprint.DECODING, "colours")
    assert describe_settings("featurize", LaterConfig(), later) == before["featurize"]
    theirs, ours = (
        {"decoding": describe_settings("featurize", config, later)}
        for config in (LaterConfig(), LaterConfig(colours="lab"))
    )
    assert list(compare_fingerprints(theirs, ours)) == ["featurize.colours was rgb, is lab"]
    assert list(compare_fingerprints(ours, theirs)) == ["featurize.colours was lab, is rgb"]

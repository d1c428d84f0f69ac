"""Verifying and repairing: all damage is found, and a run restores what was damaged and nothing else."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings, strategies as st
from runs import EXTRAS, INTERRUPTIONS, ON, break_image, compute_colours, configure, draw, run_and_interrupt

import fruitdask
from fruitdask import report, store
from fruitdask.core.config import Config, ModelConfig
from fruitdask.core.escaping import format_csv
from fruitdask.core.storage import Location
from fruitdask.errors import DamageError, OutputError
from fruitdask.pipeline.reduce import write_components

BROKEN = "pear_1/r0_0.jpg"


@pytest.fixture(scope="module")
def config(
    tiny_model: ModelConfig, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    """Make the configuration of a run of the tiny model on the drawn images, one of them broken, into a folder."""
    source = tmp_path_factory.mktemp("in") / "fruits"
    shutil.copytree(sample_folder, source)
    (source / BROKEN).write_bytes(b"")

    def make(output: Path, extras: Iterable[str] = EXTRAS) -> Config:
        tsne = {"n_components": 2, "tsne": {"enabled": True, "perplexity": 5}}
        return configure(source, output, tiny_model, reduce=tsne, **dict.fromkeys(extras, ON))

    return make


@pytest.fixture(scope="module")
def finished(config: Callable[..., Config], client: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run of 24 images in 5 partitions; to be copied, not changed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    fruitdask.run(config(output), client=client)
    return output


@pytest.fixture(scope="module")
def finished_without_figures(
    config: Callable[..., Config], client: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same without figures and page, which take longest to be drawn again."""
    output = tmp_path_factory.mktemp("finished") / "out"
    fruitdask.run(config(output, ("explore", "quality")), client=client)
    return output


def copy_output(finished: Path, tmp_path: Path) -> Path:
    """Copy a finished run, to damage it."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def flip(path: Path, place: int, mask: int = 1) -> None:
    """Change bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= mask
    path.write_bytes(data)


def list_files(output: Path) -> list[str]:
    """List all files of a folder."""
    return sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())


def read_bytes(output: Path, *names: str) -> dict[str, bytes]:
    """Read all files of some folders."""
    return {name: (output / name).read_bytes() for name in list_files(output) if name.split("/")[0] in names}


def view(output: Path) -> dict[str, Any]:
    """Read everything with zarr, pandas and json, which ignore checksums."""
    seen: dict[str, Any] = {}
    for name in list_files(output):
        path = output / name
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            seen[name] = (table.to_csv(), str(table.dtypes))
        elif path.suffix == ".csv":
            seen[name] = path.read_bytes()
        elif path.suffix == ".json" and path.name != "zarr.json":
            seen[name] = json.loads(path.read_text())
        elif path.parent.suffix == ".zarr":
            group = zarr.open_group(path.parent, mode="r")
            seen[name] = dict(group.attrs)
            for key, array in group.arrays():
                described = (array.shape, array.dtype, array.metadata.dimension_names, dict(array.attrs))
                seen[f"{name}, {key}"] = (described, np.asarray(array[:]).tobytes())
        elif path.suffix in (".html", ".png"):
            seen[name] = "is there"
    return seen


def test_verify_finds_nothing_in_a_finished_run(finished: Path) -> None:
    drawn = report.list_figures(n_components=2, has_tsne=True, has_exploration=True, has_quality=True)
    assert sorted(drawn) == sorted(path.stem for path in (finished / "figures").iterdir())
    before = read_bytes(finished, *(path.name for path in finished.iterdir()))
    found = fruitdask.verify(str(finished))
    assert found.is_well and found.notes == () and (found.n_images, found.n_partitions) == (24, 5)
    assert read_bytes(finished, *(path.name for path in finished.iterdir())) == before


@pytest.mark.slow
@settings(max_examples=8)
@given(data=st.data())
def test_verify_finds_whatever_a_reader_would_see(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    output = copy_output(finished, tmp_path_factory.mktemp("damaged"))
    names = list_files(output)
    kinds = sorted({Path(name).suffix or name.split("/")[0] for name in names})
    kind = data.draw(st.sampled_from(kinds))
    name = data.draw(st.sampled_from([name for name in names if (Path(name).suffix or name.split("/")[0]) == kind]))
    path, way = output / name, data.draw(st.sampled_from(["flip", "flip", "flip", "truncate", "remove"]))
    if way == "flip":
        flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(1, 255)))
    elif way == "truncate":
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size - 1))])
    else:
        path.unlink()
    found = fruitdask.verify(str(output))
    assert not found.is_well or view(output) == view(finished), (name, way)
    assert found.can_be_mended
    fruitdask.verify(str(output), repair=True)
    assert fruitdask.verify(str(output)).faults == ()


#: What is damaged, the resulting faults, and how many images the next run computes again.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str, int]] = {
    "chunk of features": (
        lambda output: flip(output / "features.zarr/features/c/4/0", 9),
        "features.zarr/features, chunk 4: it is damaged .Stored and computed checksum do not match.*partition again",
        "compute",
        4,
    ),
    "chunk of statuses": (
        lambda output: flip(output / "features.zarr/status/c/0", -1),
        "features.zarr/status, chunk 0: it is damaged",
        "compute",
        5,
    ),
    "lost chunk": (
        lambda output: (output / "features.zarr/features/c/1/0").unlink(),
        "partition 1: of 5 images the features are not finite, although the outcome is ok, first of apple",
        "compute",
        5,
    ),
    "outcomes": (
        lambda output: flip(output / "partitions/00003.parquet", 40),
        "partitions/00003.parquet: it is damaged",
        "compute",
        5,
    ),
    "lost outcomes": (
        lambda output: (output / "partitions/00003.parquet").unlink(),
        "partitions/00003.parquet: it is missing",
        "compute",
        5,
    ),
    "outcomes of another partition": (
        lambda output: shutil.copy(output / "partitions/00001.parquet", output / "partitions/00002.parquet"),
        "partition 2: its paths are not those in catalog.parquet",
        "compute",
        5,
    ),
    "description of features": (
        lambda output: change_text(output / "features.zarr/features/zarr.json", "24", "25"),
        "features.zarr/features/zarr.json: it does not describe the run: shape; a repair restores it",
        "restore",
        0,
    ),
    "attributes of features": (
        lambda output: change_text(output / "features.zarr/zarr.json", "pear_1", "bear_1"),
        "features.zarr/zarr.json: its attributes do not match their checksum",
        "restore",
        0,
    ),
    "manifest": (
        lambda output: change_text(output / "manifest.json", '"n_images": 24', '"n_images": 23'),
        "manifest.json: its checksum does not match its content; a repair restores it",
        "restore",
        0,
    ),
    "lost manifest": (
        lambda output: (output / "manifest.json").unlink(),
        "manifest.json: it is missing",
        "restore",
        0,
    ),
    "half a manifest": (
        lambda output: (output / "manifest.json").write_text("{"),
        "manifest.json: it is damaged",
        "restore",
        0,
    ),
    "components": (
        lambda output: flip(output / "pca.zarr/components/c/0/0", 9),
        "pca.zarr: it is damaged .Stored and computed checksum do not match.*reduces the features",
        "reduce",
        0,
    ),
    "results": (
        lambda output: flip(output / "results.parquet/part-00000.parquet", 60),
        "results.parquet/part-00000.parquet: it is damaged",
        "reduce",
        0,
    ),
    "lost results": (
        lambda output: shutil.rmtree(output / "results.parquet"),
        "results.parquet: it does not have one row per image",
        "reduce",
        0,
    ),
    "results for spreadsheets": (
        lambda output: change_text(output / "results.csv", "pear_1/r0_1.jpg", "pear_1/r0_2.jpg"),
        "results.csv: it is not what was written",
        "reduce",
        0,
    ),
    "failures": (
        lambda output: (output / "failures.csv").unlink(),
        "failures.csv: it is missing",
        "reduce",
        0,
    ),
    "quality": (
        lambda output: change_text(output / "quality.json", "0.", "1."),
        "quality.json: its checksum does not match",
        "reduce",
        0,
    ),
    "exploration": (
        lambda output: change_text(output / "explore.csv", "pear_1/r0_1.jpg", "pear_1/r0_2.jpg"),
        "explore.csv: it is not what was written; the next run explores all images again",
        "explore",
        0,
    ),
    "lost exploration": (
        lambda output: (output / "explore.json").unlink(),
        "explore.json: it is missing",
        "explore",
        0,
    ),
    "figure": (
        lambda output: (output / "figures/tsne.png").unlink(),
        "figures/tsne.png: it is missing; the next run renders figures and page again",
        "draw",
        0,
    ),
    "leftovers": (
        lambda output: (output / "features.zarr/status/c" / f"0.{'0' * 32}.partial").write_bytes(b"half"),
        "0.0*.partial: it is a partial file of a killed process; a repair deletes it",
        "delete",
        0,
    ),
}


def change_text(path: Path, old: str, new: str) -> None:
    """Change a text in a file, which must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "expected", "remedy", "n_computed"), DAMAGES.values(), ids=DAMAGES)
def test_run_after_repair_restores_only_what_was_damaged(
    config: Callable[..., Config],
    client: Any,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    damage: Callable[[Path], Any],
    expected: str,
    remedy: str,
    n_computed: int,
) -> None:
    extras = EXTRAS if remedy == "draw" else ("explore", "quality")
    finished: Path = request.getfixturevalue("finished" if remedy == "draw" else "finished_without_figures")
    output = copy_output(finished, tmp_path)
    damage(output)
    found = fruitdask.verify(str(output), repair=True)
    assert any(re.search(expected, str(fault)) for fault in found.faults), [str(fault) for fault in found.faults]
    assert remedy in {fault.remedy for fault in found.faults}
    assert fruitdask.run(config(output, extras), client=client).n_computed == n_computed
    assert fruitdask.verify(str(output)).faults == ()
    # Only times and durations differ.
    folders = (
        "features.zarr",
        "partitions",
        "pca.zarr",
        "results.parquet",
        "results.csv",
        "failures.csv",
        "quality.json",
    )
    explored = ("explore.zarr", "explore.csv", "explore.parquet", "explore_classes.csv", "explore_classes.parquet")
    assert read_bytes(output, *folders, *explored) == read_bytes(finished, *folders, *explored)
    assert set(list_files(output)) == set(list_files(finished))


def rewrite_outcomes(output: Location, index: int, **values: Any) -> None:
    """Write other outcomes of a partition, as a buggy program would."""
    outcomes = next(store.read_outcomes(output, [index])).assign(**values)
    store.write_table(output.child("partitions", f"{index:05d}.parquet"), outcomes)


def rewrite_manifest(output: Location, **values: Any) -> None:
    """Write another manifest, with its checksum."""
    manifest = store.read_run(output)
    assert manifest is not None
    store.write_manifest(output, manifest.change(**values))


def rewrite_results(output: Location, **values: Any) -> None:
    """Write other results, the same in both formats."""
    table = store.read_table(output, "results.parquet", "part-00000.parquet").assign(**values)
    store.write_table(output.child("results.parquet", "part-00000.parquet"), table)
    Path(output.path, "results.csv").write_text(table.to_csv(index=False))


def rewrite_components(output: Location, name: str, *, factor: float = 1.01) -> None:
    """Write other principal components."""
    pca = fruitdask.RunResult(output, {}, 0).pca
    assert pca is not None
    setattr(pca, f"{name}_", getattr(pca, f"{name}_") * factor)
    write_components(output, pca)


def rewrite_features(output: Location) -> None:
    """Give features to an image that failed, and remove those of the other images of its partition."""
    group: Any = zarr.open_group(output.child("features.zarr").path, mode="r+")
    group["features"][10:15] = np.where(np.isnan(group["features"][10:15]), 1, np.nan)


FIT = {
    "is_kept": False,
    "n_components": 2,
    "fit": {"n_images": 23, "n_changed": 0, "n_components": 2, "solver": "covariance_eigh", "seed": 0},
}
#: Errors that no checksum reveals, and their faults.
ERRORS: dict[str, tuple[Callable[[Location], Any], str]] = {
    "status": (
        lambda output: rewrite_outcomes(output, 1, status="missing"),
        "partition 1: of 5 images the status differs from the outcome, first of apple_red_1/r0_1.jpg",
    ),
    "unknown status": (
        lambda output: rewrite_outcomes(output, 1, status="pending"),
        "partition 1: of 5 images the status differs from the outcome",
    ),
    "order": (
        lambda output: rewrite_outcomes(output, 1, path=list("edcba")),
        "partition 1: its paths are not those in catalog.parquet; the next run computes",
    ),
    "label": (
        lambda output: rewrite_outcomes(output, 1, label="plum"),
        "partition 1: its label differs from the outcomes",
    ),
    "features": (rewrite_features, "partition 2: of 1 images there are features, although the outcome is a failure"),
    "counts": (
        lambda output: rewrite_manifest(output, counts={"by_status": {"ok": 24}, "by_class": {}}),
        "manifest.json: counts.by_status disagrees with the outcomes: expected .*'unreadable': 1",
    ),
    "explained variance": (
        lambda output: rewrite_manifest(output, pca=FIT | {"explained_variance_ratio": [0.5, 0.5]}),
        "manifest.json: pca disagrees with pca.zarr",
    ),
    "fingerprint": (
        lambda output: rewrite_manifest(output, fingerprint={"catalog": "a", "decoding": {}, "model": {}}),
        "features.zarr/zarr.json: the fingerprint of its catalog differs from manifest.json; .* --overwrite",
    ),
    "scores": (
        lambda output: rewrite_results(output, pca_2=np.float32(0)),
        "results.parquet, partition 0: pca_1, pca_2 ... disagree with the features",
    ),
    "columns": (
        lambda output: rewrite_results(output, pca_3=np.float32(0)),
        "results.parquet, partition 0: pca_1, pca_2 ... disagree with the features",
    ),
    "mean": (lambda output: rewrite_components(output, "mean"), "pca.zarr: mean does not match the features"),
    "directions": (
        lambda output: rewrite_components(output, "components"),
        "pca.zarr: components do not match the features",
    ),
    "no variance": (
        lambda output: rewrite_components(output, "explained_variance", factor=0),
        "pca.zarr: it is damaged .the first component has the variance 0.0",
    ),
    "partitions": (
        lambda output: store.write_table(output.child("partitions", "00009.parquet"), pd.DataFrame()),
        "partitions/00009.parquet: the run has no such partition; a repair deletes it",
    ),
    "thumbnails": (
        lambda output: store.write_table(output.child("exploring", "a", "rows", "00000.parquet"), pd.DataFrame()),
        "exploring: it is left over from a finished exploration",
    ),
    "erasure": (
        lambda output: store.write_table(output.child("erasing", "00000.parquet"), pd.DataFrame()),
        "erasing: it is left over from an interrupted erasure",
    ),
}


@pytest.mark.parametrize(("change", "expected"), ERRORS.values(), ids=ERRORS)
def test_verify_compares_files_with_each_other(
    finished: Path, tmp_path: Path, change: Callable[[Location], Any], expected: str
) -> None:
    output = Location(str(copy_output(finished, tmp_path)))
    change(output)
    faults = [str(fault) for fault in fruitdask.verify(output.url).faults]
    assert any(re.search(expected, fault) for fault in faults), faults


def test_verify_says_what_is_still_to_be_computed(finished: Path, tmp_path: Path) -> None:
    output = copy_output(finished, tmp_path)
    rewrite_manifest(Location(str(output)), status="running")
    (output / "partitions/00002.parquet").unlink()
    found = fruitdask.verify(str(output))
    assert found.is_well and (found.n_images, found.n_partitions) == (19, 4)
    assert found.notes == ("the run is not finished: 1 of 5 partitions and the results are still to be computed",)
    flip(output / "features.zarr/features/c/2/0", 5)
    assert fruitdask.verify(str(output)).is_well
    flip(output / "features.zarr/features/c/3/0", 5)
    assert [fault.partition for fault in fruitdask.verify(str(output)).faults] == [3]


def test_verify_of_an_exploration_without_a_run(finished: Path, tmp_path: Path) -> None:
    output = copy_output(finished, tmp_path)
    for name in ("manifest.json", "quality.json", "results.csv", "failures.csv"):
        (output / name).unlink()
    for name in ("features.zarr", "partitions", "pca.zarr", "results.parquet"):
        shutil.rmtree(output / name)
    assert fruitdask.verify(str(output)).is_well
    flip(output / "explore.parquet", 50)
    found = fruitdask.verify(str(output), repair=True)
    assert {fault.remedy for fault in found.faults} == {"explore"}
    assert fruitdask.verify(str(output)).notes == ("the exploration is not finished: the next run finishes it",)


def test_verify_does_not_touch_an_interrupted_erasure(finished: Path, tmp_path: Path) -> None:
    output = copy_output(finished, tmp_path)
    rewrite_manifest(Location(str(output)), status="erasing")
    found = fruitdask.verify(str(output), repair=True)
    assert found.is_well and found.notes == ("an erasure was interrupted; run again to finish it, then verify",)


def test_verify_knows_when_nothing_can_be_restored(finished: Path, tmp_path: Path) -> None:
    output = copy_output(finished, tmp_path)
    flip(output / "manifest.json", 30)
    flip(output / "features.zarr/zarr.json", 30)
    found = fruitdask.verify(str(output), repair=True)
    assert not found.can_be_mended and "start again with --overwrite" in str(found.faults[0])


def test_verify_refuses_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected the results of a run or an exploration"):
        fruitdask.verify(str(tmp_path))


@pytest.mark.slow
def test_verify_and_repair_on_s3(finished: Path, s3_bucket: tuple[str, dict[str, Any]], s3_client: Any) -> None:
    bucket, options = s3_bucket
    for name in list_files(finished):
        s3_client.upload_file(str(finished / name), bucket, f"out/{name}")
    url = f"s3://{bucket}/out"
    assert fruitdask.verify(url, storage_options=options).is_well
    s3_client.put_object(Bucket=bucket, Key="out/features.zarr/features/c/1/0", Body=b"damaged")
    found = fruitdask.verify(url, storage_options=options, repair=True)
    assert [(fault.partition, fault.remedy) for fault in found.faults] == [(1, "compute")]
    assert store.list_committed(Location(url, options)) == {0, 2, 3, 4}


def test_reducing_a_store_with_a_flipped_byte_is_one_sentence(
    config: Callable[..., Config], client: Any, finished: Path, tmp_path: Path
) -> None:
    output = copy_output(finished, tmp_path)
    rewrite_manifest(Location(str(output)), status="running")
    flip(output / "features.zarr/features/c/3/0", 5)
    with pytest.raises(DamageError, match="features/c/3/0 is damaged .*partition 3: .*--repair"):
        fruitdask.run(config(output), client=client)


class History:
    """Photographs with a table of labels, the output of runs on them, and random actions."""

    def __init__(self, folder: Path, model: ModelConfig, client: Any, seed: int) -> None:
        self.source, self.output, self._folder = folder / "in", folder / "out", folder
        self._model, self._client, self._random = model, client, np.random.default_rng(seed)
        self._labels: dict[str, str] = {}
        self.explores = True
        self._exclude: tuple[str, ...] = ()
        self.add(12)

    @property
    def config(self) -> Config:
        """The configuration as it is now."""
        pd.DataFrame(self._labels.items(), columns=["path", "label"]).to_csv(self._folder / "labels.csv", index=False)
        images = {"manifest": str(self._folder / "labels.csv"), "exclude": self._exclude}
        sections: dict[str, dict[str, Any]] = {
            "input": {"url": str(self.source)} | images,
            "featurize": {"images_per_partition": 5, "max_failed_fraction": 0.5},
            "explore": {"enabled": self.explores},
        }
        return configure(self.source, self.output, self._model, **sections)

    def choose(self, n_images: int) -> list[str]:
        """Choose some of the images."""
        return [str(path) for path in self._random.choice(sorted(self._labels), n_images, replace=False)]

    def add(self, n_images: int = 3) -> None:
        """Add images, whose names sort before, between and after the existing ones."""
        names = {f"{number:03d}.png" for number in range(100)} - self._labels.keys()
        for name in self._random.choice(sorted(names), n_images, replace=False):
            draw(self.source, str(name), seed=int(self._random.integers(2**16)))
            self._labels[str(name)] = str(self._random.choice(["apple", "pear"]))

    def change(self) -> None:
        """Change images."""
        draw(self.source, *self.choose(2), seed=int(self._random.integers(2**16)))

    def lose(self) -> None:
        """Delete images, one of which stays in the table of labels."""
        lost = self.choose(3)
        for path in lost:
            (self.source / path).unlink()
        for path in lost[1:]:
            del self._labels[path]
        self.run()
        del self._labels[lost[0]]

    def relabel(self) -> None:
        """Give images another class, one of them a new one."""
        first, second = self.choose(2)
        self._labels |= {first: "quince", second: {"apple": "pear"}.get(self._labels[second], "apple")}

    def rename(self) -> None:
        """Rename an image."""
        (path,) = self.choose(1)
        (self.source / path).rename(self.source / f"x{path}")
        self._labels[f"x{path}"] = self._labels.pop(path)

    def retry(self) -> None:
        """Repair an image that has failed, and try it again."""
        (path,) = self.choose(1)
        mend = break_image(self.source / path)
        # The age changes, so that the broken image is read.
        os.utime(self.source / path, (0, 0))
        self.run()
        mend()
        os.utime(self.source / path, (0, 0))
        fruitdask.run(self.config, retry_failed=True, client=self._client)

    def repair(self) -> None:
        """Damage a file, and repair the folder."""
        name = str(self._random.choice(list_files(self.output)))
        flip(self.output / name, int(self._random.integers(10_000)))
        fruitdask.verify(str(self.output), repair=True)

    def explore(self) -> None:
        """Explore without a run."""
        self.run()
        fruitdask.explore(self.config, client=self._client)

    def explore_anew(self) -> None:
        """Explore only other images, which deletes the run."""
        self.add()
        config = self.config
        output = config.output.model_copy(update={"overwrite": True})
        fruitdask.explore(config.model_copy(update={"output": output}), client=self._client)

    def toggle(self) -> None:
        """Turn exploration on or off."""
        self.explores = not self.explores
        self.add(1)

    def interrupt(self) -> None:
        """Interrupt a run of other images."""
        self.add()
        run_and_interrupt(self.config, self._client, str(self._random.choice(sorted(INTERRUPTIONS))))

    def erase(self) -> None:
        """Erase an image, which stays in the input."""
        self.run()
        (path,) = self.choose(1)
        fruitdask.erase(self.config, [path], client=self._client)
        self._exclude += (path,)
        del self._labels[path]

    def run(self) -> fruitdask.RunResult:
        """Run."""
        return fruitdask.run(self.config, client=self._client)

    def check(self, result: fruitdask.RunResult) -> None:
        """Check the results against the files."""
        table = result.table.set_index("path")
        features = pd.DataFrame(result.features.compute(), index=table.index).loc[sorted(self._labels)]
        np.testing.assert_allclose(features, compute_colours(self.source, list(features.index)), rtol=1e-6)
        assert table.loc[list(self._labels), "label"].to_dict() == self._labels
        assert set(table.index[table["status"] == "ok"]) == self._labels.keys()
        if self.explores:
            assert result.exploration is not None
            images = result.exploration.images
            assert dict(zip(images["path"], images["label"], strict=True)) == self._labels

    def check_that_damage_is_found(self) -> None:
        """Change an entry about an image, as a buggy program would, then a byte, and check that each is found."""
        path = self.output / "explore.parquet"
        table, saved = pd.read_parquet(path), {name: (self.output / name).read_bytes() for name in _EXPLORED}
        row, other = self._random.choice(len(table), 2, replace=False)
        wrong = {
            "path": lambda: table.replace({"path": {table["path"][row]: "other.png"}}),
            "twice": lambda: table.iloc[np.where(table.index == row, other, table.index)],
            "label": lambda: table.assign(label=np.where(table.index == row, "plum", table["label"])),
            "lost": lambda: table.drop(index=row),
        }
        for name, make in wrong.items():
            store.write_table(Location(str(path)), make())
            (self.output / "explore.csv").write_bytes(format_csv(make()).encode())
            faults = [str(fault) for fault in fruitdask.verify(str(self.output)).faults]
            assert any("its rows are not those of the catalog" in fault for fault in faults), (name, faults)
        for name, data in saved.items():
            (self.output / name).write_bytes(data)
        flip(path, 50)
        assert "explore.parquet: it is damaged" in str(fruitdask.verify(str(self.output)).faults[0])
        path.write_bytes(saved[path.name])


def check_is_well(output: Path, deed: str) -> None:
    """Check that verifying finds nothing."""
    faults = [str(fault) for fault in fruitdask.verify(str(output)).faults]
    assert faults == [], (deed, faults)


_EXPLORED = ("explore.parquet", "explore.csv")
#: Each of these happens in each history, in random order. Erasing is last: after it, an output does not grow.
_DEEDS = (
    History.add,
    History.change,
    History.lose,
    History.relabel,
    History.rename,
    History.retry,
    History.repair,
    History.explore,
    History.explore_anew,
    History.toggle,
    History.toggle,
    History.interrupt,
)


@pytest.mark.slow
def test_verify_finds_nothing_after_any_history(tmp_path: Path, tiny_model: ModelConfig, client: Any) -> None:
    history = History(tmp_path, tiny_model, client, seed=1)
    history.run()
    for number in [*np.random.default_rng(1).permutation(len(_DEEDS)), None]:
        deed = History.erase if number is None else _DEEDS[number]
        deed(history)
        if number is not None:
            # Interrupted or pending work is not damage.
            check_is_well(history.output, deed.__name__)
        result = history.run()
        check_is_well(history.output, deed.__name__)
        history.check(result)
    history.explores = True
    history.run()
    history.check_that_damage_is_found()

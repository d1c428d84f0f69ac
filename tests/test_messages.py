"""Sentences that users read: each test makes a real mistake, and compares the message with ``golden/messages.txt``.

After changing a sentence, write the file again with ``pytest tests/test_messages.py --write-golden``, and review the
difference.
"""

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from runs import configure, draw

import fruitdask
from fruitdask import store
from fruitdask.cluster import open_client
from fruitdask.cluster.regions import check_regions
from fruitdask.core.config import Config, ModelConfig
from fruitdask.core.sample import render_fruit
from fruitdask.core.storage import Location
from fruitdask.errors import FruitdaskError

GOLDEN = Path(__file__).parent / "golden" / "messages.txt"
MINIMAL = "input: {url: s3://photos/fruits}\noutput: {url: s3://results/run}\n"
_WRITE_AGAIN = "if this is what it should say, write the file again with pytest tests/test_messages.py --write-golden"


class Scene:
    """A folder in which to make a mistake, and what a test needs for that."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        self.folder: Path = request.getfixturevalue("tmp_path")
        self.images: Path = request.getfixturevalue("sample_folder")
        self.model: ModelConfig = request.getfixturevalue("tiny_model")

    def read(self, text: str, *overrides: str) -> Config:
        """Load a configuration file."""
        (self.folder / "run.yaml").write_text(text)
        return fruitdask.load_config(self.folder / "run.yaml", overrides=overrides)

    def configure(self, **sections: Any) -> Config:
        """Configure a small run into the folder."""
        return configure(self.images, self.folder / "out", self.model, **sections)

    def run(self, **sections: Any) -> fruitdask.RunResult:
        """Run, on the cluster of this session."""
        return fruitdask.run(self.configure(**sections), client=self._request.getfixturevalue("client"))

    def finish(self, **sections: Any) -> Path:
        """Fill the output folder with a finished run, to be damaged."""
        self._request.getfixturevalue("finish")(self.configure(**sections))
        return self.folder / "out"

    def fill(self, *names: str) -> str:
        """Make a folder of files that are never opened."""
        for name in names:
            (self.folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / "in" / name).write_bytes(b"x")
        return str(self.folder / "in")

    def list(self, **settings: Any) -> Any:
        """List the images of an input."""
        return fruitdask.list_images(self.configure(input=settings).input)

    def list_table(self, text: str) -> Any:
        """List the images that a table of labels names."""
        (self.folder / "labels.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
        return self.list(url=self.fill("1.jpg", "a/2.jpg"), manifest=str(self.folder / "labels.csv"))

    def mask(self, error: BaseException) -> str:
        """Mask the parts of an error that differ from run to run: folders, hashes, addresses."""
        text = f"{type(error).__name__}: {error}"
        places = {self.model.weights: "MODEL", str(self.images): "IMAGES", str(self.folder): "HERE"}
        for place, name in places.items():
            text = text.replace(place, name)
        return re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12}\b", "HASH", text)


def list_archive(scene: Scene) -> None:
    """List a ZIP archive with a compression that fruitdask does not read."""
    with zipfile.ZipFile(scene.folder / "photos.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/1.jpg", b"x")
    scene.list(url=f"zip://::{scene.folder}/photos.zip")


def open_cluster(scene: Scene, path: str, **options: Any) -> None:
    """Open a cluster of a class."""
    config = scene.configure(cluster={"kind": "custom", "class": path, "options": options, "n_workers": 1})
    with open_client(config.cluster):
        pass


def compare_with(scene: Scene, columns: dict[str, Any] | None, **settings: str) -> None:
    """Compare a run with a Spark job that has written one file, or none."""
    (scene.folder / "spark").mkdir()
    if columns is None:
        (scene.folder / "spark" / "_SUCCESS").touch()
    else:
        pd.DataFrame(columns).to_parquet(scene.folder / "spark" / "part-0.parquet")
    fruitdask.compare(str(scene.finish()), str(scene.folder / "spark"), **settings)


def damage(path: Path, place: int = -1) -> None:
    """Change a byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def run_on_a_few(scene: Scene, n_images: int, **reduce: Any) -> None:
    """Run on a number of images."""
    draw(scene.folder / "in", *(f"apple/{number}.png" for number in range(n_images)))
    scene.run(input={"url": str(scene.folder / "in")}, reduce=reduce)


def run_on_broken_images(scene: Scene) -> None:
    """Run on images, most of which cannot be read."""
    shutil.copytree(scene.images, scene.folder / "in")
    for path in sorted((scene.folder / "in").rglob("*.jpg"))[::2]:
        path.write_bytes(b"broken")
    scene.run(input={"url": str(scene.folder / "in")}, featurize={"images_per_partition": 24})


def run_after_erasing(scene: Scene) -> None:
    """Erase images that stay in the input, and run again."""
    scene.finish()
    fruitdask.erase(scene.configure(), ["pear_1/*"])
    scene.run()


def apply_into_another(scene: Scene) -> None:
    """Apply a run, and write into the results of another run on the same images."""
    shutil.copytree(scene.finish(), scene.folder / "other")
    fruitdask.apply(scene.folder / "out", input=str(scene.images), output=str(scene.folder / "other"))


def open_an_exploration(scene: Scene) -> None:
    """Open results that are only an exploration."""
    manifest = store.ExplorationManifest(fruitdask="1", status="running", fingerprint={})
    store.write_manifest(Location(str(scene.folder)), manifest)
    fruitdask.open(str(scene.folder))


def open_unfinished(scene: Scene) -> None:
    """Open the results of a run that was interrupted before its end."""
    output = Location(str(scene.finish()))
    store.write_manifest(output, store.RunManifest.model_validate(fruitdask.open(output.url).manifest).reopen())
    fruitdask.open(output.url)


def run_on_damage(scene: Scene) -> None:
    """Reduce features with a damaged chunk."""
    damage(scene.finish() / "features.zarr" / "features" / "c" / "3" / "0", 5)
    scene.run(reduce={"n_components": 3})


def show_damage(scene: Scene, name: str) -> None:
    """Render the report of results with a damaged file."""
    output = scene.finish(quality={"enabled": True})
    (output / name).write_bytes(b"{")
    fruitdask.render_report(scene.configure(quality={"enabled": True}, report={"enabled": True}))


def run_on_a_foreign_manifest(scene: Scene) -> None:
    """Run into a folder that holds another program's manifest."""
    (scene.folder / "out").mkdir()
    (scene.folder / "out" / "manifest.json").write_text("[1, 2]")
    scene.run()


def build(scene: Scene, model: Any, **settings: Any) -> None:
    """Use a Keras model of a user's own."""
    model.save(scene.folder / "own.keras")
    fruitdask.build_artifact(
        ModelConfig(**{"weights": str(scene.folder / "own.keras"), "preprocessing": "none"} | settings)
    )


def build_of_bytes(scene: Scene, name: str, data: bytes, **settings: Any) -> None:
    """Use a file that is not a model."""
    (scene.folder / name).write_bytes(data)
    fruitdask.build_artifact(ModelConfig(weights=str(scene.folder / name), **settings))


def build_of_zip(scene: Scene) -> None:
    """Use a download of Teachable Machine, unchanged."""
    with zipfile.ZipFile(scene.folder / "converted_keras.zip", "w") as archive:
        archive.writestr("keras_model.h5", b"")
    fruitdask.build_artifact(ModelConfig(weights=str(scene.folder / "converted_keras.zip"), preprocessing="none"))


def make_network(*shape: int | None) -> Any:
    """Make a network that takes images of a shape."""
    import keras

    image = keras.Input(shape)
    return keras.Model(image, keras.layers.Dense(2)(keras.layers.Flatten()(image)))


def make_network_of_two_inputs() -> Any:
    """Make a network that takes an image and a vector."""
    import keras

    image, vector = keras.Input((32, 32, 3)), keras.Input((4,))
    return keras.Model([image, vector], keras.layers.Concatenate()([keras.layers.Flatten()(image), vector]))


def sample_into_a_full_folder(scene: Scene) -> None:
    """Draw a sample into a folder that is not empty."""
    from click.testing import CliRunner

    from fruitdask.cli import cli

    done = CliRunner().invoke(cli, ["sample", scene.fill("mine.txt")])
    raise FruitdaskError(done.stderr.strip())


#: Mistakes by name.
MISTAKES: dict[str, Callable[[Scene], Any]] = {
    # The configuration.
    "unknown section": lambda scene: scene.read(MINIMAL + "modle: {}"),
    "unknown key": lambda scene: scene.read(MINIMAL + "model:\n  pooling: avg\n  weight: x"),
    "unknown key without a similar one": lambda scene: scene.read(MINIMAL + "model: {xyzzy: 1}"),
    "unknown key of a nested section": lambda scene: scene.read(MINIMAL.replace("}", ", sample: {perclass: 3}}", 1)),
    "unknown key of a kind of cluster": lambda scene: scene.read(
        MINIMAL + "cluster:\n  kind: address\n  address: tcp://h:1\n  timeout_second: 3"
    ),
    "two mistakes": lambda scene: scene.read(MINIMAL + "model: {pooling: mean}\nplots: {dpi: 3}"),
    "unknown choice": lambda scene: scene.read(MINIMAL, "model.pooling=mean"),
    "wrong type": lambda scene: scene.read(MINIMAL, "input.limit=many"),
    "below the minimum": lambda scene: scene.read(MINIMAL, "input.limit=0"),
    "word instead of a list": lambda scene: scene.read(MINIMAL, "input.classes=pear_1"),
    "override without a value": lambda scene: scene.read(MINIMAL, "model.pooling"),
    "override without a section": lambda scene: scene.read(MINIMAL, "pooling=max"),
    "override that is not YAML": lambda scene: scene.read(MINIMAL, "input.classes=[pear_1"),
    "missing section": lambda scene: scene.read("input: {url: x}"),
    "missing key": lambda scene: scene.read("input: {url: x}\noutput:\n  overwrite: true"),
    "missing address": lambda scene: scene.read(MINIMAL + "cluster: {kind: address}"),
    "missing configuration": lambda scene: fruitdask.load_config(scene.folder / "nope.yaml"),
    "folder instead of a configuration": lambda scene: fruitdask.load_config(scene.folder),
    "configuration that is a list": lambda scene: scene.read("- input\n- output"),
    "configuration that is not YAML": lambda scene: scene.read("input: {url: x"),
    "huge configuration": lambda scene: scene.read(MINIMAL + "#" * 1_048_576),
    "variable that is not set": lambda scene: scene.read("input:\n  url: ${FRUITS_UNSET}/in\noutput: {url: out}"),
    "zero components": lambda scene: scene.read(MINIMAL, "reduce.n_components=0"),
    "fraction with the wrong solver": lambda scene: scene.read(
        MINIMAL, "reduce.n_components=0.8", "reduce.solver=randomized"
    ),
    "Keras model without preprocessing": lambda scene: scene.read(MINIMAL, "model.weights=mine.keras"),
    "precision of a Keras model": lambda scene: scene.read(
        MINIMAL, "model.weights=mine.keras", "model.preprocessing=none", "model.precision=mixed_float16"
    ),
    "more pixels than Pillow opens": lambda scene: scene.read(MINIMAL, "featurize.max_pixels=178956971"),
    "dashboard that other machines can reach": lambda scene: scene.read(
        MINIMAL, "cluster.dashboard_address=0.0.0.0:8787"
    ),
    "figure of a component that is not kept": lambda scene: scene.read(MINIMAL, "plots.components=[1, 3]"),
    # The input.
    "no folder": lambda scene: scene.list(url=str(scene.folder / "nope")),
    "no images": lambda scene: scene.list(url=scene.fill("a/notes.txt", "b/1.mp4", "README")),
    "no such class": lambda scene: scene.list(url=str(scene.images), classes=["plum", "pear_1"]),
    "all images excluded": lambda scene: scene.list(url=str(scene.images), exclude=["*"]),
    "no such protocol": lambda scene: scene.list(url="nowhere://bucket"),
    "protocol without its package": lambda scene: scene.list(url="gs://bucket/photos"),
    "no table of labels": lambda scene: scene.list(url=str(scene.images), manifest=str(scene.folder / "none.csv")),
    "table without rows": lambda scene: scene.list_table("path,label\n"),
    "table with other columns": lambda scene: scene.list_table("file,class\n1.jpg,a\n"),
    "table with a path twice": lambda scene: scene.list_table("path,label\n1.jpg,a\n1.jpg,b\n"),
    "table with an empty field": lambda scene: scene.list_table("path,label\n1.jpg,\n"),
    "table with a path outside the input": lambda scene: scene.list_table("path,label\n../1.jpg,a\n"),
    "table of other files": lambda scene: scene.list_table("path,label\nx.jpg,a\ny.jpg,b\n"),
    "table that is not UTF-8": lambda scene: scene.list_table("path,label\n\udce9.jpg,a\n"),
    "label pattern that does not match a path": lambda scene: scene.list(
        url=scene.fill("odd/2.jpg"), label_from="class_([a-z]+)/"
    ),
    "archive of another compression": list_archive,
    "input in a region that is not allowed": lambda scene: check_regions(
        scene.configure(
            input={"url": "s3://photos", "region": "us-east-1", "storage_options": {"endpoint_url": "https://s3.test"}},
            privacy={"allowed_regions": "eu"},
        )
    ),
    # A run.
    "output inside the input": lambda scene: scene.run(output={"url": str(scene.images / "out")}),
    "output that is a file": lambda scene: scene.run(output={"url": f"{scene.model.weights}/out"}),
    "output in an archive": lambda scene: scene.run(output={"url": f"zip://out::{scene.folder}/x.zip"}),
    "output among other files": lambda scene: scene.run(output={"url": scene.fill("config.yaml")}),
    "sample for a remote input": lambda scene: scene.run(input={"url": "memory://drawn", "sample": {"per_class": 1}}),
    "more components than images": lambda scene: run_on_a_few(scene, 4, n_components=5),
    "more components than features": lambda scene: run_on_a_few(scene, 9, n_components=7),
    "too many failures": run_on_broken_images,
    "no scheduler": lambda scene: fruitdask.run(
        scene.configure(cluster={"kind": "address", "address": "tcp://127.0.0.1:9", "timeout_seconds": 0.5})
    ),
    "class of clusters of a missing package": lambda scene: open_cluster(scene, "no_such_thing.Cluster"),
    "class of clusters that does not exist": lambda scene: open_cluster(scene, "distributed.LocalClutser"),
    "option that a class of clusters does not have": lambda scene: open_cluster(
        scene, "dask_cloudprovider.aws.FargateCluster", imag="x"
    ),
    "unknown solver": lambda scene: fruitdask.PCA(svd_solver="auto").fit(np.eye(3)),
    "local folders on EC2": lambda scene: fruitdask.run(
        scene.configure(cluster={"kind": "ec2", "docker_image": "any"})
    ),
    "foreign manifest": run_on_a_foreign_manifest,
    # An existing output.
    "results of other images": lambda scene: (scene.finish(), scene.run(input={"limit": 10})),
    "results of another model": lambda scene: (scene.finish(), scene.run(model={"preprocessing": "tf"})),
    "results of another decoding": lambda scene: (scene.finish(), scene.run(featurize={"max_pixels": 9999})),
    "exploration into results of other images": lambda scene: (
        scene.finish(),
        fruitdask.explore(scene.configure(input={"limit": 10})),
    ),
    "open a folder without results": lambda scene: fruitdask.open(str(scene.folder)),
    "open an exploration without a run": open_an_exploration,
    "open an unfinished run": open_unfinished,
    "search for a path that does not exist": lambda scene: fruitdask.open(str(scene.finish())).similar("nope.jpg"),
    "search for a file that is not a photograph": lambda scene: fruitdask.open(str(scene.finish())).similar(
        b"no photograph"
    ),
    "search with an unknown metric": lambda scene: fruitdask.open(str(scene.finish())).similar(0, metric="manhattan"),
    "search for a row that does not exist": lambda scene: fruitdask.open(str(scene.finish())).similar(24),
    "transform a number instead of an image": lambda scene: fruitdask.open(str(scene.finish())).transform([24]),
    "transform with another network": lambda scene: fruitdask.open(str(scene.finish())).transform(
        [], overrides=["model.preprocessing=tf"]
    ),
    "compare with a folder without Parquet": lambda scene: compare_with(scene, None),
    "compare without vectors": lambda scene: compare_with(scene, {"path": ["a"]}),
    "compare with a column that does not exist": lambda scene: compare_with(
        scene, {"path": ["a"], "features": [[1.0]]}, path_column="image"
    ),
    "compare with a column of words": lambda scene: compare_with(
        scene, {"path": ["a"], "word": ["x"]}, features_column="word"
    ),
    "predict without a classifier": lambda scene: fruitdask.predict(
        str(scene.finish()), input=str(scene.images), output=str(scene.folder / "other")
    ),
    "apply a run into its own folder": lambda scene: fruitdask.apply(
        scene.finish(), input=str(scene.images), output=str(scene.folder / "out")
    ),
    "apply a run into the folder of another": apply_into_another,
    "export to an unknown format": lambda scene: fruitdask.export(str(scene.folder), scene.folder / "fruits", "excel"),
    "export for Lance to a URL": lambda scene: fruitdask.export(str(scene.finish()), "memory://fruits", "lance"),
    "export over an existing folder": lambda scene: fruitdask.export(str(scene.finish()), scene.folder),
    "report without results": lambda scene: fruitdask.render_report(scene.configure()),
    "verify without results": lambda scene: fruitdask.verify(str(scene.folder)),
    "erase without results": lambda scene: fruitdask.erase(scene.configure(), ["pear_1/*"]),
    "erase with a pattern that matches nothing": lambda scene: (
        scene.finish(),
        fruitdask.erase(scene.configure(), ["nobody/*"]),
    ),
    "erase with a pattern that matches everything": lambda scene: (
        scene.finish(),
        fruitdask.erase(scene.configure(), ["*"]),
    ),
    "run after an erasure": run_after_erasing,
    "damaged features": run_on_damage,
    "damaged quality": lambda scene: show_damage(scene, "quality.json"),
    "damaged results": lambda scene: show_damage(scene, "results.parquet/part-00000.parquet"),
    # The network.
    "misspelt network": lambda scene: fruitdask.build_artifact(ModelConfig(name="MobilNetV2")),
    "unknown network": lambda scene: fruitdask.build_artifact(ModelConfig(name="Pineapple")),
    "no such layer": lambda scene: fruitdask.build_artifact(
        ModelConfig(name="SqueezeNet", layer="fire99", weights="random")
    ),
    "weights in a file of another kind": lambda scene: fruitdask.build_artifact(ModelConfig(weights="weights.txt")),
    "weights file that does not exist": lambda scene: fruitdask.build_artifact(
        ModelConfig(weights=str(scene.folder / "none.h5"))
    ),
    "file without weights": lambda scene: build_of_bytes(scene, "text.h5", b"no weights"),
    "file that is not a Keras model": lambda scene: build_of_bytes(
        scene, "no.keras", b"no archive", preprocessing="none"
    ),
    "archive from Teachable Machine": build_of_zip,
    "model for rectangular images": lambda scene: build(scene, make_network(32, 24, 3)),
    "model for grey images": lambda scene: build(scene, make_network(32, 32, 1)),
    "model of several inputs": lambda scene: build(scene, make_network_of_two_inputs()),
    "mixed precision on OpenVINO": lambda scene: fruitdask.build_artifact(
        ModelConfig(name="SqueezeNet", weights="random", engine="openvino", precision="mixed_float16")
    ),
    "sample into a folder that is not empty": sample_into_a_full_folder,
    "fruit that is not in the sample": lambda scene: render_fruit("durian_1", angle_degrees=0),
}


def read_golden() -> dict[str, str]:
    """Read the sentences by the names of the mistakes."""
    if not GOLDEN.exists():
        return {}
    blocks = GOLDEN.read_text("utf-8").strip().split("\n\n")
    return dict(block.removeprefix("# ").split("\n", 1) for block in blocks)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_has_the_message_of_the_golden_file(request: pytest.FixtureRequest, name: str) -> None:
    scene = Scene(request)
    with pytest.raises(FruitdaskError, match=".") as caught:
        MISTAKES[name](scene)
    said = scene.mask(caught.value)
    if request.config.getoption("--write-golden"):
        written = read_golden() | {name: said}
        GOLDEN.write_text("\n\n".join(f"# {key}\n{written[key]}" for key in MISTAKES if key in written) + "\n", "utf-8")
    assert said == read_golden().get(name), _WRITE_AGAIN


def test_golden_file_has_no_other_sentences() -> None:
    assert list(read_golden()) == list(MISTAKES)

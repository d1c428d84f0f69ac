"""Small runs: their images, their configurations, and finished outputs that a session computes once and hands out as
copies.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fruitdask
from fruitdask import store
from fruitdask.core.config import Config, ModelConfig
from fruitdask.pipeline import featurize as featurize_module, run as run_module

MakeConfig = Callable[..., Config]
Finish = Callable[[Config], fruitdask.RunResult]

#: Images in each partition of a small run.
SIZE = 5
#: The slowest stages of a small run are off; a test turns on those that it checks.
EXTRAS = ("explore", "quality", "check", "plots", "report")
ON = {"enabled": True}
OFF = {"enabled": False}
#: Functions at which a run is interrupted, and the modules that call them.
INTERRUPTIONS = {
    "write_catalog": store,
    "resize_store": store,
    "map_partitions": featurize_module,
    "check_failures": featurize_module,
    "reduce_features": run_module,
}


def draw(folder: Path, *names: str, seed: int = 0) -> None:
    """Draw images of noise that differ by name and seed, one folder per class."""
    for name in names:
        random = np.random.default_rng([seed, *name.encode()])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, random.integers(20, 256), (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)


def compute_colours(folder: Path, paths: list[str]) -> np.ndarray:
    """Compute what the tiny model computes using only NumPy; a row is NaN where the image is missing."""
    features = np.full((len(paths), 6), np.nan)
    for row, path in enumerate(paths):
        if (folder / path).exists():
            pixels = np.asarray(Image.open(folder / path), np.float64)
            features[row] = [*pixels.mean(axis=(0, 1)), *pixels.max(axis=(0, 1))]
    return features


def break_image(path: Path) -> Callable[[], None]:
    """Overwrite a file without changing its size and age; returns a function that restores it."""
    data, age = path.read_bytes(), path.stat().st_mtime_ns

    def write(content: bytes) -> None:
        path.write_bytes(content)
        os.utime(path, ns=(age, age))

    write(b"x" * len(data))
    return lambda: write(data)


def configure(source: Path | str, output: Path | str, model: ModelConfig, /, **sections: dict[str, Any]) -> Config:
    """Configure a run of a model in partitions of 5, without exploration, quality, check, figures and page unless a
    section asks for them.
    """
    defaults: dict[str, dict[str, Any]] = {
        "input": {"url": str(source)},
        "model": model.model_dump(),
        "cluster": {"kind": "local", "n_workers": 1, "dashboard_address": None},
        "featurize": {"images_per_partition": SIZE},
        "output": {"url": str(output)},
    } | dict.fromkeys(EXTRAS, OFF)
    if sections.get("cluster", {}).get("kind", "local") != "local":
        # Clusters of another kind have other keys.
        defaults["cluster"] = {}
    names = [*defaults, *(name for name in sections if name not in defaults)]
    return fruitdask.load_config({name: defaults.get(name, {}) | sections.get(name, {}) for name in names})


class FinishedRuns:
    """Finished outputs, each computed once."""

    def __init__(self, folder: Path, client: Any) -> None:
        self._folder, self._client = folder, client
        self._outputs: dict[tuple[Any, ...], Path] = {}

    def __call__(self, config: Config) -> fruitdask.RunResult:
        """Fill the output folder of a configuration with the results of a finished run on its images, all on this
        machine.
        """
        files = sorted(path for path in Path(config.input.url).rglob("*") if path.is_file())
        assert files and not Path(config.output.url).exists()
        # A catalog identifies images by path, size and age, all of which shutil.copytree preserves.
        images = tuple(
            (str(path.relative_to(config.input.url)), path.stat().st_size, path.stat().st_mtime_ns) for path in files
        )
        key = (config.model_dump_json(exclude={"input": {"url"}, "output": {"url"}}), images)
        if key not in self._outputs:
            kept = self._folder / str(len(self._outputs))
            output = config.output.model_copy(update={"url": str(kept)})
            fruitdask.run(config.model_copy(update={"output": output}), client=self._client)
            self._outputs[key] = kept
        shutil.copytree(self._outputs[key], config.output.url)
        result = fruitdask.run(config)
        assert result.n_computed == 0
        return result


def run_and_interrupt(config: Config, client: Any, name: str) -> None:
    """Run, and interrupt the run at the function of that name, if the run calls it."""

    def interrupt(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt("in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(INTERRUPTIONS[name], name, interrupt)
        try:
            fruitdask.run(config, client=client)
        except KeyboardInterrupt as error:
            assert str(error) == "in this test"
    # Dask cannot stop a running task, and this cluster stays open: the task would write during the next run.
    while any(client.run(lambda dask_worker: len(dask_worker.state.all_running_tasks)).values()):
        pass

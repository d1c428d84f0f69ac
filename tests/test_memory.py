"""Images and files that are large for their workers; memory and limits are real."""

import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import dask
import pandas as pd
import pytest
from PIL import Image

import fruitdask
from fruitdask.cluster import open_client
from fruitdask.core.config import Config, ModelConfig
from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location
from fruitdask.worker.fetch import ImageSource, Stopwatch, read_batches
from fruitdask.worker.images.resize import resize_square

pytestmark = pytest.mark.slow

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")

MIB = 1 << 20
SIDE = 10_000
RunFolder = Callable[..., pd.DataFrame]


@pytest.fixture(scope="module")
def photographs_of_100_megapixels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three files of 100 million pixels each, which need different amounts of memory to decode."""
    folder = tmp_path_factory.mktemp("large")
    scene = Image.linear_gradient("L").resize((SIDE, SIDE))
    files = {name: folder / name for name in ("baseline.jpg", "progressive.jpg", "transparent.png")}
    colours = Image.merge("RGB", (scene, scene.transpose(Image.Transpose.ROTATE_90), scene))
    colours.save(files["baseline.jpg"])
    colours.save(files["progressive.jpg"], progressive=True)
    colours.putalpha(scene)
    colours.save(files["transparent.png"], compress_level=1)
    return files


@pytest.fixture
def run_folder(tiny_model: ModelConfig, sample_folder: Path, tmp_path: Path) -> RunFolder:
    """Run the tiny model on some large files among small ones; returns the outcomes by file name."""

    def run_folder(files: list[Path], *, n_threads: int, memory: int, **featurize: Any) -> pd.DataFrame:
        folder = tmp_path / "images" / "apple"
        folder.mkdir(parents=True)
        for number, file in enumerate(files):
            os.link(file, folder / f"{number}-{file.name}")
        for file in list(sample_folder.rglob("*.jpg"))[:4]:
            os.link(file, folder / f"small-{file.name}")
        config: Config = fruitdask.load_config(
            {
                "input": {"url": str(tmp_path / "images")},
                "model": tiny_model.model_dump(),
                "cluster": {
                    "n_workers": 1,
                    "threads_per_worker": n_threads,
                    "memory_limit": memory,
                    "dashboard_address": None,
                },
                "featurize": {"images_per_partition": 2, "max_failed_fraction": 1} | featurize,
                **{name: {"enabled": False} for name in ("explore", "quality", "plots", "report")},
                "output": {"url": str(tmp_path / "out")},
            }
        )
        with open_client(config.cluster) as client:
            before = client.run(os.getpid)
            fruitdask.run(config, client=client)
            has_survived = client.run(os.getpid) == before
        outcomes = pd.concat(map(pd.read_parquet, (tmp_path / "out" / "partitions").glob("*.parquet")))
        outcomes.attrs["has_survived"] = has_survived
        return outcomes.set_index(outcomes["path"].str.rpartition("/")[2])

    return run_folder


@needs_proc
def test_large_photographs_are_decoded_one_at_a_time_where_they_would_not_fit_together(
    run_folder: RunFolder, photographs_of_100_megapixels: dict[str, Path]
) -> None:
    # All of them at once would take 2 GB.
    files = list(photographs_of_100_megapixels.values())
    outcomes = run_folder(files, n_threads=3, memory=1600 * MIB, max_pixels=SIDE * SIDE, images_per_partition=1)
    assert set(outcomes["status"]) == {"ok"} and len(outcomes) == 7
    assert outcomes.attrs["has_survived"]


def test_photograph_of_more_pixels_than_allowed_is_not_decoded(
    run_folder: RunFolder, photographs_of_100_megapixels: dict[str, Path]
) -> None:
    outcomes = run_folder(list(photographs_of_100_megapixels.values()), n_threads=1, memory=1024 * MIB)
    assert dict(outcomes["status"].value_counts()) == {"too_large": 3, "ok": 4}
    assert "100,000,000" in outcomes.loc["0-baseline.jpg", "error"]


@needs_proc
def test_photograph_too_large_for_every_worker_is_named_and_no_other_fails(
    run_folder: RunFolder, photographs_of_100_megapixels: dict[str, Path]
) -> None:
    files = [photographs_of_100_megapixels["transparent.png"]]
    # It is tried by itself after the first death, not after the third.
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        outcomes = run_folder(files, n_threads=1, memory=750 * MIB, max_pixels=SIDE * SIDE)
    assert dict(outcomes["status"].value_counts()) == {"crashed": 1, "ok": 4}
    assert "needs too much memory" in outcomes.loc["0-transparent.png", "error"]
    assert not outcomes.attrs["has_survived"]


@needs_proc
def test_memory_does_not_grow_with_the_files_of_a_partition(tmp_path: Path) -> None:
    Image.new("RGB", (4000, 2500)).save(tmp_path / "large.bmp")
    size = (tmp_path / "large.bmp").stat().st_size
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        grown = pool.submit(_measure_reading, tmp_path, "large.bmp", size, 40).result(120)
    # Three 30 MB files are read ahead and three are in the batch; decoding one of them takes 40 MB.
    assert 4 * size < grown < 9 * size


def _measure_reading(folder: Path, name: str, size: int, n_files: int) -> int:
    """Read the same file many times; returns the peak growth of memory in bytes."""
    source = ImageSource(Location(str(folder)), 16, 10_000_000, fetch_attempts=1, concurrent_reads=16)
    partition = Partition(0, 0, (name,) * n_files, ("any",) * n_files, (size,) * n_files, (0,) * n_files)
    # Compile the kernels of resizing, which each worker loads once.
    resize_square(Image.new("RGB", (64, 64)), 8)
    before = _read_peak()
    batches = read_batches(partition, source, input_px=32, watch=Stopwatch(), on_asked=lambda: None)
    statuses = [outcome.status for batch in batches for outcome in batch.outcomes]
    assert statuses == ["ok"] * n_files
    return _read_peak() - before


def _read_peak() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_file_that_is_too_large_for_any_image_is_not_read(run_folder: RunFolder, tmp_path: Path) -> None:
    with open(tmp_path / "film.jpg", "wb") as file:
        # The file is sparse: it takes no space on the disk, but would fill the memory.
        file.truncate(1 << 40)
    outcomes = run_folder([tmp_path / "film.jpg"], n_threads=1, memory=1024 * MIB)
    assert dict(outcomes["status"].value_counts()) == {"too_large": 1, "ok": 4}
    assert outcomes.loc["0-film.jpg", "error"] == (
        "expected a file of at most 467,108,864 bytes (8 per pixel of featurize.max_pixels, plus metadata), found "
        "1,099,511,627,776"
    )

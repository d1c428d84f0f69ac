"""Disks that are full or read-only and buckets that are gone in the middle of a run: a clear error, and the same
command continues.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from commands import CommandHost
from runs import MakeConfig, configure

import fruitdask
from fruitdask.core.config import Config, ModelConfig
from fruitdask.core.progress import RunProgress
from fruitdask.errors import OutageError, PartitionError

#: Free space on the small disk when a run begins: enough for its manifest and some of its partitions, which need three
#: blocks each.
FREE_BYTES = 150_000
_DISK_BYTES = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk in memory, for one test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "fruitdask-test", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def make_config(sample_folder: Path, tiny_model: ModelConfig) -> MakeConfig:
    """Make the configuration of a run with one image per partition."""

    def make(url: str, **options: Any) -> Config:
        return configure(
            sample_folder,
            url,
            tiny_model,
            cluster={"kind": "local", "n_workers": 1, "threads_per_worker": 1, "dashboard_address": None},
            featurize={"images_per_partition": 1},
            output={"url": url, "storage_options": options},
        )

    return make


@pytest.fixture(scope="module")
def undisturbed(make_config: MakeConfig, client: Any, tmp_path_factory: pytest.TempPathFactory) -> fruitdask.RunResult:
    """The same run without a fault."""
    return fruitdask.run(make_config(str(tmp_path_factory.mktemp("calm"))), client=client)


def assert_same(result: fruitdask.RunResult, expected: fruitdask.RunResult) -> None:
    """Compare two runs."""
    pd.testing.assert_frame_equal(result.table, expected.table)
    np.testing.assert_array_equal(result.features.compute(), expected.features.compute())


class When(RunProgress):
    """Calls a function when a stage begins."""

    def __init__(self, stage: str, happen: Callable[[], Any]) -> None:
        super().__init__()
        self._stage, self._happen = stage, happen

    def begin(self, stage: str) -> None:
        """Call the function at the start of its stage."""
        if stage == self._stage:
            self._happen()


@pytest.mark.slow
def test_disk_that_is_full_ends_the_command_with_one_sentence(
    make_config: MakeConfig,
    disk: Path,
    client: Any,
    commands: CommandHost,
    undisturbed: fruitdask.RunResult,
    tmp_path: Path,
) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(_DISK_BYTES - FREE_BYTES))
    config = make_config(str(disk / "out"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = commands.run("run", str(tmp_path / "run.yaml"))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("fruitdask: partition ") and f"cannot write {disk}/out/" in sentence
    assert sentence.endswith("make room there and run again")
    n_done = len(list((disk / "out" / "partitions").glob("*.parquet")))
    ballast.unlink()
    result = fruitdask.run(config, client=client)
    assert result.n_computed == 24 - n_done < 24
    assert_same(result, undisturbed)


@pytest.mark.slow
def test_disk_that_fills_up_at_the_end_loses_no_features(
    make_config: MakeConfig, disk: Path, client: Any, undisturbed: fruitdask.RunResult
) -> None:
    config = make_config(str(disk / "out"))

    def fill() -> None:
        with open(disk / "ballast", "wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(1024))

    with pytest.raises(OutageError, match=rf"^cannot write {disk}/out/.*make room there and run again$"):
        fruitdask.run(config, client=client, progress=When("Writing results", fill))
    (disk / "ballast").unlink()
    result = fruitdask.run(config, client=client)
    assert result.n_computed == 0
    assert_same(result, undisturbed)


@pytest.mark.slow
def test_disk_that_becomes_read_only_ends_the_run_with_one_sentence(
    make_config: MakeConfig, disk: Path, client: Any, undisturbed: fruitdask.RunResult
) -> None:
    config = make_config(str(disk / "out"))

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    sentence = rf"^partition \d+ \(.* failed: cannot write {disk}/out/.*make it writable and run again$"
    with pytest.raises(PartitionError, match=sentence):
        fruitdask.run(config, client=client, progress=When("Featurizing", lambda: remount("ro")))
    remount("rw")
    assert_same(fruitdask.run(config, client=client), undisturbed)


@pytest.mark.slow
def test_bucket_that_is_deleted_ends_the_run_with_one_sentence(
    make_config: MakeConfig,
    s3_bucket: tuple[str, dict[str, Any]],
    s3_client: Any,
    client: Any,
    undisturbed: fruitdask.RunResult,
) -> None:
    bucket, options = s3_bucket
    config = make_config(f"s3://{bucket}/out", **options)
    # More attempts would only cost time.
    output = config.output.model_copy(update={"attempts": 2})
    featurize = config.featurize.model_copy(update={"images_per_partition": 6})
    config = config.model_copy(update={"output": output, "featurize": featurize})

    def delete() -> None:
        for entry in s3_client.list_objects_v2(Bucket=bucket)["Contents"]:
            s3_client.delete_object(Bucket=bucket, Key=entry["Key"])
        s3_client.delete_bucket(Bucket=bucket)

    cause = "it no longer exists, so it or its bucket was deleted; run again to start over"
    sentence = rf"^partition \d+ \(.* failed: cannot write s3://{bucket}/out/features.zarr: {cause}$"
    with pytest.raises(PartitionError, match=sentence):
        fruitdask.run(config, client=client, progress=When("Featurizing", delete))
    s3_client.create_bucket(Bucket=bucket)
    assert_same(fruitdask.run(config, client=client), undisturbed)

"""Verifying and repairing: whatever is damaged is found, and a run makes it again and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fruitdask
from fruitdask import store
from fruitdask.config import Config, ModelConfig
from fruitdask.errors import DamageError, OutputError
from fruitdask.storage import Location
from fruitdask.store import Remedy

BROKEN = "pear_1/r0_0.jpg"


@pytest.fixture(scope="module")
def config(
    tiny_model: ModelConfig, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Config]:
    """Make the configuration of a run of the tiny model on the drawn images, one of them broken, into a folder."""
    source = tmp_path_factory.mktemp("in") / "fruits"
    shutil.copytree(sample_folder, source)
    (source / BROKEN).write_bytes(b"")

    def make(output: Path) -> Config:
        sections: dict[str, dict[str, Any]] = {
            "input": {"url": str(source)},
            "model": tiny_model.model_dump(),
            "cluster": {"kind": "local", "n_workers": 1, "threads_per_worker": 2, "dashboard_address": None},
            "featurize": {"images_per_partition": 5},
            "reduce": {"n_components": 2, "tsne": {"enabled": True, "perplexity": 5}},
            "output": {"url": str(output)},
        }
        return fruitdask.load_config(sections)

    return make


@pytest.fixture(scope="module")
def finished(config: Callable[[Path], Config], client: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run of 24 images in 5 partitions; to be copied, not changed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    fruitdask.run(config(output), client=client)
    return output

"""The package from outside: what an import costs, and that every public name exists."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fruitdask

HEAVY = {
    "tensorflow",
    "keras",
    "matplotlib",
    "distributed",
    "dask",
    "pandas",
    "numpy",
    "zarr",
    "sklearn",
    "dask_ml",
    "bokeh",
}


@pytest.mark.parametrize(
    "statement",
    ["import fruitdask", "import fruitdask.cli; fruitdask.cli.cli.main(['--help'], standalone_mode=False)"],
    ids=["import", "--help"],
)
def test_import_loads_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split("LOADED")[1].split())
    assert "fruitdask" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("name", fruitdask.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(fruitdask, name).__name__ == name
    assert name in dir(fruitdask)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pineapple'"):
        fruitdask.pineapple


@pytest.mark.parametrize("name", ["dask", "dask-cloudprovider", "dask-ml", "pillow", "s3fs", "tensorflow", "zarr"])
def test_what_a_run_needs_comes_with_the_package(name: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    found = {re.split(r"[\[>=]", line)[0]: line for line in setup["options"]["install_requires"].split()}
    assert name in found
    assert name != "dask" or "distributed" in found[name]

"""The package's face: what an import costs, and that every public name is there."""

import subprocess
import sys

import pytest

import fruitdask

HEAVY = {"tensorflow", "keras", "matplotlib", "distributed", "dask", "pandas", "numpy", "zarr", "sklearn", "bokeh"}


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
def test_public_name_is_there(name: str) -> None:
    assert getattr(fruitdask, name).__name__ == name
    assert name in dir(fruitdask)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pineapple'"):
        fruitdask.pineapple

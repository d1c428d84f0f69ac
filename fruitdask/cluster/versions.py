"""Versions of what matters: the same on the client, the scheduler and all workers, or no work begins."""

import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from fruitdask.core.version import __version__
from fruitdask.errors import ClusterStartError

#: Packages of one major and minor version everywhere: they carry tasks and data from one machine to the other, or make the numbers.
_PACKAGES = ("dask", "distributed", "cloudpickle", "msgpack", "numpy", "pandas", "pillow", "zarr")
#: The same for engines, where both sides have them: a run needs one of them alone.
_ENGINES = ("openvino", "tensorflow")


def check_versions(client: Any, *, image: str | None = None) -> None:
    """Check that scheduler and workers run the versions that the client runs.

    fruitdask must be of the very same version; Python, Dask and what carries or computes the numbers, of the same major
    and minor version. Patch releases may differ.
    """
    differences = _find_differences(client.get_versions(packages=[*_PACKAGES, *_ENGINES]))
    # A function travels as bytecode, which another Python must not be made to run.
    differences = differences or _find_fruitdask(client)
    if differences:
        raise ClusterStartError(
            f"the cluster is not of the versions of this machine: {'; '.join(differences)}; {_advise(image)}"
        )


def _find_differences(versions: dict[str, Any]) -> list[str]:
    """Say which versions differ; the nodes look them up without importing anything."""
    here = versions["client"]["packages"]
    places = defaultdict(list)
    nodes = {"the scheduler": versions["scheduler"]} | versions["workers"]
    for place, node in nodes.items():
        for name in ("python", *_PACKAGES, *_ENGINES):
            there = node["packages"].get(name)
            is_optional = name in _ENGINES and None in (there, here[name])
            if _cut(there) != _cut(here[name]) and not is_optional:
                places[name, there].append(place)
    return [
        f"{_show(name, there)} on {_join(where)}, {_show('', here[name])} here"
        for (name, there), where in places.items()
    ]


def _find_fruitdask(client: Any) -> list[str]:
    """Say where fruitdask is another one, or is none."""

    # Defined here so that it travels by value: a function of a module would make the nodes import that module, of fruitdask.
    def import_fruitdask() -> str:
        try:
            import fruitdask
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return fruitdask.__version__

    places = defaultdict(list)
    answers = {"the scheduler": client.run_on_scheduler(import_fruitdask)} | client.run(
        import_fruitdask, on_error="return"
    )
    for place, answer in answers.items():
        # A worker that has gone meanwhile answers with an exception.
        if isinstance(answer, str) and answer != __version__:
            places[answer].append(place)
    return [
        (
            f"fruitdask cannot be imported on {_join(where)} ({answer})"
            if "Error" in answer
            else f"fruitdask {answer} on {_join(where)}, {__version__} here"
        )
        for answer, where in places.items()
    ]


def _cut(version: str | None) -> list[str] | None:
    """Keep the major and the minor version."""
    return version.split(".")[:2] if version else None


def _show(name: str, version: str | None) -> str:
    """Show a version; Python's is followed by more than a person wants to know."""
    return f"{name} {'.'.join(version.split('.')[:3]) if version else 'missing'}".lstrip()


def _join(places: Iterable[str]) -> str:
    """Name some places, and count the others."""
    first, *others = places
    return f"{first} and {len(others)} more" if others else first


def _advise(image: str | None) -> str:
    """Say what to do."""
    if image is None:
        return "install the versions of this machine there"
    return (
        f"build its image again, in a clone of fruitdask, and push it: {sys.executable} configs/docker/build.py {image} "
        "(with --gpu for GPU instances)"
    )

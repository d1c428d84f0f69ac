"""Versions of packages, which must match between the client, the scheduler and all workers."""

import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from fruitdask.core.version import __version__
from fruitdask.errors import ClusterStartError

#: Packages that transfer tasks and data, or compute numbers: they need equal major and minor versions everywhere.
_PACKAGES = ("dask", "distributed", "cloudpickle", "msgpack", "numpy", "pandas", "pillow", "zarr")
#: The same for engines, if both sides have them: a run needs only one.
_ENGINES = ("openvino", "tensorflow")


def check_versions(client: Any, *, image: str | None = None) -> None:
    """Check the versions of scheduler and workers: of fruitdask exactly, of Python and packages major and minor."""
    differences = _find_differences(client.get_versions(packages=[*_PACKAGES, *_ENGINES]))
    # Only then: a function is sent as bytecode, which needs the same version of Python.
    differences = differences or _find_fruitdask(client)
    if not differences:
        return
    remedy = "install the versions of this machine there"
    if image is not None:
        build = f"{sys.executable} configs/docker/build.py {image} (with --gpu for GPU instances)"
        remedy = f"build its image again, in a clone of fruitdask, and push it: {build}"
    raise ClusterStartError(f"the cluster has other versions than this machine: {'; '.join(differences)}; {remedy}")


def _find_differences(versions: dict[str, Any]) -> list[str]:
    """Describe the versions that differ; the nodes look them up without imports."""
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
    """Describe where fruitdask has another version, or cannot be imported."""

    # A nested function is pickled by value: for a function of this module, the nodes would import fruitdask.
    def import_fruitdask() -> str:
        try:
            import fruitdask
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return fruitdask.__version__

    places = defaultdict(list)
    answers = {"the scheduler": client.run_on_scheduler(import_fruitdask)}
    answers |= client.run(import_fruitdask, on_error="return")
    for place, answer in answers.items():
        # The answer of a worker that has ended meanwhile is an exception.
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
    """Show the first three parts of a version; Python's has more."""
    return f"{name} {'.'.join(version.split('.')[:3]) if version else 'missing'}".lstrip()


def _join(places: Iterable[str]) -> str:
    """Name the first place, and count the others."""
    first, *others = places
    return f"{first} and {len(others)} more" if others else first

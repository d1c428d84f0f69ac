"""The Dockerfile of the image that instances run, as far as it can be tested without docker."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "docker"


def read_instructions() -> list[tuple[str, str]]:
    """Read the Dockerfile: instructions and their arguments."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line]  # type: ignore[misc]


def list_arguments(name: str) -> list[str]:
    """List the arguments of all instructions of a name."""
    return [argument for instruction, argument in read_instructions() if instruction == name]


def run_builder(folder: Path, *arguments: str) -> list[str]:
    """Run the builder with a docker that only records its arguments; returns them."""
    docker = folder / "docker"
    docker.write_text(
        f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(folder / 'told')!r}, 'w'))\n"
    )
    docker.chmod(0o755)
    command = [sys.executable, str(FOLDER / "build.py"), *arguments]
    subprocess.run(command, check=True, env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"})
    told: list[str] = json.loads((folder / "told").read_text())
    return told


def parse_build_arguments(told: list[str]) -> dict[str, str]:
    """Parse docker's --build-arg."""
    pairs = [value for flag, value in zip(told, told[1:], strict=False) if flag == "--build-arg"]
    return dict(pair.split("=", 1) for pair in pairs)


def test_image_is_a_slim_python_that_runs_any_command_as_an_ordinary_user() -> None:
    assert list_arguments("FROM") == ["python:${PYTHON}-slim"]
    # EC2Cluster gives the command: python -m distributed.cli.dask_scheduler or dask_spec.
    assert not list_arguments("ENTRYPOINT") + list_arguments("CMD")
    assert all(find_spec(f"distributed.cli.{name}") for name in ("dask_scheduler", "dask_spec"))
    [user] = list_arguments("USER")
    assert f"useradd --create-home --uid 1000 {user}" in list_arguments("RUN")


def test_image_copies_existing_files_that_docker_receives() -> None:
    sources = [source for argument in list_arguments("COPY") for source in argument.split()[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines and sorted(kept) == sorted(sources)


def test_image_downloads_only_packages_and_holds_no_secrets() -> None:
    commands = [part.split()[0] for argument in list_arguments("RUN") for part in argument.split("&&")]
    assert commands == ["printf", "pip", "python", "useradd"]
    assert {name for name, _ in read_instructions()} == {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER"}
    assert set(list_arguments("ARG")) == {"PYTHON", "CONSTRAINTS", "GPU"}
    ignored = [".git/config", ".aws/credentials", "photographs/me.jpg", ".env", "demo/results/results.csv"]
    kept = [line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert not [path for path in ignored for pattern in kept if fnmatch(path, f"{pattern}*")]


@pytest.mark.parametrize("gpu", ["", "1"], ids=["no GPU", "GPU"])
def test_image_installs_fruitdask_under_the_constraints(tmp_path: Path, gpu: str) -> None:
    for name in ("pip", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s|" {name} "$@" >> told\n')
        (tmp_path / name).chmod(0o755)
    constraints = "numpy==2.4.6\nweird==1!2.0+local.$HOME"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CONSTRAINTS": constraints, "GPU": gpu}
    subprocess.run(["/bin/sh", "-c", list_arguments("RUN")[0]], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "constraints.txt").read_text() == constraints + "\n"
    extra = "tensorflow[and-cuda]|" if gpu else ""
    installed = f"pip|install|--no-cache-dir|--constraint|constraints.txt|.[azure,openvino]|{extra}"
    expected = f"{installed}python|-m|fruitdask|--version|"
    assert (tmp_path / "told").read_text() == expected


def test_image_is_not_built_without_constraints(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin"}
    command = ["/bin/sh", "-c", list_arguments("RUN")[0]]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode != 0 and "build this image with configs/docker/build.py" in result.stderr


def test_build_pins_this_environment(tmp_path: Path) -> None:
    told = run_builder(tmp_path, "me/fruitdask:1")
    given = parse_build_arguments(told)
    assert set(given) == set(list_arguments("ARG")) and given["GPU"] == ""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert given["PYTHON"] == "{}.{}".format(*sys.version_info[:2])
    assert f"{given['PYTHON']}.0" in SpecifierSet(settings["options"]["python_requires"])
    pins = dict(line.split("==") for line in given["CONSTRAINTS"].splitlines())
    pins = {re.sub("[-_.]+", "-", name): version for name, version in pins.items()}
    extras = settings["options.extras_require"]
    lines = settings["options"]["install_requires"] + extras["openvino"] + extras["azure"]
    needed = [Requirement(line) for line in lines.split("\n") if line]
    assert [line for line in needed if pins[re.sub("[-_.]+", "-", line.name.lower())] not in line.specifier] == []
    assert "fruitdask" not in pins


@pytest.mark.parametrize(
    ("arguments", "platform", "gpu"),
    [
        (["me/fruitdask:1"], "linux/amd64", ""),
        (["me/fruitdask:1", "--gpu"], "linux/amd64", "1"),
        (["me/fruitdask:1", "--platform", "linux/arm64"], "linux/arm64", ""),
    ],
    ids=["plain", "GPU", "Graviton"],
)
def test_build_passes_arguments_to_docker(tmp_path: Path, arguments: list[str], platform: str, gpu: str) -> None:
    told = run_builder(tmp_path, *arguments)
    expected = f"build --platform {platform} --tag me/fruitdask:1 --file configs/docker/Dockerfile"
    assert told[:7] == shlex.split(expected) and told[-1] == "."
    assert parse_build_arguments(told)["GPU"] == gpu


def test_build_reports_that_docker_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "build.py"), "me/fruitdask:1"]
    result = subprocess.run(command, env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        1,
        "found no docker; install it: https://docs.docker.com/engine/install/\n",
    )


@pytest.mark.slow
def test_files_of_the_image_suffice_to_install_fruitdask(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    for argument in list_arguments("COPY"):
        *sources, target = argument.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    options = [
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--no-compile",
        "--quiet",
        "--disable-pip-version-check",
    ]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", "site", "."]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    code = "import fruitdask, fruitdask.report.page; print(fruitdask.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(tmp_path / "site" / "fruitdask" / "__init__.py"), result.stderr
    assert (tmp_path / "site" / "fruitdask" / "report" / "page.html").is_file()

"""Servers that npm installs, once into the cache of the tests."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest


@contextmanager
def run_node(
    request: pytest.FixtureRequest,
    package: str,
    script: str,
    arguments: Sequence[str],
    *,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Run a script of a package, given as name@version, with its arguments and Node's options; gives the port that it
    says it listens on.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    name = package.partition("@")[0]
    if node is None or npm is None:
        pytest.skip(f"needs Node.js and npm for {name}")
    cache = request.config.cache
    assert cache is not None
    folder = cache.mkdir(name)
    file = folder / "node_modules" / name / script
    if not file.exists():
        install = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), package]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm cannot install {package}: {done.stderr.strip()[-200:]}")
    command, env = [node, *options, str(file), *arguments], {**os.environ, **(environment or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            found = (re.search(r"listen\w+ on (?:https?://)?[\d.]+:(\d+)", line) for line in process.stdout)
            yield next(int(match[1]) for match in found if match)
        finally:
            process.terminate()
            # Azurite fails if nobody reads its farewell.
            process.communicate()

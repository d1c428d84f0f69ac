"""What users install: a source archive, and the wheel built from it, which runs without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("fruitdask", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel built from it."""
    folder = tmp_path_factory.mktemp("package")
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    subprocess.run([sys.executable, "-m", "build", "-o", folder / "dist", folder], check=True, capture_output=True)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel, which borrows the dependencies of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder)
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder)})
    # Only .pth files of the environment's own folder count, so the checkout that is installed here is not borrowed.
    Path(purelib, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    python = folder / "bin" / "python"
    # Use the pip of this environment, because installing another takes longer than everything else.
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True)
    return python


@pytest.mark.slow
def test_source_archive_holds_the_package_and_its_licence(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    files = [path for path in (ROOT / "fruitdask").rglob("*.*") if "__pycache__" not in path.parts]
    package = {path.relative_to(ROOT).as_posix() for path in files}
    assert names >= package | {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="environments there have other folders")
def test_wheel_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> str:
        command = [installed, *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    place = Path(call("-c", "import fruitdask; print(fruitdask.__file__)").strip())
    assert installed.parents[1] in place.parents
    call("-m", "fruitdask", "sample", "photographs", "--per-class", "2", "--size", "64")
    call("-m", "fruitdask", "explore", "photographs", "results", "--set", "cluster.n_workers=1")
    assert (tmp_path / "results" / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")

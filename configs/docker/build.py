"""Build the image that the instances of a cluster run, with the versions of the Python environment that runs this.

    python configs/docker/build.py me/fruitdask:1           # for instances without GPUs
    python configs/docker/build.py me/fruitdask:1-gpu --gpu # with what TensorFlow needs for NVIDIA's GPUs

Then push it to where instances can pull it from: docker push me/fruitdask:1
"""

import argparse
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def list_versions() -> list[str]:
    """List the packages that are installed here as constraints of pip; fruitdask itself comes from the checkout."""
    versions: dict[str, str] = {}
    for package in distributions():
        # The first one found is the one that Python imports.
        versions.setdefault(package.name.lower(), package.version)
    return sorted(f"{name}=={version}" for name, version in versions.items() if name != "fruitdask")


def build(name: str, *, platform: str, gpu: bool) -> int:
    """Run docker, and return its exit code."""
    arguments = {
        "PYTHON": "{}.{}".format(*sys.version_info[:2]),
        "CONSTRAINTS": "\n".join(list_versions()),
        "GPU": "1" if gpu else "",
    }
    command = ["docker", "build", "--platform", platform, "--tag", name, "--file", "configs/docker/Dockerfile"]
    for key, value in arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    try:
        return subprocess.run([*command, "."], cwd=ROOT).returncode
    except FileNotFoundError:
        print("found no docker; install it: https://docs.docker.com/engine/install/", file=sys.stderr)
        return 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the image, as in cluster.docker_image")
    parser.add_argument("--gpu", action="store_true", help="for GPU instances")
    parser.add_argument("--platform", default="linux/amd64", help="linux/arm64 for Graviton instances")
    options = parser.parse_args()
    sys.exit(build(options.name, platform=options.platform, gpu=options.gpu))

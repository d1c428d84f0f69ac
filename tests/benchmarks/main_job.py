"""The whole command against the plain Keras loop, and its memory when the images are repeated.

    python tests/benchmarks/main_job.py PHOTOGRAPHS WEIGHTS [--repeat 10]

PHOTOGRAPHS is a folder of classes (the 846 test photographs of Fruits-360's original size), WEIGHTS the file of
MobileNetV2's weights without its top. The loop computes features and two components, so exploring, quality, figures and page
are left out, but for one line. Each line gives seconds, their ratio to the plain loop of the same run, and the
largest resident memory of the client and of a worker.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measuring import Measurement, measure, print_header, print_line, repeat_images

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "local.yaml"


#: What the plain loop does not do.
EXTRAS = ("explore.enabled", "quality.enabled", "plots.enabled", "report.enabled")


def run_fruitdask(
    photographs: Path, weights: Path, folder: Path, name: str, *, with_extras: bool = False
) -> Measurement:
    """Run the command on a folder; networks are kept in, and taken from, a cache of the benchmark's own."""
    settings = [
        f"input.url={photographs}",
        f"model.weights={weights}",
        f"output.url={folder / name}",
        "reduce.n_components=2",
        "reduce.tsne.enabled=false",
        *(f"{extra}={str(with_extras).lower()}" for extra in EXTRAS),
    ]
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    command = [sys.executable, "-m", "fruitdask", "run", str(CONFIG), *overrides]
    return measure(command, XDG_CACHE_HOME=str(folder / "cache"))


def main() -> None:
    """Run everything once and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=lambda path: Path(path).resolve())
    parser.add_argument("weights", type=lambda path: Path(path).resolve())
    parser.add_argument(
        "--repeat", type=int, default=10, help="Names for each image in the last line; 0 leaves it out."
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop = measure(
            [sys.executable, str(HERE / "peers" / "keras_loop.py"), str(arguments.photographs), str(arguments.weights)]
        )
        print_header()
        print_line("plain Keras loop", loop, loop)
        for title in ("fruitdask, first run", "fruitdask, network kept from before"):
            print_line(title, run_fruitdask(arguments.photographs, arguments.weights, folder, title.split()[-1]), loop)
        again = run_fruitdask(arguments.photographs, arguments.weights, folder, "before")
        print_line("the same command again", again, loop)
        extras = run_fruitdask(arguments.photographs, arguments.weights, folder, "extras", with_extras=True)
        print_line("with exploration, quality, figures, page", extras, loop)
        if arguments.repeat:
            repeated = repeat_images(arguments.photographs, folder / "repeated", arguments.repeat)
            print_line(
                f"each image {arguments.repeat} times", run_fruitdask(repeated, arguments.weights, folder, "more"), loop
            )


if __name__ == "__main__":
    main()

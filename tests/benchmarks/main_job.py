"""The whole command compared with the plain Keras loop, and its memory when the images are repeated.

    python tests/benchmarks/main_job.py PHOTOGRAPHS WEIGHTS [--repeat 10]

PHOTOGRAPHS is a folder of classes (the 846 test photographs of Fruits-360's original size), WEIGHTS the file of
MobileNetV2's weights without its top. The loop computes features and two components, so all lines but one leave out
exploring, quality, figures and page. Each line gives seconds, their ratio to the plain loop of the same run, and the
largest resident memory of the client and of a worker.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measuring import measure, measure_run, print_header, print_line, repeat_images

HERE = Path(__file__).parent


def main() -> None:
    """Run everything once and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=lambda path: Path(path).resolve())
    parser.add_argument("weights", type=lambda path: Path(path).resolve())
    parser.add_argument("--repeat", type=int, default=10, help="Names per image in the last line; 0 leaves it out.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loop = measure(
            [sys.executable, str(HERE / "peers" / "keras_loop.py"), str(arguments.photographs), str(arguments.weights)]
        )
        print_header()
        print_line("plain Keras loop", loop, loop)
        for title in ("fruitdask, first run", "fruitdask, network kept from before"):
            print_line(title, measure_run(arguments.photographs, arguments.weights, folder / title.split()[-1]), loop)
        again = measure_run(arguments.photographs, arguments.weights, folder / "before")
        print_line("the same command again", again, loop)
        extras = measure_run(arguments.photographs, arguments.weights, folder / "extras", with_extras=True)
        print_line("with exploration, quality, figures, page", extras, loop)
        if arguments.repeat:
            repeated = repeat_images(arguments.photographs, folder / "repeated", arguments.repeat)
            more = measure_run(repeated, arguments.weights, folder / "more")
            print_line(f"each image {arguments.repeat} times", more, loop)


if __name__ == "__main__":
    main()

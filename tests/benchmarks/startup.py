"""What it costs to begin: importing the package and asking for help.

    python tests/benchmarks/startup.py

Each line gives the median seconds of eleven starts of Python, and of a Python that does nothing.
"""

import statistics
import sys

from measuring import measure

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import fruitdask": ["-c", "import fruitdask"],
    "fruitdask --help": ["-m", "fruitdask", "--help"],
    "fruitdask validate configs/demo.yaml": ["-m", "fruitdask", "validate", "configs/demo.yaml"],
}


def main() -> None:
    """Measure each command and print a table."""
    for title, arguments in COMMANDS.items():
        seconds = [measure([sys.executable, *arguments]).seconds for _ in range(11)]
        print(f"{title:40}{statistics.median(seconds):7.2f} s")


if __name__ == "__main__":
    main()

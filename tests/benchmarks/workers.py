"""How images per second grow with the number of workers, and how workers spend their time.

    python tests/benchmarks/workers.py WEIGHTS PHOTOGRAPHS [--repeat 6] [--workers 1 2 ...] [--engine openvino]
    [--decode exact]

PHOTOGRAPHS is a folder of classes, WEIGHTS the file of MobileNetV2's weights without its top. Each line is a run with a
number of one-thread workers; shares are of the workers' time while featurizing, and the rest is idle time.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from measuring import measure_run, print_table, repeat_images

STAGES = ("predict", "decode", "fetch", "write", "load")


def describe_run(manifest: dict, n_workers: int, baseline: float | None) -> tuple[float, list[str]]:
    """Return images per second, and the row of the table."""
    seconds = manifest["seconds"]
    rate = manifest["n_images"] / seconds["featurize"]
    # Partitions overlap a little, so stages may add up to more than the elapsed time.
    whole = max(seconds["featurize"] * n_workers, sum(seconds["worker"].values()))
    shares = [seconds["worker"].get(stage, 0.0) / whole for stage in STAGES]
    shares.append(1 - sum(shares))
    return rate, [
        str(n_workers),
        f"{rate:.1f}",
        f"{rate / (baseline or rate):.2f}",
        *(f"{share:.1%}" for share in shares),
    ]


def main() -> None:
    """Run with each number of workers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=lambda path: Path(path).resolve())
    parser.add_argument("photographs", type=lambda path: Path(path).resolve())
    parser.add_argument("--repeat", type=int, default=6, help="Names per image.")
    counts = sorted({1, 2, *(2**power for power in range(2, 8) if 2**power <= (os.cpu_count() or 1))})
    parser.add_argument("--workers", type=int, nargs="+", default=counts)
    parser.add_argument("--engine", default="openvino", choices=("openvino", "tensorflow"))
    parser.add_argument("--decode", default="exact", choices=("exact", "fast"))
    parser.add_argument("--markdown", type=Path, help="Append the table to this file too.")
    arguments = parser.parse_args()
    settings = [f"model.engine={arguments.engine}", f"featurize.decode={arguments.decode}"]
    rows, baseline = [], None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repeated = repeat_images(arguments.photographs, folder / "photographs", arguments.repeat)
        measure_run(repeated, arguments.weights, folder / "first", *settings, "input.limit=64")
        for n_workers in arguments.workers:
            output = folder / str(n_workers)
            cluster = [f"cluster.n_workers={n_workers}", "cluster.threads_per_worker=1"]
            measure_run(repeated, arguments.weights, output, *settings, *cluster)
            manifest = json.loads((output / "manifest.json").read_text())
            rate, row = describe_run(manifest, n_workers, baseline)
            baseline = baseline or rate
            rows.append(row)
    print_table(["workers", "images/s", "ratio", *STAGES, "nothing"], rows, arguments.markdown)


if __name__ == "__main__":
    main()

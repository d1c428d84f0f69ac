"""How well reading from a distant S3 overlaps with computing: images per second, and the fraction of workers' time
spent waiting for files.

    python tests/benchmarks/latency.py [--images 480] [--milliseconds 50]

Draws images into moto, an S3 server on this machine, behind a proxy that delays each response by that time, and runs
MobileNetV2 with random weights over them; results go to a folder. The first line, without latency, is the baseline of
the ratios. With one file in flight nothing overlaps, which shows what the latency would cost.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import boto3
from measuring import measure, print_table
from moto.server import ThreadedMotoServer

from fruitdask.core.sample import draw_sample

sys.path.insert(0, str(Path(__file__).parents[1]))
from faulty_s3 import FaultyS3, open_faulty_s3  # noqa: E402

_KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}
_N_SPECIES = 6


def fill(server: str, folder: Path, n_images: int) -> None:
    """Draw images and put them into a bucket."""
    draw_sample(folder, per_class=-(-n_images // _N_SPECIES), size_px=160)
    s3 = boto3.client("s3", endpoint_url=server)
    s3.create_bucket(Bucket="drawn-fruits")
    for path in folder.rglob("*.jpg"):
        s3.upload_file(str(path), "drawn-fruits", f"in/{path.relative_to(folder).as_posix()}")


def run(proxy: FaultyS3, output: Path, n_images: int, concurrent_reads: int) -> tuple[float, float]:
    """Run the command; returns images per second, and the fraction of workers' time spent waiting for files."""
    config = {
        "input": {"url": "s3://drawn-fruits/in", "storage_options": {"endpoint_url": proxy.url}, "limit": n_images},
        "model": {"weights": "random"},
        "featurize": {"concurrent_reads": concurrent_reads},
        **{section: {"enabled": False} for section in ("explore", "quality", "plots", "report")},
        "output": {"url": str(output)},
    }
    file = output.with_suffix(".yaml")
    file.write_text(json.dumps(config))
    measure([sys.executable, "-m", "fruitdask", "run", str(file)], XDG_CACHE_HOME=str(output.parent / "cache"))
    seconds = json.loads((output / "manifest.json").read_text())["seconds"]
    worker = {stage: value for stage, value in seconds["worker"].items() if stage != "load"}
    return n_images / seconds["featurize"], worker["fetch"] / sum(worker.values())


def main() -> None:
    """Measure with and without latency and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--milliseconds", type=float, default=50)
    parser.add_argument("--markdown", type=Path, help="Append the table to this file too.")
    arguments = parser.parse_args()
    os.environ.update(_KEYS)
    logging.disable(logging.INFO)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name, open_faulty_s3(url, fraction=1, kinds=["delay"]) as proxy:
        folder = Path(name)
        fill(url, folder / "images", arguments.images)
        baseline = 0.0
        # The first one builds the network, too, and is not counted.
        for number, (milliseconds, reads) in enumerate(
            [(0, 16), (0, 16), (arguments.milliseconds, 16), (arguments.milliseconds, 4), (arguments.milliseconds, 1)]
        ):
            proxy.delay_seconds = milliseconds / 1000
            rate, share = run(proxy, folder / str(number), arguments.images, reads)
            if number:
                baseline = baseline or rate
                columns = [f"{milliseconds:g} ms, {reads} files in flight", f"{rate:.1f}"]
                rows.append([*columns, f"{rate / baseline:.2f}", f"{share:.0%}"])
    server.stop()
    print_table(["latency", "images/s", "ratio", "waiting for files"], rows, arguments.markdown)


if __name__ == "__main__":
    main()

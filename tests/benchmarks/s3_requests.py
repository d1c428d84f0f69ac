"""Requests to S3 per partition, by kind, of a whole run and of its rerun, and what they cost for ten million images.

    python tests/benchmarks/s3_requests.py [--markdown FILE]

Makes two runs, of 10 and of 30 partitions: a partition costs a twentieth of the second run's additional requests. A
proxy in front of moto counts them. In addition to the table, each image is read once.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import boto3
import numpy as np
from measuring import print_table
from moto.server import ThreadedMotoServer
from PIL import Image

import fruitdask
from fruitdask.cluster.cloud.prices import compute_request_cost

sys.path.insert(0, str(Path(__file__).parents[1]))
from faulty_s3 import open_faulty_s3  # noqa: E402

IMAGES_PER_PARTITION, FEW, MANY = 4, 10, 30
#: Images per partition of a run of ten million, and their number.
LARGE, N_IMAGES = 512, 10_000_000


def save_model(path: Path) -> None:
    """Save a network that computes next to nothing."""
    import keras

    pixels = keras.Input((32, 32, 3))
    keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(pixels)).save(path)


def count(server: str, model: Path, n_partitions: int, *, is_rerun: bool) -> Counter[str]:
    """Count the requests to the bucket of the results of one run."""
    counted: Counter[str] = Counter()

    def note(method: str, path: str) -> bool:
        if path.startswith("/results"):
            counted["LIST" if "list-type=2" in path else method] += 1
        return False

    n_images = n_partitions * IMAGES_PER_PARTITION
    with open_faulty_s3(server, fraction=0, concerns=note) as proxy:
        options = {"endpoint_url": proxy.url}
        config = fruitdask.load_config(
            {
                "input": {"url": "s3://photographs", "storage_options": options, "limit": n_images},
                "model": {"weights": str(model), "preprocessing": "none"},
                "cluster": {"kind": "local", "n_workers": 1, "dashboard_address": None},
                "featurize": {"images_per_partition": IMAGES_PER_PARTITION},
                "output": {"url": f"s3://results/{n_partitions}", "storage_options": options},
            }
        )
        result = fruitdask.run(config)
        assert (result.n_computed == 0) == is_rerun
    return counted


def main() -> None:
    """Run, count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="Append the table to this file too.")
    arguments = parser.parse_args()
    os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for bucket in ("photographs", "results"):
            client.create_bucket(Bucket=bucket)
        random = np.random.default_rng(0)
        for number in range(MANY * IMAGES_PER_PARTITION):
            path = Path(folder, f"{number}.png")
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
            client.upload_file(str(path), "photographs", f"class {number % 3}/{number:04}.png")
        save_model(model := Path(folder, "model.keras"))
        for title, is_rerun in (("run", False), ("rerun", True)):
            few, many = (count(f"http://{host}:{port}", model, n, is_rerun=is_rerun) for n in (FEW, MANY))
            # The lock sends requests by time, not by partition, so a small difference may be negative.
            kinds = ("PUT", "GET", "HEAD", "LIST", "DELETE", "POST")
            each = {kind: max(0.0, (many[kind] - few[kind]) / (MANY - FEW)) for kind in kinds}
            n_partitions = N_IMAGES / LARGE
            # Deletions are free of charge.
            writes, reads = each["PUT"] + each["LIST"] + each["POST"], each["GET"] + each["HEAD"]
            dollars = compute_request_cost(n_reads=int(reads * n_partitions), n_writes=int(writes * n_partitions))
            rows.append([title, *(f"{value:.2f}" for value in each.values()), f"{dollars:.2f}"])
    server.stop()
    header = ["", *kinds, f"dollars for {N_IMAGES:,} images in partitions of {LARGE}"]
    print_table(header, rows, arguments.markdown)


if __name__ == "__main__":
    main()

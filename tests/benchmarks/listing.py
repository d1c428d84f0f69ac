"""What it costs the client to list an S3 bucket of many images: seconds and memory, compared with fs.find.

    python tests/benchmarks/listing.py [IMAGES [SECONDS]]

A server in its own process makes up the pages, because a million objects in moto would take hours and gigabytes. It
sends each page SECONDS after the request (0), as S3 does after 0.1 to 0.3.
Listing includes the hash of the catalog, by which a run recognizes its images. fs.find makes the same table of what
s3fs returns; beyond two million images it is left out. The same images come from an inventory too, whose rows are in no
order, in CSV and in Parquet; pandas reads the CSV for comparison.
"""

import hashlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pandas as pd
from measuring import measure, print_header, print_line

MAX_NAIVE_IMAGES = 2_000_000
IMAGES_PER_CLASS = 5_000
PAGE = 1_000

NOTHING = "import fruitdask.store.catalog, s3fs"
OURS = """
from fruitdask.store.catalog import hash_catalog, list_images
from fruitdask.core.config import InputConfig
options = dict(endpoint_url=URL, anon=True)
catalog = list_images(InputConfig(url="s3://bucket/photographs", inventory=TABLE, storage_options=options))
hash_catalog(catalog)
print(len(catalog))
"""
NAIVE = """
import pandas, s3fs
found = s3fs.S3FileSystem(endpoint_url=URL, anon=True).find("bucket/photographs", detail=True)
rows = [(path[19:], path.split("/")[-2], entry["size"], entry["ETag"].strip('"')) for path, entry in found.items()]
print(len(pandas.DataFrame(rows, columns=["path", "label", "bytes", "version"])))
"""
PANDAS = "import pandas; print(len(pandas.read_csv(TABLE)))"


class Listing(BaseHTTPRequestHandler):
    """Answers ListObjectsV2 with pages that are made up."""

    protocol_version = "HTTP/1.1"
    n_images, seconds = 0, 0.0

    def do_GET(self) -> None:
        """Answer with a made-up page; its token is the number of its first object or folder."""
        query = {name: value for name, (value,) in parse_qs(urlsplit(self.path).query).items()}
        describe, first, end = describe_object, 0, self.n_images
        if "delimiter" in query:
            describe, end = describe_folder, -(-self.n_images // IMAGES_PER_CLASS)
        elif kind := query["prefix"].removeprefix("photographs/"):
            first = int(kind[-5:-1]) * IMAGES_PER_CLASS
            end = min(first + IMAGES_PER_CLASS, end)
        start = int(query.get("continuation-token", first))
        stop = min(start + PAGE, end)
        token = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < end else ""
        body = (
            f"<ListBucketResult><IsTruncated>{str(bool(token)).lower()}</IsTruncated>{token}"
            f"{''.join(map(describe, range(start, stop)))}</ListBucketResult>"
        ).encode()
        # Simulates a distant server.
        time.sleep(self.seconds)
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def describe_object(number: int) -> str:
    """Describe an object as S3 does; its path below the folder is 42 characters long."""
    kind, image = divmod(number, IMAGES_PER_CLASS)
    return (
        f"<Contents><Key>photographs/apple_golden_{kind:04}/IMG_20240101_{image:07}.jpg</Key>"
        "<LastModified>2024-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{hashlib.md5(b'%d' % number).hexdigest()}&quot;</ETag>"
        f"<Size>{100_000 + number}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def describe_folder(number: int) -> str:
    """Describe a folder as S3 does."""
    return f"<CommonPrefixes><Prefix>photographs/apple_golden_{number:04}/</Prefix></CommonPrefixes>"


def list_rows(n_images: int) -> Iterator[tuple[str, int, str]]:
    """Describe all objects as an inventory does, those of different folders after each other."""
    n_folders = -(-n_images // IMAGES_PER_CLASS)
    for number in (kind * IMAGES_PER_CLASS + image for image in range(IMAGES_PER_CLASS) for kind in range(n_folders)):
        if number < n_images:
            kind, image = divmod(number, IMAGES_PER_CLASS)
            name = f"apple_golden_{kind:04}/IMG_20240101_{image:07}.jpg"
            yield name, 100_000 + number, hashlib.md5(b"%d" % number).hexdigest()


def serve(n_images: int, seconds: float) -> None:
    """Print the address, then serve until the process is killed."""
    Listing.n_images, Listing.seconds = n_images, seconds
    with ThreadingHTTPServer(("127.0.0.1", 0), Listing) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


def main() -> None:
    """List as fs.find does, then as fruitdask does, and print what each took."""
    n_images = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    command = [sys.executable, __file__, "serve", str(n_images), str(seconds)]
    with (
        tempfile.TemporaryDirectory(prefix="listing-") as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        table = pd.DataFrame(list_rows(n_images), columns=["path", "bytes", "ETag"])
        table.to_csv(csv := f"{folder}/inventory.csv.gz", index=False)
        table.to_parquet(parquet := f"{folder}/inventory.parquet")
        del table
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            programs: dict[str, tuple[str, str | None]] = {
                "imports alone": (NOTHING, None),
                "fs.find": (NAIVE, None),
                "fruitdask": (OURS, None),
                "fruitdask, CSV": (OURS, csv),
                "fruitdask, Parquet": (OURS, parquet),
                "pandas, CSV": (PANDAS, csv),
            }
            if n_images > MAX_NAIVE_IMAGES:
                del programs["fs.find"]
            print_header()
            measured = {}
            for title, (program, file) in programs.items():
                measured[title] = measure([sys.executable, "-c", f"URL, TABLE = {url!r}, {file!r}\n{program}"])
                baseline = measured.get("fs.find", measured[title])
                print_line(f"{title}, {measured[title].output.strip() or 0} images", measured[title], baseline)
        finally:
            server.terminate()
    used = measured["fruitdask"].client_bytes - measured["imports alone"].client_bytes
    print(f"fruitdask: {used / n_images:.0f} bytes per image at most, in addition to the imports")
    if "fs.find" in measured:
        naive = measured["fs.find"].client_bytes - measured["imports alone"].client_bytes
        print(f"fs.find: {naive / n_images:.0f} bytes; ratio {used / naive:.3f}")


if __name__ == "__main__":
    serve(int(sys.argv[2]), float(sys.argv[3])) if sys.argv[1:2] == ["serve"] else main()

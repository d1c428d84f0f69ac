"""Positions, serial numbers, names and secrets, planted in every place that can hold them, and searched for in all that
a run leaves behind.
"""

import base64
import binascii
import contextlib
import io
import logging
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dask
import fsspec
import numpy as np
import pandas as pd
import pytest
import yaml
import zarr
from click.testing import CliRunner, Result
from commands import CommandHost
from PIL import Image, PngImagePlugin
from PIL.TiffImagePlugin import IFDRational
from runs import OFF
from s3fs import S3FileSystem

import fruitdask
from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig

SERIAL, OWNER, ARTIST, COMMENT = "SN-PLANTED-4711", "Ada Planted-Owner", "Ben Planted-Artist", "planted comment"
LATITUDE, LONGITUDE = (4885837, 100003), (229448, 100019)
#: What the files say, as text and as numbers of TIFF in both byte orders.
PLANTED = [
    text.encode() for text in ("SN-PLANTED", "Planted-Owner", "Planted-Artist", "planted comment", "48,51.50222N")
]
PLANTED += [struct.pack(f"{order}2I", *value) for order in "<>" for value in (LATITUDE, LONGITUDE)]
#: What the user types or has in the environment, each in its own place.
SECRETS = {
    place: f"hunter2-{place}-{number}f00"
    for number, place in enumerate(
        ["options", "token", "password", "signature", "environment", "session", "dask", "variable", "argument"]
    )
}

POSITION = {1: "N", 2: (IFDRational(*LATITUDE), 51, 30), 3: "E", 4: (IFDRational(*LONGITUDE), 17, 40)}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:aux="http://ns.adobe.com/exif/1.0/aux/" '
    f'exif:GPSLatitude="48,51.50222N" exif:GPSLongitude="2,17.66N" aux:SerialNumber="{SERIAL}" '
    f'aux:OwnerName="{OWNER}"/>'
    "</rdf:RDF></x:xmpmeta>"
)


def build_exif() -> bytes:
    """Build EXIF with everything that is searched for, in a maker note too."""
    exif = Image.Exif()
    exif[0x013B], exif[0x8298] = ARTIST, f"(c) {OWNER}"
    exif[0x8769] = {
        0xA430: OWNER,
        0xA431: SERIAL,
        0xA435: SERIAL,
        0x927C: b"Nikon\0" + SERIAL.encode(),
        0x9286: COMMENT.encode(),
    }
    exif[0x8825] = POSITION
    return exif.tobytes()


def add_iptc(jpeg: bytes) -> bytes:
    """Put IPTC with a name behind a JPEG's first marker."""
    dataset = struct.pack(">BBBH", 0x1C, 2, 80, len(ARTIST)) + ARTIST.encode()
    resource = (
        b"8BIM"
        + struct.pack(">H", 0x0404)
        + b"\0\0"
        + struct.pack(">I", len(dataset))
        + dataset
        + b"\0" * (len(dataset) % 2)
    )
    payload = b"Photoshop 3.0\0" + resource
    return jpeg[:2] + b"\xff\xed" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def plant(folder: Path) -> int:
    """Write images with planted metadata of every kind into two classes, and files that are broken; returns the number
    of positions.
    """
    exif, xmp = build_exif(), XMP.encode()
    generator = np.random.default_rng(0)
    for label in ("apple", "pear"):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            image = Image.fromarray(generator.integers(0, 255, (48, 48, 3), dtype=np.uint8)).resize((96, 96))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", exif=exif, xmp=xmp, comment=COMMENT)
            (folder / label / f"{number}.jpg").write_bytes(add_iptc(buffer.getvalue()))
            texts = PngImagePlugin.PngInfo()
            texts.add_text("Author", ARTIST)
            texts.add_text("Comment", COMMENT, zip=True)
            texts.add_itxt("XML:com.adobe.xmp", XMP)
            image.save(folder / label / f"{number}.png", pnginfo=texts, exif=exif)
            image.save(folder / label / f"{number}.webp", exif=exif, xmp=xmp)
            image.save(folder / label / f"{number}.tif", exif=exif)
    jpeg = (folder / "apple" / "0.jpg").read_bytes()
    # A decoder that complains must not quote what it was given.
    (folder / "apple" / "cut.jpg").write_bytes(jpeg[: len(exif) + 900])
    (folder / "apple" / "text.jpg").write_bytes(xmp)
    return 25


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder to clients with the password, and prints nothing."""

    def do_GET(self) -> None:
        """Serve a file."""
        if self.is_let_in():
            super().do_GET()

    def do_HEAD(self) -> None:
        """Describe a file."""
        if self.is_let_in():
            super().do_HEAD()

    def is_let_in(self) -> bool:
        """Check the password, and fail where that is asked for."""
        expected = base64.b64encode(f"planted:{SECRETS['password']}".encode()).decode()
        if self.headers["Authorization"] == f"Basic {expected}" and "broken" not in self.path:
            return True
        if self.path.endswith(".jpg"):
            # Like stores that sign their own URLs.
            self.send_response(302)
            self.send_header("Location", f"/broken?signature={SECRETS['signature']}")
            self.end_headers()
        else:
            self.send_error(500)
        return False

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def http_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder, and its URL with a password."""
    folder = tmp_path_factory.mktemp("http")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://planted:{SECRETS['password']}@127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def planted(tmp_path: Path, http_folder: tuple[Path, str], tiny_model: ModelConfig) -> tuple[int, dict[str, Any]]:
    """Number of positions in the planted images, and the sections of a run with secrets wherever it accepts them."""
    folder, url = http_folder
    n_positions = plant(tmp_path / "in")
    originals = b"".join(path.read_bytes() for path in (tmp_path / "in").rglob("*.*"))
    assert [word for word in PLANTED if word not in originals] == []
    paths = sorted(path.relative_to(tmp_path / "in") for path in (tmp_path / "in").rglob("*.*"))
    lines = ["path,label", *(f"{path.as_posix()},{path.parent.name}" for path in paths)]
    (folder / "list.csv").write_text("\n".join(lines))
    (folder / "network.keras").write_bytes(Path(tiny_model.weights).read_bytes())
    return n_positions, {
        "input": {"url": str(tmp_path / "in"), "manifest": f"{url}/list.csv?signature={SECRETS['signature']}"},
        "model": {"weights": f"{url}/network.keras", "preprocessing": "none"},
        "featurize": {"images_per_partition": 13, "max_failed_fraction": 0.5},
        "explore": {"input_px": 32},
        "reduce": {"tsne": {"enabled": True, "perplexity": 5}},
        "plots": {"dpi": 50},
    }


def read_images(html: str) -> Iterator[Image.Image]:
    """Open the images that are embedded in a page, wherever they are."""
    for text in re.findall(r"[A-Za-z0-9+/]{64,}={0,2}", html):
        with contextlib.suppress(binascii.Error, OSError):
            yield Image.open(io.BytesIO(base64.b64decode(text)))


def check_image(image: Image.Image) -> None:
    """Check that an image contains nothing but its pixels and the name of the program that drew it."""
    assert not image.getexif() and not {"exif", "xmp", "photoshop", "comment", "XML:com.adobe.xmp"} & set(image.info)
    assert set(getattr(image, "text", {})) <= {"Software"}


def search(fs: Any, root: str) -> tuple[dict[str, list[bytes]], int]:
    """Search every file, decoded too; returns planted values by file, and the number of embedded images."""
    wanted = PLANTED + [secret.encode() for secret in SECRETS.values()]
    contents: dict[str, bytes] = {path: fs.cat_file(path) for path in fs.find(root)}
    n_images = 0
    for path, content in list(contents.items()):
        if path.endswith(".parquet"):
            contents[f"{path}, decoded"] = pd.read_parquet(io.BytesIO(content)).to_csv().encode()
        elif path.endswith(".png"):
            check_image(Image.open(io.BytesIO(content)))
        elif path.endswith(".html"):
            for image in read_images(content.decode()):
                check_image(image)
                n_images += 1
    for group in sorted({path[: path.index(".zarr") + 5] for path in contents if ".zarr/" in path}):
        opened = zarr.open(zarr.storage.FsspecStore.from_mapper(fs.get_mapper(group), read_only=True), mode="r")
        arrays = opened.arrays() if isinstance(opened, zarr.Group) else [("", opened)]
        contents |= {f"{group}/{name}, decoded": np.asarray(array[...]).tobytes() for name, array in arrays}
    found = {path: [each for each in wanted if each in content] for path, content in contents.items()}
    return {path: words for path, words in found.items() if words}, n_images


@pytest.mark.slow
@pytest.mark.usefixtures("s3_server")
def test_nothing_planted_is_in_the_results_on_s3_or_in_a_log(
    planted: tuple[int, dict[str, Any]],
    s3_bucket: tuple[str, dict[str, Any]],
    client: Any,
    user_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    n_positions, sections = planted
    bucket, options = s3_bucket
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["environment"])
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRETS["session"])
    secret_options = options | {"key": "AKIAPLANTED", "secret": SECRETS["options"], "token": SECRETS["token"]}
    cluster = {
        "kind": "ec2",
        "docker_image": "never-started",
        "env_vars": {"PASSWORD": SECRETS["variable"]},
        "docker_args": f"--env TOKEN={SECRETS['argument']}",
    }
    config = fruitdask.load_config(
        sections | {"cluster": cluster, "output": {"url": f"s3://{bucket}/out", "storage_options": secret_options}}
    )
    with (
        caplog.at_level(logging.DEBUG),
        # At that level it quotes the requests that it signs, with the session's token.
        caplog.at_level(logging.INFO, logger="botocore"),
        dask.config.set({"planted.token": SECRETS["dask"]}),
    ):
        # Its figures and page are drawn again by the run.
        undrawn = {name: getattr(config, name).model_copy(update=OFF) for name in ("plots", "report")}
        explored = fruitdask.explore(config.model_copy(update=undrawn), client=client)
        result = fruitdask.run(config, client=client)
    assert explored.summary["metadata"] == {
        "exif": n_positions,
        "gps": n_positions,
        "serial": n_positions,
        "name": n_positions,
    }
    assert result.manifest["counts"]["by_status"] == {"ok": 24, "unreadable": 2}
    places = {"input": "local", "manifest": "unknown", "weights": "unknown", "output": "us-east-1", "cluster": "local"}
    assert result.manifest["regions"] == places
    record = result.manifest["processing"]
    assert (record["in_transit"], record["at_rest"], record["purpose"]) == ("one machine", None, None)
    # Nothing is computed again, but the record follows the present configuration.
    purpose = config.privacy.model_copy(update={"purpose": "sorting apples"})
    result = fruitdask.run(config.model_copy(update={"privacy": purpose}), client=client)
    assert result.n_computed == 0 and result.manifest["processing"] == record | {"purpose": "sorting apples"}
    assert "sorting apples" in result.report.read()
    fs = fsspec.filesystem("s3", **options)
    assert {"features.zarr", "pca.zarr", "explore.zarr", "report.html"} <= {
        Path(path).name for path in fs.ls(f"{bucket}/out")
    }
    found, n_images = search(fs, f"{bucket}/out")
    assert found == {} and n_images > 24
    printed = capfd.readouterr()
    shown = [repr(config.output), repr(config.cluster), repr(result), result._repr_html_()]
    said = "\n".join([caplog.text, printed.out, printed.err, *shown])
    leaks = [word for word in SECRETS.values() if word in said] + [
        each for each in PLANTED if each.decode("latin-1") in said
    ]
    assert leaks == []
    kept = b"".join(path.read_bytes() for path in user_cache.rglob("*") if path.is_file())
    assert not [secret for secret in SECRETS.values() if secret.encode() in kept]


@pytest.mark.slow
def test_nothing_planted_is_in_local_results_or_printed(
    planted: tuple[int, dict[str, Any]], commands: CommandHost, tmp_path: Path
) -> None:
    n_positions, sections = planted
    options = {"storage_options": {"auto_mkdir": True, "planted": SECRETS["options"]}}
    sections = sections | {
        "cluster": {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"},
        # Figures are searched where the results are on S3.
        "plots": {"enabled": False},
        "output": {"url": "out"} | options,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    environment = os.environ | {
        "AWS_SECRET_ACCESS_KEY": SECRETS["environment"],
        "AWS_SESSION_TOKEN": SECRETS["session"],
        "DASK_PLANTED__TOKEN": SECRETS["dask"],
    }
    said = ""
    for arguments in (["explore", "--verbose", "--set", "report.enabled=false"], ["run", "--verbose"]):
        done = commands.run(arguments[0], "run.yaml", *arguments[1:], environment=environment, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert f"positions {n_positions}" in said
    found, n_images = search(fsspec.filesystem("file"), str(tmp_path / "out"))
    assert found == {} and n_images > 24
    assert not [secret for secret in SECRETS.values() if secret in said]


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A function that runs a command in this process, without cached connections to earlier servers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(S3FileSystem, "_cache", {})

    def invoke(command: str, sections: dict[str, Any], *arguments: str, **environment: str) -> Result:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output": {"url": "out"}} | sections))
        return CliRunner().invoke(cli, [command, "run.yaml", "--verbose", *arguments], env=environment)

    return invoke


def check_failure(done: Result, folder: Path) -> None:
    """Check that a command has failed, and that its output and files contain no secrets."""
    assert "fruitdask: " in done.stderr and "Traceback" in done.stderr
    assert not [secret for secret in [*SECRETS.values(), "AKIAPLANTED"] if secret in done.output]
    assert search(fsspec.filesystem("file"), str(folder / "out"))[0] == {}


@pytest.mark.parametrize("key", ["input.url", "input.manifest", "input.inventory", "model.weights"])
def test_nothing_planted_is_in_an_error(
    planted: tuple[int, dict[str, Any]], command_line: Callable[..., Result], client: Any, tmp_path: Path, key: str
) -> None:
    place = planted[1]["input"]["manifest"].replace("list.csv", "broken")
    done = command_line("run", planted[1] | use(client), "--set", f"{key}={place}")
    assert done.exit_code == 2
    check_failure(done, tmp_path)


def use(client: Any) -> dict[str, Any]:
    """Configure the cluster of this session."""
    return {"cluster": {"kind": "address", "address": client.scheduler.address}}


@pytest.mark.parametrize(
    ("command", "key"),
    [("run", "input"), ("run", "output"), ("run", "model"), ("explore", "input"), ("plan", "model")],
)
def test_nothing_planted_is_in_errors_of_an_endpoint(
    planted: tuple[int, dict[str, Any]],
    command_line: Callable[..., Result],
    client: Any,
    s3_server: str,
    tmp_path: Path,
    command: str,
    key: str,
) -> None:
    """The server refuses keys from the options or, for the network, from the environment."""
    keys = {"key": "AKIAPLANTEDPLANTED12", "secret": SECRETS["options"], "token": SECRETS["token"]}
    options = {"endpoint_url": s3_server} | ({} if key == "model" else keys)
    place = {"weights" if key == "model" else "url": "s3://no-such-bucket/x.keras", "storage_options": options}
    sections = {"input": {"url": str(tmp_path / "in")}, "model": planted[1]["model"], "output": {"url": "out"}}
    done = command_line(
        command,
        sections | use(client) | {key: sections[key] | place},
        AWS_ACCESS_KEY_ID="AKIAPLANTEDPLANTED34",
        AWS_SECRET_ACCESS_KEY=SECRETS["environment"],
        AWS_SESSION_TOKEN=SECRETS["session"],
    )
    assert done.exit_code
    check_failure(done, tmp_path)


def test_nothing_planted_is_in_the_outcome_of_an_image_that_cannot_be_read(
    planted: tuple[int, dict[str, Any]],
    command_line: Callable[..., Result],
    client: Any,
    http_folder: tuple[Path, str],
    tmp_path: Path,
) -> None:
    shelf = http_folder[0] / "shelf" / "apple"
    shelf.mkdir(parents=True)
    for number in range(2):
        (shelf / f"broken_{number}.jpg").write_bytes(b"never sent")
    done = command_line("run", planted[1] | use(client) | {"input": {"url": f"{http_folder[1]}/shelf"}})
    assert done.exit_code == 3, done.stderr
    check_failure(done, tmp_path)
    failures = pd.read_csv(tmp_path / "out" / "failures.csv")
    assert list(failures["status"]) == ["unreachable", "unreachable"]
    assert failures["error"].str.contains("cannot read .*: 500.*Internal Server Error").all()

"""Whole runs on S3: two servers that share no code, path style and virtual-hosted style, http and https."""

import dataclasses
import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from botocore.config import Config as BotoConfig
from click.testing import CliRunner
from moto.server import DomainDispatcherApplication, create_backend_app
from runs import EXTRAS, OFF
from servers import make_certificate, run_node
from werkzeug.serving import make_server

import fruitdask
from fruitdask.cli import cli
from fruitdask.core.config import Config, ModelConfig
from fruitdask.core.partition import Partition
from fruitdask.core.prefixes import list_below
from fruitdask.core.progress import RunProgress
from fruitdask.core.s3 import S3
from fruitdask.core.storage import Location, check_bucket, exists, find_encryption
from fruitdask.errors import StorageError
from fruitdask.worker.fetch import ImageSource, Stopwatch, read_batches
from fruitdask.worker.models import build, build_artifact, fingerprint_model, start_building

S3RVER = "s3rver@3.7.1"
#: The one account that s3rver knows.
S3RVER_KEYS = {"aws_access_key_id": "S3RVER", "aws_secret_access_key": "S3RVER"}
BUCKET, FOLDER = "fruits", "own set/été +%20&"


@dataclasses.dataclass(frozen=True)
class Server:
    """An S3 server: its address and its keys, as boto3's clients take them, and storage options that do not follow from
    these.
    """

    url: str
    keys: dict[str, str]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def storage_options(self) -> dict[str, Any]:
        """fruitdask's storage options for this server."""
        keys = {"key": self.keys["aws_access_key_id"], "secret": self.keys["aws_secret_access_key"]}
        return {"endpoint_url": self.url, **keys, **self.options}

    def connect(self) -> Any:
        """Make a client that shares no code with the file system of s3fs."""
        settings = BotoConfig(**self.options.get("config_kwargs", {}))
        return boto3.client(
            "s3", endpoint_url=self.url, config=settings, **self.keys, **self.options.get("client_kwargs", {})
        )


class Proxy(BaseHTTPRequestHandler):
    """A forward proxy that sends requests for any host name to one server, because no resolver here knows the names."""

    protocol_version = "HTTP/1.1"
    target = ""
    hosts: set[str] = set()

    def forward(self) -> None:
        """Forward a request unchanged."""
        url = urlsplit(self.path)
        # botocore asks for a bucket's region path-style, whatever the style is.
        if url.query != "location":
            self.hosts.add(url.hostname or "")
        connection = http.client.HTTPConnection(self.target)
        path = self.path.removeprefix(f"{url.scheme}://{url.netloc}")
        connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        response = connection.getresponse()
        body = response.read()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", response.getheader("Content-Length") or str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serve(server: Any) -> Iterator[Any]:
    """Serve in a thread."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def open_moto(request: pytest.FixtureRequest) -> Iterator[Server]:
    yield Server(request.getfixturevalue("s3_server"), {"aws_access_key_id": "a", "aws_secret_access_key": "b"})


@contextmanager
def open_moto_https(request: pytest.FixtureRequest) -> Iterator[Server]:
    request.getfixturevalue("s3_server")  # for its environment
    files = make_certificate(request.getfixturevalue("tmp_path_factory").mktemp("moto"))
    app = DomainDispatcherApplication(create_backend_app)
    with serve(make_server("127.0.0.1", 0, app, threaded=True, ssl_context=files)) as server:
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
        yield Server(f"https://127.0.0.1:{server.server_port}", keys, {"client_kwargs": {"verify": files[0]}})


@contextmanager
def run_s3rver(request: pytest.FixtureRequest, *arguments: str) -> Iterator[int]:
    """Run s3rver; returns its port."""
    request.getfixturevalue("s3_server")  # for its environment
    data = str(request.getfixturevalue("tmp_path_factory").mktemp("s3rver"))
    listen = ["-d", data, "-a", "127.0.0.1", "-p", "0", "-s"]
    # s3rver encrypts the tokens of its pages with a cipher that OpenSSL has retired.
    options = ["--openssl-legacy-provider"]
    with run_node(request, S3RVER, "bin/s3rver.js", [*listen, *arguments], options=options) as port:
        yield port


@contextmanager
def open_s3rver(request: pytest.FixtureRequest) -> Iterator[Server]:
    with run_s3rver(request) as port:
        yield Server(f"http://127.0.0.1:{port}", S3RVER_KEYS)


@contextmanager
def open_virtual_hosted(request: pytest.FixtureRequest) -> Iterator[Server]:
    with run_s3rver(request, "--service-endpoint", "fruits.test") as port:
        handler = type("Handler", (Proxy,), {"target": f"127.0.0.1:{port}", "hosts": set()})
        with serve(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as proxy:
            config = {
                "s3": {"addressing_style": "virtual"},
                "proxies": {"http": f"http://127.0.0.1:{proxy.server_port}"},
            }
            yield Server("http://s3.fruits.test", S3RVER_KEYS, {"config_kwargs": config})
            assert handler.hosts == {f"{BUCKET}.s3.fruits.test"}


NEEDS_NODE = [pytest.mark.browser, pytest.mark.slow]
MOTO = pytest.param(open_moto, id="moto")
MOTO_HTTPS = pytest.param(open_moto_https, id="moto, https", marks=pytest.mark.slow)
WITH_S3RVER = pytest.param(open_s3rver, id="s3rver", marks=NEEDS_NODE)
VIRTUAL_HOSTED = pytest.param(open_virtual_hosted, id="s3rver, virtual-hosted", marks=NEEDS_NODE)
#: Tests of several runs use each server, but not each way to reach it.
both_servers = pytest.mark.parametrize("server", [MOTO, WITH_S3RVER], indirect=True)


@pytest.fixture(scope="module", params=[MOTO, MOTO_HTTPS, WITH_S3RVER, VIRTUAL_HOSTED])
def server(request: pytest.FixtureRequest, sample_folder: Path, tiny_model: ModelConfig) -> Iterator[Server]:
    """An S3 server with the drawn images, a manifest and weights."""
    with ExitStack() as stack:
        server: Server = stack.enter_context(request.param(request))
        s3 = server.connect()
        stack.callback(s3.close)
        s3.create_bucket(Bucket=BUCKET)
        for path in sample_folder.rglob("*.jpg"):
            s3.put_object(
                Bucket=BUCKET, Key=f"{FOLDER}/{path.relative_to(sample_folder).as_posix()}", Body=path.read_bytes()
            )
        rows = [
            f"{path.relative_to(sample_folder).as_posix()},{path.parent.name}" for path in sample_folder.rglob("*.jpg")
        ]
        s3.put_object(Bucket=BUCKET, Key="lists/all.csv", Body="\n".join(["path,label", *rows]).encode())
        s3.put_object(Bucket=BUCKET, Key="nets/colours.keras", Body=Path(tiny_model.weights).read_bytes())
        yield server
        for entry in list_objects(s3, ""):
            s3.delete_object(Bucket=BUCKET, Key=entry)
        s3.delete_bucket(Bucket=BUCKET)


def list_objects(s3: Any, prefix: str) -> list[str]:
    """List the names of all objects."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


MakeConfig = Callable[..., Config]


@pytest.fixture
def make_config(server: Server, request: pytest.FixtureRequest) -> MakeConfig:
    """Make the configuration of a run whose images, weights, list and results are all on S3."""
    output = re.sub(r"\W+", "-", request.node.name)

    def make(**settings: dict[str, Any]) -> Config:
        options = {"storage_options": server.storage_options}
        sections: dict[str, dict[str, Any]] = {
            "input": {"url": f"s3://{BUCKET}/{FOLDER}", **options},
            "model": {"weights": f"s3://{BUCKET}/nets/colours.keras", "preprocessing": "none", **options},
            "featurize": {"images_per_partition": 12},
            "plots": {"enabled": False},
            "output": {"url": f"s3://{BUCKET}/{output}", **options},
        }
        return fruitdask.load_config(
            {name: sections.get(name, {}) | settings.get(name, {}) for name in sections | settings}
        )

    return make


@pytest.fixture(scope="module")
def on_disk(
    client: Any, sample_folder: Path, tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> fruitdask.RunResult:
    """A run on the same images and the same network, all on this disk."""
    config = fruitdask.load_config(
        {
            "input": {"url": str(sample_folder)},
            "model": tiny_model.model_dump(),
            "featurize": {"images_per_partition": 12},
            "plots": {"enabled": False},
            "output": {"url": str(tmp_path_factory.mktemp("disk") / "out")},
        }
    )
    return fruitdask.run(config, client=client)


def list_results(result: fruitdask.RunResult) -> list[str]:
    """List the files of a run, relative to its folder."""
    fs, path = result.output.fs, result.output.path
    return sorted(name[len(path) + 1 :] for name in fs.find(path))


@both_servers
def test_large_folder_is_listed_whole(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that are listed at once hold the same files as pages of the whole."""
    s3, names = server.connect(), [f"large/{part}/{kind}/{n}.jpg" for part in "ab" for kind in "xyz" for n in range(4)]
    for name in names:
        s3.put_object(Bucket=BUCKET, Key=name, Body=b"")
    monkeypatch.setattr(S3, "list_page", partialmethod(S3.list_page, n_max=3))
    location = Location(f"s3://{BUCKET}/large", server.storage_options)
    assert [f"large/{path}" for path, _, _ in list_below(location.fs, location.path)] == names
    s3.close()


class Interrupt(RunProgress):
    """Presses Ctrl-C when some images are done."""

    def advance(self, n_images: int, *, failures: Mapping[str, int]) -> None:
        """Press it."""
        raise KeyboardInterrupt("in this test")


@pytest.mark.slow
@both_servers
def test_run_on_s3_equals_run_on_disk(
    make_config: MakeConfig, client: Any, on_disk: fruitdask.RunResult, server: Server
) -> None:
    result = fruitdask.run(make_config(), client=client)
    pd.testing.assert_frame_equal(result.table, on_disk.table)
    np.testing.assert_array_equal(result.features.compute(), on_disk.features.compute())
    np.testing.assert_allclose(result.pca.components_, on_disk.pca.components_)
    assert result.exploration is not None and on_disk.exploration is not None
    pd.testing.assert_frame_equal(result.exploration.images, on_disk.exploration.images)
    assert result.quality == on_disk.quality
    assert list_results(result) == list_results(on_disk)
    assert len(result.report.read()) > 50_000
    assert server.url not in json.dumps(result.manifest)


@pytest.mark.parametrize("server", [MOTO_HTTPS, VIRTUAL_HOSTED], indirect=True)
def test_features_are_the_same_by_https_and_from_virtual_hosts(
    make_config: MakeConfig, client: Any, on_disk: fruitdask.RunResult
) -> None:
    result = fruitdask.run(make_config(**dict.fromkeys(EXTRAS, OFF)), client=client)
    pd.testing.assert_frame_equal(result.table, on_disk.table)
    np.testing.assert_array_equal(result.features.compute(), on_disk.features.compute())


@pytest.mark.slow
@both_servers
def test_run_resumes_where_it_was_interrupted(make_config: MakeConfig, client: Any, server: Server) -> None:
    config = make_config(
        input={"manifest": f"s3://{BUCKET}/lists/all.csv"},
        featurize={"images_per_partition": 5},
        **dict.fromkeys(EXTRAS, OFF),
    )
    with pytest.raises(KeyboardInterrupt, match="in this test"):
        fruitdask.run(config, client=client, progress=Interrupt())
    s3, folder = server.connect(), f"{config.output.url.split('/')[-1]}/partitions"
    n_done = len(list_objects(s3, folder))
    assert n_done >= 1
    result = fruitdask.run(config, client=client)
    # Partitions in flight may have been finished before the next run began.
    assert result.n_computed <= 24 - 5 * (n_done - 1) - 4
    assert list(result.table["status"]) == ["ok"] * 24
    for index in (0, 3):
        s3.delete_object(Bucket=BUCKET, Key=f"{folder}/{index:05}.parquet")
    assert fruitdask.run(config, client=client).n_computed == 10
    assert fruitdask.run(config, client=client).n_computed == 0
    again = config.model_copy(update={"output": config.output.model_copy(update={"overwrite": True})})
    assert fruitdask.run(again, client=client).n_computed == 24


@pytest.mark.slow
@both_servers
def test_explore_and_report_work_on_s3(make_config: MakeConfig, client: Any) -> None:
    config = make_config()
    exploration = fruitdask.explore(config, client=client)
    assert exploration.images["status"].value_counts().to_dict() == {"ok": 24}
    output = Location(config.output.url, config.output.storage_options)
    page = output.child("report.html")
    assert exists(page)
    output.fs.rm(page.path)
    fruitdask.render_report(config)
    assert exists(page)


ODD_NAMES = (
    "plain.jpg",
    "a b/+ & %20 %2F = ? # ;.jpg",
    "ü/é 梨 🍎.jpg",
    "a//b.jpg",
    "/leading.jpg",
    "dots/../up.jpg",
    "back\\slash\ttab 'quote\" [1]*.jpg",
)


def test_odd_names_are_listed_and_read(server: Server) -> None:
    # s3rver stores objects as files, whose paths cannot tell these names from others.
    names = [name for name in ODD_NAMES if server.keys is not S3RVER_KEYS or not re.search("//|^/|\\.\\.|\\\\", name)]
    s3 = server.connect()
    for name in [*names, "marker/", "image.jpg/"]:
        s3.put_object(Bucket=BUCKET, Key=f"odd/{name}", Body=b"" if name.endswith("/") else name.encode())
    config = fruitdask.load_config(
        {
            "input": {"url": f"s3://{BUCKET}/odd", "storage_options": server.storage_options},
            "output": {"url": "unused"},
        }
    )
    catalog = fruitdask.list_images(config.input)
    assert list(catalog["path"]) == sorted(names)
    root = Location(config.input.url, config.input.storage_options)
    assert [root.fs.cat_file(f"{root.path}/{path}").decode() for path in catalog["path"]] == sorted(names)


@pytest.mark.slow
@pytest.mark.parametrize("server", [MOTO], indirect=True)
def test_every_object_is_encrypted_as_configured(make_config: MakeConfig, client: Any, server: Server) -> None:
    asked = server.storage_options | {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms"}}
    config = make_config(
        output={"storage_options": asked}, explore={"max_thumbnails": 10}, plots={"enabled": True, "dpi": 50}
    )
    result = fruitdask.run(config, client=client)
    s3, folder = server.connect(), f"{config.output.url.split('/')[-1]}/"
    found = {
        name: s3.head_object(Bucket=BUCKET, Key=name).get("ServerSideEncryption") for name in list_objects(s3, folder)
    }
    assert len(found) > 50
    assert {name for name, encryption in found.items() if encryption != "aws:kms"} == set()
    assert find_encryption(result.output.child("manifest.json")) == "aws:kms"
    assert find_encryption(Location(f"s3://{BUCKET}/lists/all.csv", server.storage_options)) is None


@pytest.mark.parametrize("server", [WITH_S3RVER, VIRTUAL_HOSTED], indirect=True)
def test_unknown_key_is_explained(server: Server) -> None:
    options = server.storage_options | {"key": "AKIAIOSFODNN7EXAMPLE"}
    message = r"cannot read s3://fruits/x: .*\((403|InvalidAccessKeyId)\): .*credentials"
    with pytest.raises(StorageError, match=message) as caught:
        check_bucket(Location(f"s3://{BUCKET}/x", options))
    assert "EXAMPLE" not in str(caught.value)


@pytest.mark.parametrize("server", [MOTO_HTTPS], indirect=True)
def test_certificate_of_an_unknown_authority_is_refused(server: Server) -> None:
    options = server.storage_options | {"client_kwargs": {}}
    with pytest.raises(StorageError, match=r": give the server's certificate authority .* {verify: FILE}"):
        exists(Location(f"s3://{BUCKET}/x", options))


@pytest.mark.parametrize(("place", "verb"), [("input", "list"), ("output", "read")], ids=["input", "output"])
def test_missing_bucket_ends_the_command_before_anything_starts(
    s3_server: str, sample_folder: Path, tmp_path: Path, place: str, verb: str
) -> None:
    places = {"input": {"url": str(sample_folder)}, "output": {"url": str(tmp_path / "out")}}
    places[place] = {"url": "s3://no-such-bucket/x", "storage_options": {"endpoint_url": s3_server}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(places))
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "run.yaml")])
    assert done.exit_code == 2, done.output
    assert done.stderr.splitlines()[-1] == (
        f"fruitdask: cannot {verb} s3://no-such-bucket/x: ListObjectsV2: The specified bucket does not exist "
        "(NoSuchBucket): "
        "there is no such bucket; check the URL"
    )
    assert "Starting the cluster" not in done.output


@pytest.mark.slow
def test_secrets_are_in_no_command_line_and_weights_are_hashed_once(
    s3_bucket: tuple[str, dict[str, Any]],
    s3_client: Any,
    tiny_model: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bucket, options = s3_bucket
    s3_client.put_object(Bucket=bucket, Key="nets/colours.keras", Body=Path(tiny_model.weights).read_bytes())
    secrets = {"key": "planted-key-4711", "secret": "planted-secret-4711"}
    remote = {"weights": f"s3://{bucket}/nets/colours.keras", "storage_options": options | secrets}
    config = tiny_model.model_copy(update=remote)
    caplog.set_level("DEBUG", "fruitdask")
    n_hashed = build._hash_remote.cache_info().misses
    with start_building(config) as wait_for_artifact:
        started = psutil.Process().children(recursive=True)
        commands = [*(" ".join(process.cmdline()) for process in started)]
        artifact = wait_for_artifact()
    assert "multiprocessing" in " ".join(commands) and "4711" not in " ".join([*commands, caplog.text])
    assert artifact == build_artifact(tiny_model)
    with start_building(config) as wait_for_artifact:
        assert wait_for_artifact() == artifact
    assert build._hash_remote.cache_info().misses == n_hashed + 1
    changed = config.model_copy(update={"region": "eu-west-3", "storage_options": options})
    assert fingerprint_model(changed) == fingerprint_model(config) == fingerprint_model(tiny_model)


class Meeting(BaseHTTPRequestHandler):
    """Responds to GET requests only when the expected number of them is waiting."""

    protocol_version = "HTTP/1.1"
    barrier: threading.Barrier
    body = b""

    def do_GET(self) -> None:
        """Wait for the others."""
        self.barrier.wait()
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Crowd(ThreadingHTTPServer):
    """A server that accepts many connections at once."""

    request_queue_size = 128


@pytest.mark.usefixtures("s3_server")
def test_all_threads_of_a_worker_read_as_many_files_at_once_as_configured(sample_folder: Path) -> None:
    n_threads, concurrent_reads = 4, 16
    meeting: dict[str, Any] = {
        "barrier": threading.Barrier(n_threads * concurrent_reads, timeout=30),
        "body": next(sample_folder.rglob("*.jpg")).read_bytes(),
    }
    with serve(Crowd(("127.0.0.1", 0), type("Handler", (Meeting,), meeting))) as server:
        location = Location("s3://bucket/in", {"endpoint_url": f"http://127.0.0.1:{server.server_port}"})
        source = ImageSource(location, 4, 10_000_000, fetch_attempts=1, concurrent_reads=concurrent_reads)
        names = tuple(f"{number}.jpg" for number in range(concurrent_reads))
        partition = Partition(0, 0, names, ("any",) * concurrent_reads)

        def read(_: int) -> list[str]:
            batches = read_batches(partition, source, input_px=32, watch=Stopwatch(), on_asked=lambda: None)
            return [outcome.status for batch in batches for outcome in batch.outcomes]

        with ThreadPoolExecutor(n_threads) as pool:
            statuses = [status for found in pool.map(read, range(n_threads)) for status in found]
    assert statuses == ["ok"] * n_threads * concurrent_reads


@pytest.mark.usefixtures("s3_server")
def test_stalled_server_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {
            "endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "config_kwargs": {"read_timeout": 0.1, "retries": {"max_attempts": 0}},
        }
        with pytest.raises(StorageError, match="cannot read s3://bucket/x: .*: the server stopped answering"):
            exists(Location("s3://bucket/x", options))

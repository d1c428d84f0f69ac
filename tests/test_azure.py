"""Runs on Azure Blob Storage, simulated by Microsoft's Azurite, with and without injected faults."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from azure.storage.blob import RetentionPolicy
from azurite import CONTAINER, KEY, Server, connect_by_key, open_account
from cluster_events import PATIENCE_SECONDS, wait_until
from faulty_s3 import KINDS, open_faulty_s3
from runs import EXTRAS, OFF, ON

import fruitdask
from fruitdask import store
from fruitdask.cli.erase import _describe
from fruitdask.cluster.regions import check_regions
from fruitdask.core import abfs
from fruitdask.core.config import ModelConfig
from fruitdask.core.config.sections import PrivacyConfig
from fruitdask.core.partition import Partition
from fruitdask.core.storage import Location, check_bucket, exists, hash_file, keeps_versions, write_file
from fruitdask.errors import ConfigError, OutputError, ResidencyError, StorageError
from fruitdask.pipeline.record import describe_protection
from fruitdask.worker.fetch import ImageSource, Stopwatch, read_batches

pytestmark = [pytest.mark.slow, pytest.mark.browser]

FOLDER = "own set/été +%20&"
N_IMAGES = 12


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, sample_folder: Path, tiny_model: ModelConfig) -> Iterator[Server]:
    """Start an Azure Storage account with the drawn images and a network."""
    with open_account(request, sample_folder, FOLDER) as server:
        server.put("nets/colours.keras", Path(tiny_model.weights).read_bytes())
        yield server


MakeTree = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def make_tree(server: Server, request: pytest.FixtureRequest) -> MakeTree:
    """Return a function that configures a run whose images, network and results are all on Azure."""
    output = re.sub(r"\W+", "-", request.node.name)

    def make(url: str = server.url, **settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
        options = {"storage_options": connect_by_key(url)}
        sections: dict[str, dict[str, Any]] = {
            "input": {"url": f"abfs://{CONTAINER}/{FOLDER}", "limit": N_IMAGES, **options},
            "model": {"weights": f"az://{CONTAINER}/nets/colours.keras", "preprocessing": "none", **options},
            "cluster": {"kind": "local", "n_workers": 1, "dashboard_address": None},
            "featurize": {"images_per_partition": 3},
            **dict.fromkeys(EXTRAS, OFF),
            "output": {"url": f"abfss://{CONTAINER}/{output}", **options},
        }
        names = [*sections, *(name for name in settings if name not in sections)]
        return {name: sections.get(name, {}) | settings.get(name, {}) for name in names}

    return make


@pytest.fixture(scope="module")
def on_disk(
    client: Any, sample_folder: Path, tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> fruitdask.RunResult:
    """Run on the same images with the same network, all on this disk."""
    sections = {
        "input": {"url": str(sample_folder), "limit": N_IMAGES},
        "model": tiny_model.model_dump(),
        "featurize": {"images_per_partition": 3},
        **dict.fromkeys(EXTRAS, OFF),
        **dict.fromkeys(("explore", "quality", "report"), ON),
        "output": {"url": str(tmp_path_factory.mktemp("disk") / "out")},
    }
    return fruitdask.run(fruitdask.load_config(sections), client=client)


def assert_same_features(result: fruitdask.RunResult, expected: fruitdask.RunResult) -> None:
    """Compare two runs byte for byte."""
    pd.testing.assert_frame_equal(result.table, expected.table)
    np.testing.assert_array_equal(result.features.compute(), expected.features.compute())


def run_command(tree: dict[str, Any], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in its own process group."""
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "fruitdask", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=folder, start_new_session=True, **pipes)


def test_run_equals_run_on_disk_and_grows(
    make_tree: MakeTree, client: Any, on_disk: fruitdask.RunResult, server: Server
) -> None:
    tree = make_tree(**dict.fromkeys(("explore", "quality", "report"), ON))
    config = fruitdask.load_config(tree)
    result = fruitdask.run(config, client=client)
    assert_same_features(result, on_disk)
    names = [path.removeprefix(f"{result.output.path}/") for path in result.output.fs.find(result.output.path)]
    assert names == sorted(
        path.relative_to(on_disk.output.path).as_posix()
        for path in Path(on_disk.output.path).rglob("*")
        if path.is_file()
    )
    assert result.manifest["processing"]["at_rest"] == "AES256 by Azure Storage"
    assert KEY not in "".join(
        server.read(f"{result.output.path.partition('/')[2]}/{name}").decode("latin-1") for name in names
    )
    assert fruitdask.run(config, client=client).n_computed == 0
    changed, other = (f"{FOLDER}/{path}" for path in on_disk.table["path"][:2])
    before = server.read(changed)
    try:
        server.put(changed, server.read(other))
        again = fruitdask.run(config, client=client)
    finally:
        server.put(changed, before)
    assert again.n_computed == 1
    features = again.features.compute()
    np.testing.assert_array_equal(features[0], features[1])
    np.testing.assert_array_equal(features[1:], on_disk.features.compute()[1:])


def test_killed_command_is_resumed_by_the_same_command(
    make_tree: MakeTree, server: Server, on_disk: fruitdask.RunResult, tmp_path: Path
) -> None:
    tree = make_tree(featurize={"images_per_partition": 1})
    folder = tree["output"]["url"].rpartition("/")[2]
    with run_command(tree, tmp_path, "run", "run.yaml") as process:
        wait_until(lambda: server.list(f"{folder}/partitions/"), "a partition is committed")
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with run_command(tree, tmp_path, "run", "run.yaml") as process:
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr and "Unclosed" not in stderr and "rror" not in stderr
    result = fruitdask.open(tree["output"]["url"], tree["output"]["storage_options"])
    assert_same_features(result, on_disk)


def test_run_loses_nothing_to_faults(
    make_tree: MakeTree, server: Server, client: Any, on_disk: fruitdask.RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only in this process, but it sends most requests.
    monkeypatch.setattr(abfs, "_MAX_BACKOFF_SECONDS", 0.1)
    kinds = [kind for kind in KINDS if kind != "stall"]
    with open_faulty_s3(server.url, fraction=0.1, seed=3, kinds=kinds) as proxy:
        result = fruitdask.run(fruitdask.load_config(make_tree(proxy.url)), client=client)
        assert_same_features(result, on_disk)
        n_requests, n_faults = proxy.requests.total(), proxy.injected.total()
    assert 0.03 < n_faults / n_requests < 0.2


OPERATIONS: dict[str, tuple[Callable[[Location], Any], str]] = {
    "write": (lambda place: write_file(place, b"1"), "write"),
    "exists": (exists, "read"),
    "hash": (hash_file, "read"),
    "list": (check_bucket, "read"),
    "read": (store.read_table, "read"),
}
CAUSES = {
    "500": (2, r"\(InternalError\): the server has failed; try again later"),
    "503": (2, r"\(ServerBusy\): Azure received too many requests; try again later"),
    # After a reset, aiohttp may open another connection within the same attempt, once.
    "reset after": (4, "the server closed the connection; check the network, or try again"),
    "truncated": (2, "the server closed the connection; check the network, or try again"),
}


@pytest.mark.parametrize(("operation", "verb"), OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("kind", CAUSES)
def test_request_is_sent_as_often_as_configured(
    server: Server, monkeypatch: pytest.MonkeyPatch, operation: Callable[[Location], Any], verb: str, kind: str
) -> None:
    monkeypatch.setattr(abfs, "_MAX_BACKOFF_SECONDS", 0.01)
    server.put("faulty", b"1")
    n_requests, cause = CAUSES[kind]
    with open_faulty_s3(server.url, fraction=1, kinds=[kind]) as proxy:
        place = Location(f"abfs://{CONTAINER}/faulty", connect_by_key(proxy.url), attempts=2)
        with pytest.raises(StorageError, match=rf"^cannot {verb} {place.url}: [^\n]*{cause}$"):
            operation(place)
    assert proxy.requests.total() in (n_requests, 2 * n_requests if kind == "truncated" else n_requests)


def test_stalled_read_fails_only_its_image(server: Server, on_disk: fruitdask.RunResult) -> None:
    with open_faulty_s3(server.url, fraction=1, kinds=["stall"]) as proxy:
        options = connect_by_key(proxy.url) | {"read_timeout": 0.5}
        source = Location(f"abfs://{CONTAINER}/{FOLDER}", options, attempts=1)
        partition = Partition(0, 0, (on_disk.table["path"][0],), ("any",))
        images = ImageSource(source, 8, 10_000_000, fetch_attempts=2, concurrent_reads=4)
        (batch,) = read_batches(partition, images, input_px=32, watch=Stopwatch(), on_asked=lambda: None)
    (outcome,) = batch.outcomes
    assert (outcome.status, outcome.attempts, proxy.injected.total()) == ("unreachable", 2, 2)
    assert re.match(rf"cannot read {re.escape(source.url)}/.*: the server stopped answering; check", outcome.error)


def test_verify_finds_a_damaged_blob_and_a_rerun_repairs_it(
    make_tree: MakeTree, server: Server, client: Any, on_disk: fruitdask.RunResult
) -> None:
    config = fruitdask.load_config(make_tree())
    fruitdask.run(config, client=client)
    url, options = config.output.url, config.output.storage_options
    assert fruitdask.verify(url, storage_options=options).is_well
    name = f"{url.rpartition('/')[2]}/features.zarr/features/c/1/0"
    data = server.read(name)
    server.put(name, data[:-1] + bytes([data[-1] ^ 1]))
    found = fruitdask.verify(url, storage_options=options, repair=True)
    assert not found.is_well
    assert_same_features(fruitdask.run(config, client=client), on_disk)


def test_erase_also_deletes_snapshots(make_tree: MakeTree, server: Server, client: Any) -> None:
    config = fruitdask.load_config(make_tree())
    table = fruitdask.run(config, client=client).table
    folder, path = config.output.url.rpartition("/")[2], table["path"][4]
    for name in server.list(folder):
        server.client.get_blob_client(CONTAINER, name).create_snapshot()
    erasure = fruitdask.erase(config, [path], client=client)
    assert (erasure.n_erased, erasure.n_in_input, erasure.keeps_versions) == (1, 1, False)
    container = server.client.get_container_client(CONTAINER)
    blobs = [blob for blob in container.list_blobs(folder, include=["snapshots"]) if blob.snapshot]
    kept = [container.get_blob_client(blob.name, snapshot=blob.snapshot).download_blob().readall() for blob in blobs]
    current = [server.read(name) for name in server.list(folder)]
    assert current and [data for data in kept + current if path.encode() in data] == []
    server.client.set_service_properties(delete_retention_policy=RetentionPolicy(enabled=True, days=7))
    try:
        assert keeps_versions(Location(config.output.url, server.options))
    finally:
        server.client.set_service_properties(delete_retention_policy=RetentionPolicy(enabled=False))
    advice = _describe(replace(erasure, keeps_versions=True), config)["older versions"]
    assert re.match(f"the account keeps .* lifecycle rule delete those below {config.output.url}$", advice)


def test_versions_are_detected(server: Server) -> None:
    # Azurite keeps no versions. An account that does sends this header.
    server.put("versioned/x", b"1")
    with open_faulty_s3(server.url, fraction=0, headers=[("x-ms-version-id", "2026-11-30T00:00:00.0000000Z")]) as proxy:
        assert keeps_versions(Location(f"abfs://{CONTAINER}/versioned", connect_by_key(proxy.url)))
    assert not keeps_versions(Location(f"abfs://{CONTAINER}/versioned", server.options))


def test_other_account_is_another_place(make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abfs, "_MAX_BACKOFF_SECONDS", 0.01)
    tree = make_tree()
    source, output = tree["input"], tree["output"]
    output["url"] = f"{source['url']}/out"
    with pytest.raises(ConfigError, match="lies inside input.url"):
        fruitdask.run(fruitdask.load_config(tree))
    source |= {"url": source["url"].replace("photographs/", "photographs@other.dfs.core.windows.net/")}
    source["storage_options"] = {"account_key": KEY}
    with pytest.raises(StorageError, match="^cannot list abfs://photographs@other.*: no server answers"):
        fruitdask.run(fruitdask.load_config(tree))


def test_second_run_is_refused(make_tree: MakeTree, client: Any) -> None:
    config = fruitdask.load_config(make_tree())
    output = Location(config.output.url, config.output.storage_options)
    with store.locked(output):
        with pytest.raises(OutputError, match="^another run is using this output folder"):
            fruitdask.run(config, client=client)
    assert not exists(output)


@pytest.mark.parametrize("kind", ["reset after", "truncated", "503"])
def test_lock_is_acquired_even_if_the_response_is_lost(
    server: Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(abfs, "_MAX_BACKOFF_SECONDS", 0.01)
    faulty = ["PUT"]

    def is_first(method: str, path: str) -> bool:
        return method in faulty and faulty.pop() == method

    with open_faulty_s3(server.url, fraction=1, kinds=[kind], concerns=is_first) as proxy:
        output = Location(f"abfs://{CONTAINER}/locked", connect_by_key(proxy.url))
        with store.locked(output):
            assert proxy.injected.total() == 1 and proxy.requests["PUT"] == 2
            with pytest.raises(OutputError, match="^another run"), store.locked(Location(output.url, server.options)):
                pass
    assert server.list("locked") == []


ODD_NAMES = (
    "plain.jpg",
    "a b/+ & %20 %2F = ? # ;.jpg",
    "ü/é 梨 🍎.jpg",
    "a//b.jpg",
    "what?versionid=1.jpg",
    "back tab 'quote\" [1]*.jpg",
)


def test_odd_names_are_listed_page_by_page_and_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ODD_NAMES:
        server.put(f"odd/{name}", name.encode())
    server.client.get_blob_client(CONTAINER, "odd/plain.jpg").create_snapshot()
    server.put("odd/marker/", b"")
    server.put("odd/folder.jpg", b"", metadata={"hdi_isfolder": "true"})
    server.put("odd/Folder.jpg", b"", metadata={"Hdi_isfolder": "true"})
    server.put("odd/folder.jpg/page.jpg", bytes(512), blob_type="PageBlob")
    server.put("oddly/not-there.jpg", b"")
    pages: list[int] = []

    def list_small_page(self: abfs.Azure, path: str, token: str | None = None) -> Any:
        rows, token = list_page(self, path, token, n_max=3)
        pages.append(len(rows))
        return rows, token

    list_page = abfs.Azure.list_page
    monkeypatch.setattr(abfs.Azure, "list_page", list_small_page)
    place = {"url": f"abfs://{CONTAINER}/odd", "storage_options": server.options}
    listing = fruitdask.load_config({"input": place, "output": {"url": "unused"}}).input
    catalog = fruitdask.list_images(listing)
    assert list(catalog["path"]) == sorted([*ODD_NAMES, "folder.jpg/page.jpg"]) and len(pages) == 4
    root = Location(listing.url, listing.storage_options)
    assert [root.fs.cat_file(root.locate(path)).decode() for path in ODD_NAMES] == list(ODD_NAMES)
    assert dict(zip(catalog["path"], catalog["bytes"], strict=True))["folder.jpg/page.jpg"] == 512
    copy = Location(f"abfs://{CONTAINER}/odd copy", server.options)
    root.fs.copy(f"{root.path}/", f"{copy.path}/", recursive=True)
    assert server.list("odd copy/") == sorted(f"odd copy/{path}" for path in catalog["path"])
    copy.fs.rm(copy.path, recursive=True)
    assert server.list("odd copy") == []


def test_azure_encrypts_at_rest_and_its_region_must_be_given(make_tree: MakeTree, server: Server) -> None:
    place = Location(f"abfs://{CONTAINER}/nets/colours.keras", server.options)
    privacy = PrivacyConfig(require_encryption=True)
    assert describe_protection(privacy, place) == {"at_rest": "AES256 by Azure Storage"}
    region = {"region": "westeurope"}
    tree = make_tree(privacy={"allowed_regions": "eu"}, input=region, model=region)
    with pytest.raises(ResidencyError, match="needs the region of abfss://.*unknown; set output.region$"):
        check_regions(fruitdask.load_config(tree))
    tree["output"]["region"] = "northeurope"
    assert check_regions(fruitdask.load_config(tree))["output"] == "northeurope"
    tree["output"]["region"] = "eastus"
    with pytest.raises(ResidencyError, match="^output: .* is in eastus, but privacy.allowed_regions has eu"):
        check_regions(fruitdask.load_config(tree))

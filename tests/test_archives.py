"""Tests of archives as inputs: listed, read by many threads and workers, replaced, damaged; on a disk and on a real S3
server.
"""

import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_growing import compute_colours, configure, draw

import fruitdask
from fruitdask.cluster.ec2.policies import list_actions
from fruitdask.cluster.regions import find_regions
from fruitdask.core.config import Config, InputConfig, ModelConfig
from fruitdask.core.partition import Partition
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import Location, hide_secrets, pin
from fruitdask.errors import CatalogError, ConfigError, DamageError, StorageError
from fruitdask.pipeline.inputs import prepare_inputs
from fruitdask.report.sections import show_place
from fruitdask.store.catalog import list_images, list_input
from fruitdask.worker.fetch import ImageSource, Stopwatch, read_batches

Pack = Callable[[Path, Mapping[str, bytes]], str]


def pack_zip(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return f"zip://::{path.with_suffix('.zip')}"


def pack_tar(path: Path, files: Mapping[str, bytes], mode: str = "w", times: int = 0) -> str:
    path = path.with_suffix(f".tar.{mode[2:]}" if mode[2:] else ".tar")
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mtime = len(data), times
            archive.addfile(info, io.BytesIO(data))
    return f"tar://::{path}"


KINDS: dict[str, Pack] = {
    "zip": pack_zip,
    "stored zip": lambda path, files: pack_zip(path, files, zipfile.ZIP_STORED),
    "tar": pack_tar,
    "tar.gz": lambda path, files: pack_tar(path, files, "w:gz"),
    "tar.xz": lambda path, files: pack_tar(path, files, "w:xz"),
}
packs = pytest.mark.parametrize("pack", KINDS.values(), ids=list(KINDS))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """90 files of three classes, of random bytes and of many sizes."""
    random = np.random.default_rng(0)
    names = (f"{label}/{number:03}.jpg" for label in ("apple", "pêche", "x/y") for number in range(30))
    return {name: random.bytes(int(random.integers(1, 40_000))) for name in names}


@packs
def test_archive_is_listed_and_read_by_many_threads(tmp_path: Path, files: dict[str, bytes], pack: Pack) -> None:
    url = pack(tmp_path / "photos", files)
    catalog = list_images(InputConfig(url=url))
    assert dict(zip(catalog["path"], catalog["bytes"])) == {name: len(data) for name, data in files.items()}
    assert set(catalog["label"]) == {"apple", "pêche", "y"}
    place = pin(Location(url))
    with ThreadPoolExecutor(16) as pool:
        read = pool.map(lambda path: place.fs.cat_file(place.locate(path)), list(files) * 4)
        assert list(read) == list(files.values()) * 4
    inner = list_images(InputConfig(url=url.replace("::", "x::", 1)))
    assert list(inner["path"]) == [f"y/{number:03}.jpg" for number in range(30)]


@packs
def test_worker_reads_the_files_of_an_archive(tmp_path: Path, files: dict[str, bytes], pack: Pack) -> None:
    source = ImageSource(
        pin(Location(pack(tmp_path / "photos", files))), 8, 10**6, fetch_attempts=1, concurrent_reads=16
    )
    partition = Partition(0, 0, (*files, "apple/none.jpg"), ("any",) * 91)
    statuses, contents = [], []
    for batch in read_batches(partition, source, input_px=32, watch=Stopwatch(), on_asked=lambda: None):
        contents += [outcome.data for outcome in batch.outcomes]
        statuses += [outcome.status for outcome in batch.outcomes]
    assert contents == [*files.values(), b""]
    # A file that is not an image is not a fault of the archive.
    assert statuses == ["unreadable"] * 90 + ["missing"]


@pytest.mark.parametrize("pack", [pack_zip, pack_tar], ids=["zip", "tar"])
def test_archive_at_the_top_gives_its_name_to_the_class(tmp_path: Path, pack: Pack) -> None:
    url = pack(tmp_path / "my fruits", {"1.jpg": b"x", "pear/2.jpg": b"y"})
    assert list(list_images(InputConfig(url=url))["label"]) == ["my fruits", "pear"]


@pytest.mark.parametrize("pack", [pack_zip, pack_tar], ids=["zip", "tar"])
def test_replaced_archive_is_noticed(tmp_path: Path, pack: Pack) -> None:
    files = {f"a/{number}.jpg": bytes([number]) * 50 for number in range(4)}
    url = pack(tmp_path / "photos", files)
    before = list_images(InputConfig(url=url))
    same = list_images(InputConfig(url=pack(tmp_path / "photos", files)))
    if pack is pack_zip:
        # The same files in a new archive keep their versions.
        pd.testing.assert_frame_equal(before, same)
    place = pin(Location(url))
    changed = files | {"a/2.jpg": b"!" * 50, "a/4.jpg": b"new"}
    pack(tmp_path / "photos", changed)
    after = list_images(InputConfig(url=url)).set_index("path")
    assert list(after.index) == sorted(changed)
    assert after["version"]["a/2.jpg"] != same.set_index("path")["version"]["a/2.jpg"]
    # A process that has cached the older archive reads the newer one.
    now = pin(Location(url))
    assert now.stamp != place.stamp and now.fs.cat_file("a/2.jpg") == b"!" * 50


class _MacInfo(zipfile.ZipInfo):
    """A name in UTF-8 without the flag that says so."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode("cp437"), self.flag_bits


def test_names_in_a_zip_are_decoded_and_use_slashes(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        # macOS does not flag UTF-8; Windows writes backslashes.
        mac, windows = _MacInfo("pêche/1.jpg".encode().decode("cp437")), zipfile.ZipInfo("pear/2.jpg")
        windows.filename, windows.create_system = "pear\\2.jpg", 0
        archive.writestr(mac, b"mac")
        archive.writestr(windows, b"windows")
        archive.writestr("/plum/3.jpg", b"plum")
    place = Location(f"zip://::{path}")
    assert list(list_images(InputConfig(url=place.url))["path"]) == ["pear/2.jpg", "plum/3.jpg", "pêche/1.jpg"]
    assert [place.fs.cat_file(name) for name in ("pear/2.jpg", "plum/3.jpg", "pêche/1.jpg")] == [
        b"windows",
        b"plum",
        b"mac",
    ]


def test_zip_of_macos_runs_without_its_junk(tmp_path: Path) -> None:
    names = ["set/a/1.jpg", "__MACOSX/set/a/._1.jpg", "set/.DS_Store", "set/b/2.jpg", "set/a/._1.jpg"]
    listing = list_input(InputConfig(url=pack_zip(tmp_path / "x", dict.fromkeys(names, b"x"))))
    assert list(listing.files["path"]) == ["set/a/1.jpg", "set/b/2.jpg"] and listing.left_out == {"hidden": 3}


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "other": b"<html>not found</html>" * 100}[kind])


@pytest.mark.parametrize("kind", ["cut", "empty", "other"])
@pytest.mark.parametrize("pack", [pack_zip, KINDS["tar.gz"]], ids=["zip", "tar.gz"])
def test_file_that_is_not_an_archive_is_refused(tmp_path: Path, files: dict[str, bytes], pack: Pack, kind: str) -> None:
    url = pack(tmp_path / "photos", files)
    damage(Path(url.partition("::")[2]), kind)
    with pytest.raises(
        (StorageError, CatalogError),
        match=r"photos.+: (expected (a \w+ archive|images)|the archive is)",
    ):
        list_images(InputConfig(url=url))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("zip://::{}/none.zip", r"cannot list zip://::\S+/none\.zip: .*No such file"),
        ("zip://photos.zip", r"expected zip://FOLDER::ARCHIVE, such as zip://::photos\.zip"),
        ("zip://none::{}/photos.zip", r"there is no such folder; check input\.url"),
        ("zip://a/1.jpg::{}/photos.zip", r"expected a folder in the archive in input\.url, found a file"),
    ],
    ids=["no archive", "no colons", "no folder", "a file"],
)
def test_wrong_path_in_an_archive_is_one_sentence(tmp_path: Path, url: str, message: str) -> None:
    pack_zip(tmp_path / "photos", {"a/1.jpg": b"x"})
    with pytest.raises((StorageError, CatalogError), match=message):
        list_images(InputConfig(url=url.format(tmp_path)))


def test_encrypted_archive_is_reported_before_anything_is_read(tmp_path: Path) -> None:
    url = pack_zip(tmp_path / "photos", {"a/1.jpg": b"x"})
    path = tmp_path / "photos.zip"
    data = bytearray(path.read_bytes())
    # The flags of the member in its own header and in the directory.
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"a/1\.jpg in this archive is encrypted; unpack it"):
        list_images(InputConfig(url=url))


def test_zip_with_unsupported_compression_is_one_sentence(tmp_path: Path) -> None:
    url = pack_zip(tmp_path / "photos", {"a/1.jpg": b"x"}, zipfile.ZIP_LZMA)
    with pytest.raises(StorageError, match=r"a/1\.jpg in this archive is compressed by another method"):
        list_images(InputConfig(url=url))


def test_file_longer_than_its_declared_size_is_not_unpacked(tmp_path: Path) -> None:
    url, path = pack_zip(tmp_path / "photos", {"a/1.jpg": bytes(10**7)}), tmp_path / "photos.zip"
    data, size = path.read_bytes(), (10**7).to_bytes(4, "little")
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, (100).to_bytes(4, "little")))
    place = Location(url)
    with pytest.raises(DamageError, match="Bad CRC-32"):
        place.fs.cat_file("a/1.jpg")


def test_damaged_file_in_an_archive_fails_alone(tmp_path: Path, files: dict[str, bytes]) -> None:
    url = pack_zip(tmp_path / "photos", files, zipfile.ZIP_STORED)
    path, name = tmp_path / "photos.zip", "apple/007.jpg"
    data = path.read_bytes()
    path.write_bytes(data.replace(files[name], files[name][:-1] + bytes([files[name][-1] ^ 1])))
    source = ImageSource(pin(Location(url)), 8, 10**6, fetch_attempts=5, concurrent_reads=4)
    partition = Partition(0, 0, (name, "apple/008.jpg"), ("any",) * 2)
    (batch,) = read_batches(partition, source, input_px=32, watch=Stopwatch(), on_asked=lambda: None)
    assert (batch.outcomes[0].status, batch.outcomes[0].attempts) == ("unreadable", 1)
    assert "the archive is damaged" in batch.outcomes[0].error and "archive" not in batch.outcomes[1].error


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 12 pictures of two classes."""
    draw(tmp_path / "in", *(f"{label}/{number}.png" for label in ("apple", "pear") for number in range(6)))
    return tmp_path / "in"


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "s3"])
@pytest.mark.parametrize("pack", [pack_zip, pack_tar], ids=["zip", "tar"])
def test_run_on_an_archive_grows_with_it(
    tmp_path: Path,
    pictures: Path,
    tiny_model: ModelConfig,
    client: Any,
    request: pytest.FixtureRequest,
    pack: Pack,
    place: str,
) -> None:
    bucket, options = request.getfixturevalue("s3_bucket") if place == "s3" else ("", {})

    def store(**more: int) -> str:
        url = pack(tmp_path / "photos", read_all(pictures), **more)
        if place == "disk":
            return url
        path = Path(url.partition("::")[2])
        request.getfixturevalue("s3_client").put_object(Bucket=bucket, Key=f"x/{path.name}", Body=path.read_bytes())
        return f"{url.partition('::')[0]}::s3://{bucket}/x/{path.name}"

    def run() -> fruitdask.RunResult:
        section = {"url": url, "storage_options": options}
        return fruitdask.run(configure(pictures, tmp_path / "out", tiny_model, input=section), client=client)

    url = store()
    first = run()
    np.testing.assert_allclose(
        first.features.compute(), compute_colours(pictures, list(first.table["path"])), rtol=1e-6
    )
    assert first.n_computed == 12 and run().n_computed == 0
    draw(pictures, "apple/3.png", seed=1)
    draw(pictures, "quince/0.png")
    url = store()
    grown = run()
    # If all files in a tar have the same time, it is unknown which of them has changed.
    assert grown.n_computed == (2 if pack is pack_zip else 13)
    np.testing.assert_allclose(
        grown.features.compute(), compute_colours(pictures, list(grown.table["path"])), rtol=1e-6
    )
    assert fruitdask.verify(tmp_path / "out").is_well


def test_archive_next_to_a_configuration_is_found(tmp_path: Path) -> None:
    pack_zip(tmp_path / "photos", {"a/1.jpg": b"x"})
    (tmp_path / "run.yaml").write_text("input: {url: 'zip://a::photos.zip'}\noutput: {url: out}\n")
    config = fruitdask.load_config(tmp_path / "run.yaml")
    assert config.input.url == f"zip://a::{tmp_path}/photos.zip"
    assert list(list_images(config.input)["path"]) == ["1.jpg"]


def configure_ec2(url: str, **options: Any) -> Config:
    cluster = {"kind": "ec2", "region": "eu-west-3", "docker_image": "fruitdask:1"}
    return fruitdask.load_config(
        {"input": {"url": url, **options}, "output": {"url": "s3://other/out"}, "cluster": cluster}
    )


def test_archive_on_this_machine_is_out_of_reach_of_instances(tmp_path: Path) -> None:
    url = pack_zip(tmp_path / "photos", {"a/1.jpg": b"x"})
    with pytest.raises(ConfigError, match=r"url zip://::\S+ is on this machine, which the machines of"):
        prepare_inputs(configure_ec2(url), RunProgress())


def test_policies_and_regions_name_the_archive_on_s3(s3_bucket: tuple[str, dict[str, Any]]) -> None:
    bucket, options = s3_bucket
    needed = list_actions(configure_ec2("zip://Test::s3://fruits/x.zip"))
    permissions = {(each.action, resource) for each in needed for resource in each.resources}
    assert ("s3:GetObject", "arn:aws:s3:::fruits/x.zip") in permissions
    config = fruitdask.load_config(
        {
            "input": {"url": f"zip://Test::s3://{bucket}/x.zip", "storage_options": options, "region": "eu-west-3"},
            "output": {"url": "o"},
        }
    )
    assert find_regions(config)["input"] == "eu-west-3"


def test_output_in_an_archive_is_refused(tmp_path: Path, pictures: Path) -> None:
    config = fruitdask.load_config({"input": {"url": str(pictures)}, "output": {"url": f"zip://out::{tmp_path}/x.zip"}})
    with pytest.raises(ConfigError, match=r"url zip://out::\S+: expected a folder, found an archive"):
        prepare_inputs(config, RunProgress())


def test_location_in_an_archive_names_its_parts() -> None:
    top, inner = Location("zip://::s3://b/x.zip", {"anon": True}), Location("tar://Test::/data/x.tar")
    assert top.child("a", "1.jpg").url == "zip://a/1.jpg::s3://b/x.zip" and top.child("a").storage_options == {
        "anon": True
    }
    assert (inner.child("a").url, inner.locate("a/1.jpg"), inner.base.url) == (
        "tar://Test/a::/data/x.tar",
        "Test/a/1.jpg",
        "/data/x.tar",
    )
    assert (top.is_archive, top.is_local, top.is_s3, top.base.is_s3, inner.base.is_local) == (
        True,
        False,
        False,
        True,
        True,
    )
    assert Location("S3://Bucket/A").url == "s3://Bucket/A" and not Location("/a::b").is_archive
    assert "secret" not in hide_secrets("zip://Test::s3://key:secret@bucket/x.zip")


def test_page_does_not_name_the_home_folder_of_an_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert show_place("zip://a::/home/someone/x.zip") == "zip://a::~/x.zip"
    assert show_place("/home/someone/x") == "~/x" and show_place("zip://::/data/x.zip") == "zip://::/data/x.zip"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("S3://B/Key", "s3://B/Key"),
        ("ZIP://A::S3://B/X.zip", "zip://A::s3://B/X.zip"),
        ("s3://b/A://c", "s3://b/A://c"),
        ("/A://b", "/A://b"),
    ],
    ids=["s3", "archive", "key", "path"],
)
def test_location_lowercases_only_protocols(url: str, expected: str) -> None:
    assert Location(url).url == expected

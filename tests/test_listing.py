"""Tests of listing: what is left out and how it is reported, links, classes and splits from paths."""

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from fruitdask.core.config import InputConfig
from fruitdask.core.listing import IMAGE_ENDINGS, Listing, _Selection, _sort_kinds, can_read_heic, format_left_out
from fruitdask.errors import CatalogError, ConfigError
from fruitdask.store.catalog import list_images, list_input

MAC = (
    "apple/1.jpg",
    "apple/._1.jpg",
    "apple/.DS_Store",
    "pear/2.jpg",
    "__MACOSX/apple/._1.jpg",
    "__MACOSX/pear/._2.jpg",
    ".DS_Store",
)


def fill(folder: Path, *names: str) -> Path:
    """Write small files; each contains its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def look(folder: Path, **options: Any) -> Listing:
    return list_input(InputConfig(url=str(folder), **options))


def link(folder: Path, **targets: Path) -> None:
    """Make links by their names, in which two underlines stand for a slash and one before the end for a point."""
    for name, target in targets.items():
        place = folder / name.replace("__", "/").replace("_jpg", ".jpg")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)


def labels(listing: Listing) -> dict[str, str]:
    return dict(zip(listing.files["path"], listing.files["label"], strict=True))


@pytest.mark.parametrize(
    ("names", "n_hidden"),
    [
        (MAC, 4),
        (("apple/1.jpg", "pear/2.jpg", ".ipynb_checkpoints/1.jpg", "apple/.ipynb_checkpoints/1-checkpoint.jpg"), 2),
        (("apple/1.jpg", "pear/2.jpg", ".thumbnails/1.jpg", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg"), 2),
        (("apple/1.jpg", "pear/2.jpg", "#recycle/3.jpg", "#snapshot/x/3.jpg", "@Recycle/4.jpg"), 3),
        (("apple/1.jpg", "pear/2.jpg", "$RECYCLE.BIN/3.jpg", "System Volume Information/4.jpg", "apple/Thumbs.db"), 3),
        (("apple/1.jpg", "pear/2.jpg", "lost+found/3.jpg", ".git/a/b/4.jpg", ".git/c.jpg", "apple/.jpg"), 3),
    ],
    ids=["macOS", "Jupyter", "Synology", "NAS", "Windows", "Unix"],
)
@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_list_input_leaves_out_hidden_files(
    tmp_path: Path, request: pytest.FixtureRequest, names: tuple[str, ...], n_hidden: int, kind: str
) -> None:
    options: dict[str, Any] = {"url": str(fill(tmp_path / ".cache" / "__MACOSX", *names))}
    if kind == "s3":
        bucket, storage_options = request.getfixturevalue("s3_bucket")
        for name in names:
            request.getfixturevalue("s3_client").put_object(Bucket=bucket, Key=f".cache/{name}", Body=b"x")
        options = {"url": f"s3://{bucket}/.cache", "storage_options": storage_options}
    listing = list_input(InputConfig(**options))
    assert labels(listing) == {"apple/1.jpg": "apple", "pear/2.jpg": "pear"}
    assert listing.left_out == {"hidden": n_hidden}
    everything = list_input(InputConfig(**options, hidden=True))
    images = sorted(name for name in names if name.endswith(".jpg"))
    assert list(everything.files["path"]) == images and everything.left_out.get("hidden") is None


def test_list_input_leaves_out_hidden_files_whatever_their_ending(tmp_path: Path) -> None:
    listing = look(fill(tmp_path, "apple/1.db", "apple/Thumbs.db", "apple/desktop.ini"), extensions=[".db", ".ini"])
    assert (list(listing.files["path"]), listing.left_out) == (["apple/1.db"], {"hidden": 2})


def test_list_input_takes_names_that_no_system_reserves(tmp_path: Path) -> None:
    names = ["...", "..dots", "a.b", "__MACOSX2", "my lost+found", "eaDir", "#1"]
    assert set(look(fill(tmp_path, *(f"{name}/x.jpg" for name in names))).files["label"]) == set(names)


def test_list_input_counts_files_left_out_by_kind(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "a/1.jpg",
        *(f"a/{n}.{'HEIX' if n % 2 else 'heix'}" for n in range(60)),
        "a/1.mov",
        "b/2.mov",
        "b/README",
    )
    fill(tmp_path, "b/IMG.2020 copy", "a/x.csv", ".x", "a/Thumbs.db")
    assert look(tmp_path).left_out == {
        ".heix": 60, ".mov": 2, ".csv": 1, "with other extensions": 1, "without an extension": 1, "hidden": 2,
    }  # fmt: skip
    assert look(tmp_path, extensions=["mov"]).left_out[".jpg"] == 1


def test_list_input_counts_many_odd_endings_together(tmp_path: Path) -> None:
    selection = _Selection((".jpg",), takes_hidden=False)
    for number in range(3_000):
        assert not selection.takes(f"x.{number}") and not selection.takes("y.raw")
    assert len(selection.left_out) <= 1_001
    kinds = _sort_kinds(selection.left_out)
    assert next(iter(kinds.items())) == (".raw", 3_000)
    assert len(kinds) == 11 and sum(kinds.values()) == 6_000


def test_format_left_out_says_what_to_install_if_that_helps() -> None:
    kinds = {".heic": 60, ".mov": 2, "hidden": 3}
    assert (
        format_left_out(kinds, is_default=True) == "60 .heic (install fruitdask[heic] to read them), 2 .mov, 3 hidden"
    )
    assert format_left_out(kinds, is_default=False) == "60 .heic, 2 .mov, 3 hidden"
    assert format_left_out({}, is_default=True) == ""


def test_list_images_says_that_all_files_are_hidden(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"found only 2 hidden; .*input\.hidden: true"):
        list_images(InputConfig(url=str(fill(tmp_path, ".a/1.jpg", ".a/2.jpg", "._1.jpg"))))


def test_list_images_lists_heic_if_it_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a/1.jpg", "a/2.HEIC", "a/3.heif")
    monkeypatch.setattr("fruitdask.core.listing.can_read_heic", lambda: True)
    assert list(look(tmp_path).files["path"]) == ["a/1.jpg", "a/2.HEIC", "a/3.heif"]
    assert list(look(tmp_path, extensions=["heic"]).files["path"]) == ["a/2.HEIC"]
    monkeypatch.setattr("fruitdask.core.listing.can_read_heic", lambda: False)
    assert look(tmp_path).left_out == {".heic": 1, ".heif": 1}
    with pytest.raises(ConfigError, match=r"extensions names \.heic, .*pip install 'fruitdask\[heic\]'"):
        look(tmp_path, extensions=[".jpg", ".heic"])
    assert isinstance(can_read_heic(), bool) and ".heic" not in IMAGE_ENDINGS


def test_real_folders_come_before_links_to_them(tmp_path: Path) -> None:
    fill(tmp_path, "pear/1.jpg", "pear/deep/2.jpg", "apple/3.jpg")
    link(
        tmp_path,
        AAA=tmp_path / "pear",
        apple__zzz=tmp_path / "pear/deep",
        apple__loop=tmp_path,
        apple__0_jpg=tmp_path / "pear/1.jpg",
    )
    listing = look(tmp_path)
    assert labels(listing) == {"apple/3.jpg": "apple", "pear/1.jpg": "pear", "pear/deep/2.jpg": "deep"}
    assert listing.left_out == {"links to files already listed": 4}


def test_links_to_other_folders_are_followed_once(tmp_path: Path) -> None:
    out = fill(tmp_path / "out", "x/1.jpg", "x/sub/2.jpg", "x/.hidden.jpg", "3.jpg", "blob")
    top = fill(tmp_path / "in", "m/4.jpg")
    link(
        top,
        b=out / "x",
        a=out / "x",
        z__5_jpg=out / "3.jpg",
        c__6_jpg=out / "3.jpg",
        c__7_jpg=out / "blob",
        n__gone_jpg=out / "no.jpg",
    )
    link(out, x__back=top)
    listing = look(top)
    assert labels(listing) == {
        "a/1.jpg": "a", "a/sub/2.jpg": "sub", "m/4.jpg": "m", "c/6.jpg": "c", "c/7.jpg": "c", "z/5.jpg": "z",
    }  # fmt: skip
    assert list(listing.files["path"]) == sorted(listing.files["path"])
    assert listing.left_out == {"hidden": 1, "links to files already listed": 2, "broken links": 1}
    assert dict(zip(listing.files["path"], listing.files["bytes"]))["c/6.jpg"] == len("3.jpg")


def test_input_that_is_itself_a_link_is_walked(tmp_path: Path) -> None:
    fill(tmp_path / "real", "a/1.jpg")
    link(tmp_path, top=tmp_path / "real")
    link(tmp_path / "real", a__loop=tmp_path / "top")
    assert labels(look(tmp_path / "top")) == {"a/1.jpg": "a"}


@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=12))
def test_any_links_list_each_file_once(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int, bool]]
) -> None:
    top = tmp_path_factory.mktemp("links")
    places = [Path(), Path("a"), Path("b"), Path("a/c"), Path("b/d"), Path("../other")]
    for number, place in enumerate(places):
        fill(top / "in" / place, f"{number}.jpg")
    for number, (where, target, is_file) in enumerate(pairs):
        name = top / "in" / places[where] / (f"{number}x.jpg" if is_file else f"{number}x")
        name.symlink_to((top / "in" / places[target] / (f"{target}.jpg" if is_file else "")).resolve())
    paths = look(top / "in").files["path"]
    names: dict[Path, list[Path]] = {}
    for path in paths:
        names.setdefault((top / "in" / path).resolve(), []).append(top / "in" / path)
    # Only a file outside of the input may be listed several times, by its links.
    assert all(len(same) == 1 or all(path.is_symlink() for path in same) for same in names.values())
    assert {f"{place / f'{number}.jpg'}" for number, place in enumerate(places[:5])} <= set(paths)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("parent", ["pear", "red", "in", "Pear-2"]),
        ("first", ["test", "train", "in", "train"]),
        (r"(?i)(pear|red|top)", ["pear", "red", "top", "Pear"]),
    ],
    ids=["parent", "first", "pattern"],
)
def test_label_from_chooses_the_class(tmp_path: Path, rule: str, expected: list[str]) -> None:
    paths = ["test/pear/1.jpg", "train/apple/red/2.jpg", "top.jpg", "train/Pear-2/3.jpg"]
    found = labels(look(fill(tmp_path / "in", *paths), label_from=rule))
    assert [found[path] for path in paths] == expected


def test_split_from_adds_a_column(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{split}/{label}/{n}.jpg" for split in ("train", "test") for label in "ab" for n in range(2)))
    rule = r"^(?P<split>train|test)/"
    files = look(tmp_path, label_from="parent", split_from=rule).files
    assert list(files.columns) == ["path", "label", "bytes", "version", "split"]
    assert list(files["split"]) == [path.split("/")[0] for path in files["path"]]
    assert str(files["split"].dtype) == "category" and set(files["label"]) == {"a", "b"}
    assert list(look(tmp_path, split_from="first").files["split"]) == list(files["split"])
    assert "split" not in look(tmp_path).files
    limited = look(tmp_path, split_from=rule, limit=2, exclude=["test/*"]).files
    assert set(limited["split"]) <= {"train"}


def test_group_from_distinguishes_turntable_series(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{label}/r{series}_{n}.jpg" for label in "ab" for series in range(2) for n in (0, 10, 9)))
    files = look(tmp_path, group_from=r"(.*/r\d+)_", split_from="first").files
    assert list(files.columns) == ["path", "label", "bytes", "version", "split", "group"]
    assert list(files["group"]) == [path.rpartition("_")[0] for path in files["path"]]
    assert list(files["group"].cat.categories) == ["a/r0", "a/r1", "b/r0", "b/r1"]


@pytest.mark.parametrize("key", ["label_from", "split_from", "group_from"])
def test_a_pattern_that_does_not_match_names_the_path(tmp_path: Path, key: str) -> None:
    fill(tmp_path, "train/a/1.jpg", "odd/2.jpg", "notes.txt")
    with pytest.raises(ConfigError, match=rf"input\.{key}: expected the group of .* in 'odd/2\.jpg'; "):
        look(tmp_path, **{key: "^train/([^/]+)/"})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("(", r"expected parent, first, or a regular expression .*; found \(, which is not valid: missing"),
        ("frist", r"expected parent, first, or a regular expression .*; found frist, which has 0 groups"),
        ("(a)(b)", r"expected parent, first, or a regular expression .*; found \(a\)\(b\), which has 2 groups"),
    ],
    ids=["no pattern", "no group", "two groups"],
)
def test_a_bad_rule_is_refused_before_anything_is_listed(rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputConfig(url="nowhere", split_from=rule)


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (
            ["n1/images/1.jpg", "n2/images/2.jpg"],
            "one class comes .* such as n1/images and n2/images; .*input.label_from",
        ),
        (
            ["test/a/1.jpg", "test/b/1.jpg", "train/a/2.jpg", "train/b/2.jpg"],
            "2 classes come .* such as test/a and train/a",
        ),
        (["a/1.jpg", "b/2.jpg", "b/3.jpg", "a-b/1.jpg"], None),
    ],
    ids=["Tiny-ImageNet", "train and test", "plain"],
)
def test_classes_of_several_folders_are_noted_unless_configured(
    tmp_path: Path, names: list[str], note: str | None
) -> None:
    notes = look(fill(tmp_path, *names)).notes
    assert len(notes) == (note is not None)
    if note is not None:
        pd.testing.assert_series_equal(pd.Series(notes).str.contains(note, regex=True), pd.Series([True]))
    assert look(tmp_path, label_from="parent").notes == ()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "{}/in/*/*.jpg",
            r"expected a folder in input\.url, found a pattern; write {}/in, which is searched at all levels",
        ),
        ("{}/in/a/1.jpg", r"expected a folder of images in input\.url, found a file; write the folder .*: {}/in/a$"),
        (
            "{}/in/photos.zip",
            r"expected a folder of images in input\.url, found an archive; write zip://::{}/in/photos\.zip",
        ),
        ("{}/in/photos.tar.gz", r"found an archive; write tar://::{}/in/photos\.tar\.gz"),
    ],
    ids=["pattern", "image", "zip", "tar"],
)
def test_list_images_says_what_to_write_instead(tmp_path: Path, url: str, message: str) -> None:
    fill(tmp_path / "in", "a/1.jpg", "photos.zip", "photos.tar.gz")
    with pytest.raises(CatalogError, match=message.format(tmp_path)):
        list_images(InputConfig(url=url.format(tmp_path)))


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("dbfs:/mnt/x", "/dbfs/mnt/x"),
        ("DBFS:/x", "/dbfs/x"),
        ("dbfs:///mnt/x", "/dbfs/mnt/x"),
        ("s3:/bucket/x", "s3://bucket/x"),
    ],
    ids=["dbfs", "capitals", "dbfs with three slashes", "one slash too few"],
)
def test_a_url_of_one_slash_gets_a_suggestion(url: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"found {url}; write {wanted}"):
        InputConfig(url=url)


def test_list_images_accepts_capital_protocols(s3_bucket: tuple[str, dict[str, Any]], s3_client: Any) -> None:
    bucket, options = s3_bucket
    s3_client.put_object(Bucket=bucket, Key="x/a/1.jpg", Body=b"x")
    assert list(list_images(InputConfig(url=f"S3://{bucket}/x", storage_options=options))["path"]) == ["a/1.jpg"]
    with pytest.raises(CatalogError, match="found a file; write the folder that it is in"):
        list_images(InputConfig(url=f"s3://{bucket}/x/a/1.jpg", storage_options=options))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have none")
def test_list_images_skips_special_files(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg")
    os.mkfifo(tmp_path / "a" / "2.jpg")
    assert list(look(tmp_path).files["path"]) == ["a/1.jpg"]

"""Erasing images from results: no trace of them remains, and everything else is as if they had never been there."""

import base64
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pandas as pd
import pytest
import sklearn.decomposition
from click.testing import CliRunner
from PIL import Image
from runs import OFF, ON, Finish, MakeConfig, configure

import fruitdask
from fruitdask import store
from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import Location, keeps_versions
from fruitdask.errors import CatalogError, ConfigError, OutputError, StoreMismatchError
from fruitdask.pipeline import budget, explore as explore_module
from fruitdask.pipeline.erase import carry_out, plan_erasure

#: A colour that no drawn fruit has.
PLANTED = (255, 0, 255)
#: Names and a class that occur nowhere else.
SECRETS = ("jane_doe/face.png", "jane_doe/second.png", "pear_1/r0_0.jpg")
PATTERNS = ("jane_doe/*", "pear_1/r0_0.jpg")


@pytest.fixture(scope="module")
def drawn(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn images, and two of one colour in a class of their own: 26 images; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("drawn") / "in"
    shutil.copytree(sample_folder, folder)
    (folder / "jane_doe").mkdir()
    for name in ("face", "second"):
        Image.new("RGB", (64, 64), PLANTED).save(folder / "jane_doe" / f"{name}.png")
    return folder


@pytest.fixture
def source(drawn: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(drawn, tmp_path / "in"))


@pytest.fixture
def make_config(tiny_model: ModelConfig, source: Path, tmp_path: Path) -> MakeConfig:
    """Make the configuration of a run of the tiny model, in partitions of 5, with the settings of a test."""
    lenient = {"images_per_partition": 5, "max_failed_fraction": 0.2}
    return lambda **sections: configure(source, tmp_path / "out", tiny_model, **{"featurize": lenient} | sections)


@pytest.fixture(params=["disk", "s3"])
def places(request: pytest.FixtureRequest, source: Path) -> dict[str, dict[str, Any]]:
    """Settings that put input and output on disk, or on S3."""
    if request.param == "disk":
        return {}
    bucket, options = request.getfixturevalue("s3_bucket")
    client = request.getfixturevalue("s3_client")
    for path in source.rglob("*.*"):
        client.upload_file(str(path), bucket, f"in/{path.relative_to(source)}")
    urls = {name: {"url": f"s3://{bucket}/{place}"} for name, place in (("input", "in"), ("output", "out"))}
    return {name: url | {"storage_options": options} for name, url in urls.items()}


def list_places(output: Location) -> Iterator[Location]:
    """List all files of a folder."""
    output.fs.invalidate_cache()
    for path in output.fs.find(output.path):
        yield output.child(path[len(output.path) + 1 :])


def read(location: Location) -> bytes:
    """Read a file."""
    return bytes(location.fs.cat_file(location.path))


def find_texts(output: Location, *texts: str) -> set[tuple[str, str]]:
    """Find texts in names and in bytes of files, and in the cells of tables."""
    found = set()
    for location in list_places(output):
        data = read(location)
        if location.url.endswith(".parquet"):
            data += pd.read_parquet(io.BytesIO(data)).to_csv().encode()
        found |= {(location.url, text) for text in texts if text.encode() in data or text in location.url}
    return found


def find_colour(output: Location) -> set[str]:
    """Find what shows the planted colour: figures, pictures in the page, arrays of pictures."""
    found = set()
    for location in list_places(output):
        pictures = [read(location)] if location.url.endswith(".png") else []
        if location.url.endswith(".html"):
            encoded = re.findall(
                rb"(?:UklGR|iVBORw0KGgo)[A-Za-z0-9+/]+", unquote_to_bytes(read(location)).replace(b"\n", b"")
            )
            pictures = [base64.b64decode(text + b"==") for text in encoded]
        if any(has_colour(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))) for picture in pictures):
            found.add(location.url.rsplit("/", 1)[-1])
    arrays = store.read_arrays(output.child("explore.zarr"))
    return found | {name for name, array in arrays.items() if array.ndim == 4 and has_colour(array)}


def has_colour(pixels: np.ndarray) -> bool:
    """Return whether any pixel has the planted colour, apart from errors of compression."""
    return bool((np.abs(pixels[..., :3].astype(int) - PLANTED).max(axis=-1) < 30).any())


@pytest.mark.slow
def test_erase_leaves_no_trace_and_the_rest_equals_a_run_without_the_images(
    make_config: MakeConfig, client: Any, places: dict[str, Any], tmp_path: Path, source: Path
) -> None:
    # Figures and page are made on this machine, wherever the output is.
    pictures = () if places else ("plots", "report")
    shown = dict.fromkeys(("explore", "quality", *pictures), ON)
    if places:
        # Each partition takes some twenty requests.
        shown["featurize"] = {"images_per_partition": 10}
    config = make_config(**places | shown)
    output = Location(config.output.url, config.output.storage_options)
    before = fruitdask.run(config, client=client)
    features, table = before.features.compute(), before.table
    # The searches for traces do find them before the erasing.
    assert {text for _, text in find_texts(output, *SECRETS, "jane_doe")} == {*SECRETS, "jane_doe"}
    assert find_colour(output) >= {"thumbnails", "means", *(("examples.png", "report.html") if pictures else ())}

    erasure = fruitdask.erase(config, PATTERNS, client=client)
    assert (erasure.n_erased, erasure.n_images, erasure.n_in_input, erasure.keeps_versions) == (3, 26, 3, False)
    assert erasure.result is not None and erasure.result.n_computed == 0
    assert find_texts(output, *SECRETS, "jane_doe") == set()
    assert find_colour(output) == set()
    if pictures:
        assert re.search("Erased since.*3 images", erasure.result.report.read(), re.DOTALL)
    is_kept = ~table["path"].isin(SECRETS).to_numpy()
    kept = erasure.result.features.compute()
    np.testing.assert_array_equal(kept, features[is_kept])
    expected = sklearn.decomposition.PCA(2, svd_solver="full").fit_transform(kept.astype(np.float64))
    np.testing.assert_allclose(erasure.result.table[["pca_1", "pca_2"]], expected, atol=1e-3)

    for name in SECRETS:
        (source / name).unlink()
    shown |= dict.fromkeys(pictures, OFF)
    fresh = fruitdask.run(make_config(**shown, output={"url": str(tmp_path / "fresh")}), client=client)
    pd.testing.assert_frame_equal(erasure.result.table, fresh.table)
    np.testing.assert_array_equal(kept, fresh.features.compute())
    assert erasure.result.quality == fresh.quality
    assert erasure.result.exploration is not None and fresh.exploration is not None
    pd.testing.assert_frame_equal(erasure.result.exploration.images, fresh.exploration.images)
    pd.testing.assert_frame_equal(erasure.result.exploration.classes, fresh.exploration.classes)
    np.testing.assert_array_equal(erasure.result.exploration.thumbnails, fresh.exploration.thumbnails)
    manifest = erasure.result.manifest
    assert manifest["counts"] == fresh.manifest["counts"] and manifest["n_images"] == 23
    assert [erased["n_images"] for erased in manifest["erasures"]] == [3] and set(manifest["erasures"][0]) == {
        "at",
        "n_images",
    }


@pytest.mark.slow
def test_store_equals_that_of_a_run_without_the_images(
    make_config: MakeConfig, finish: Finish, client: Any, tmp_path: Path, source: Path
) -> None:
    finish(make_config())
    fruitdask.erase(make_config(), PATTERNS)
    fruitdask.run(make_config(input={"exclude": PATTERNS}, output={"url": str(tmp_path / "fresh")}), client=client)
    trees = [
        {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for folder in ("features.zarr", "partitions", "pca.zarr", "results.parquet")
            for path in (tmp_path / name / folder).rglob("*")
            if path.is_file()
        }
        for name in ("out", "fresh")
    ]
    assert trees[0] == trees[1] and len(trees[0]) > 20


@pytest.mark.parametrize("way", ["deleted", "excluded"])
def test_run_does_nothing_if_erased_images_are_gone(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    finish(make_config(explore={"enabled": True}))
    erased = fruitdask.erase(make_config(explore={"enabled": True}), PATTERNS, client=client).result
    assert erased is not None
    if way == "deleted":
        for name in SECRETS:
            (source / name).unlink()
    config = make_config(explore={"enabled": True}, input={"exclude": PATTERNS} if way == "excluded" else {})
    monkeypatch.setattr(budget, "open_client", lambda config: pytest.fail("a cluster was started"))
    again = fruitdask.run(config)
    assert again.n_computed == 0 and again.manifest == erased.manifest
    assert len(fruitdask.explore(config).images) == 23
    pd.testing.assert_frame_equal(again.table, erased.table)


def test_erased_images_do_not_come_back(make_config: MakeConfig, finish: Finish, client: Any) -> None:
    class Said(RunProgress):
        lines: list[str] = []

        def say(self, message: str) -> None:
            self.lines.append(message)

    finish(make_config())
    fruitdask.erase(make_config(), PATTERNS)
    for command in (fruitdask.run, fruitdask.explore):
        with pytest.raises(StoreMismatchError, match="since 3 images were erased"):
            command(make_config(), client=client)
    again = fruitdask.run(make_config(output={"overwrite": True}), client=client, progress=Said())
    assert len(again.table) == 26 and again.manifest["erasures"] == []
    assert any("those that are still in the input will be included again" in line for line in Said.lines)


def test_erasing_twice_adds_up(make_config: MakeConfig, finish: Finish) -> None:
    finish(make_config())
    fruitdask.erase(make_config(), PATTERNS[:1])
    erasure = fruitdask.erase(make_config(input={"exclude": PATTERNS[:1]}), PATTERNS[1:])
    assert erasure.result is not None and len(erasure.result.table) == 23
    assert [erased["n_images"] for erased in erasure.result.manifest["erasures"]] == [2, 1]
    with pytest.raises(StoreMismatchError, match="since 3 images were erased"):
        fruitdask.run(make_config())


def test_erase_takes_paths_literally_and_names_what_it_does_not_find(
    make_config: MakeConfig, finish: Finish, source: Path
) -> None:
    # Browsers and scanners number files in brackets, which would match jane_doe/face1.png.
    for name in ("face[1].png", "face1.png"):
        Image.new("RGB", (40, 40), PLANTED).save(source / "jane_doe" / name)
    finish(make_config())
    patterns = ["jane_doe/face[1].png", "john_doe/*", "pear_1/r0_0.jpg", "pear_1/[x].jpg"]
    arguments = [argument for pattern in patterns for argument in ("--path", pattern)]
    shown = CliRunner().invoke(cli, ["erase", make_config().output.url, "--yes", *arguments])
    assert shown.exit_code == 0, shown.output
    assert re.search(r"erased +2 of 28 images", shown.output)
    assert re.search(r"not found +2 paths or patterns, such as john_doe/\*", shown.output)
    left = set(fruitdask.open(make_config().output.url).table["path"])
    assert "jane_doe/face1.png" in left and not left & {"jane_doe/face[1].png", "pear_1/r0_0.jpg"}


@pytest.mark.parametrize("later", ["without", "with", "renamed"])
def test_erase_where_the_input_cannot_be_listed(
    make_config: MakeConfig, finish: Finish, source: Path, tmp_path: Path, later: str
) -> None:
    before = finish(make_config())
    features, is_kept = before.features.compute(), ~before.table["path"].isin(SECRETS)
    source.rename(tmp_path / "away")
    with pytest.raises(CatalogError, match="3 of 26 .* erased, .* use fruitdask run: .* no such folder"):
        fruitdask.erase(make_config(), PATTERNS)
    assert find_texts(Location(str(tmp_path / "out")), *SECRETS) == set()
    with pytest.raises(OutputError, match="expected a finished run"):
        fruitdask.render_report(make_config())
    (tmp_path / "away").rename(source)
    if later != "with":
        for name in SECRETS:
            (source / name).unlink()
    if later == "renamed":
        (source / "pear_1" / "r0_1.jpg").rename(source / "pear_1" / "other.jpg")
    if later != "without":
        with pytest.raises(StoreMismatchError, match="since 3 images were erased"):
            fruitdask.run(make_config())
        return
    result = fruitdask.run(make_config())
    assert result.n_computed == 0
    np.testing.assert_array_equal(result.features.compute(), features[is_kept])
    # After this run, an image with another size or version counts as changed again.
    Image.new("RGB", (40, 40)).save(source / "pear_1" / "r0_1.jpg")
    with pytest.raises(StoreMismatchError, match="since 3 images were erased"):
        fruitdask.run(make_config())


def test_erase_after_the_images_were_deleted(make_config: MakeConfig, finish: Finish, source: Path) -> None:
    finish(make_config())
    for name in SECRETS:
        (source / name).unlink()
    erasure = fruitdask.erase(make_config(), PATTERNS)
    assert erasure.n_in_input == 0 and erasure.result is not None and len(erasure.result.table) == 23
    assert fruitdask.run(make_config()).n_computed == 0


def test_changed_images_are_not_mistaken_for_those_of_the_run(
    make_config: MakeConfig, finish: Finish, source: Path
) -> None:
    finish(make_config())
    Image.new("RGB", (40, 40)).save(source / "pear_1" / "r0_1.jpg")
    with pytest.raises(StoreMismatchError, match="3 of 26 images were erased"):
        fruitdask.erase(make_config(), PATTERNS)
    with pytest.raises(StoreMismatchError, match="since 3 images were erased from these results, the input"):
        fruitdask.run(make_config(input={"exclude": PATTERNS}))


def test_erase_refuses_results_that_were_changed_while_it_asked(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path
) -> None:
    finish(make_config())
    plan = plan_erasure(make_config(), PATTERNS)
    Image.new("RGB", (40, 40)).save(source / "pear_1" / "later.jpg")
    grown = fruitdask.run(make_config(), client=client)
    with pytest.raises(OutputError, match="another command has changed the .* nothing was erased"):
        carry_out(plan, client=client)
    pd.testing.assert_frame_equal(fruitdask.open(grown.output.url).table, grown.table)
    assert len(grown.table) == 27


def test_erase_from_a_run_that_is_not_complete(
    make_config: MakeConfig, finish: Finish, client: Any, source: Path, tmp_path: Path
) -> None:
    before, marks = finish(make_config()), tmp_path / "out" / "partitions"
    features, table = before.features.compute(), before.table
    (marks / "00003.parquet").unlink()
    erasure = fruitdask.erase(make_config(), PATTERNS)
    assert erasure.result is None and erasure.n_erased == 3
    assert find_texts(Location(str(tmp_path / "out")), *SECRETS) == set()
    rows = np.flatnonzero(~table["path"].isin(SECRETS))
    is_whole = [not (rows[start : start + 5] // 5 == 3).any() for start in range(0, 23, 5)]
    committed = sorted(store.list_committed(Location(str(tmp_path / "out"))))
    assert committed == list(np.flatnonzero(is_whole)) and 2 <= len(committed) < 5
    with pytest.raises(StoreMismatchError, match="since 3 images were erased"):
        fruitdask.run(make_config(), client=client)
    result = fruitdask.run(make_config(input={"exclude": PATTERNS}), client=client)
    assert 0 < result.n_computed == 23 - sum(len(rows[index * 5 :][:5]) for index in committed)
    np.testing.assert_array_equal(result.features.compute(), features[rows])
    assert [erased["n_images"] for erased in result.manifest["erasures"]] == [3]
    (tmp_path / "out" / "catalog.parquet").unlink()
    with pytest.raises(OutputError, match="the catalog of a run, found none, so nothing was erased"):
        fruitdask.erase(make_config(input={"exclude": PATTERNS}), ["pear_1/*"])


@pytest.mark.slow
def test_erase_an_image_that_failed(make_config: MakeConfig, client: Any, source: Path, tmp_path: Path) -> None:
    for name in ("jane_doe/face.png", "pear_1/r0_1.jpg"):
        (source / name).write_bytes(b"")
    config = make_config(explore={"enabled": True})
    fruitdask.run(config, client=client)
    result = fruitdask.erase(config, ["jane_doe/face.png"], client=client).result
    assert result is not None and result.manifest["counts"]["by_status"] == {"ok": 24, "unreadable": 1}
    assert find_texts(Location(str(tmp_path / "out")), "face.png") == set()
    assert list(pd.read_csv(tmp_path / "out" / "failures.csv")["path"]) == ["pear_1/r0_1.jpg"]


def test_erase_deletes_working_files_of_an_interrupted_exploration(
    make_config: MakeConfig, finish: Finish, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(make_config())
    config, output = make_config(explore=ON), Location(str(tmp_path / "out"))

    def interrupt(*_: Any, **settings: Any) -> None:
        raise KeyboardInterrupt("in this test")

    with monkeypatch.context() as patch:
        patch.setattr(explore_module, "write_tables", interrupt)
        with pytest.raises(KeyboardInterrupt, match="in this test"):
            fruitdask.run(config, client=client)
    working = {url for url, text in find_texts(output, *SECRETS) if "/exploring/" in url}
    assert working
    result = fruitdask.erase(config, PATTERNS, client=client).result
    assert find_texts(output, *SECRETS, "jane_doe", "exploring") == set()
    assert result is not None and result.exploration is not None and len(result.exploration.images) == 23


def test_leftovers_of_killed_writers_are_deleted_too(make_config: MakeConfig, finish: Finish, tmp_path: Path) -> None:
    finish(make_config())
    names = [f"results.csv.{'0a' * 16}.part", f"figures/examples.png.{'0a' * 16}.part", "notes.part"]
    (tmp_path / "out" / "figures").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text("jane_doe/face.png")
    fruitdask.erase(make_config(), PATTERNS)
    assert [(tmp_path / "out" / name).exists() for name in names] == [False, False, True]


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        (["nobody/*"], ConfigError, "none of the 26 images matches; expected paths relative to"),
        (["PEAR_1/*"], ConfigError, "none of the 26 images matches"),
        (["*"], ConfigError, "all 26 images match, so nothing would be left; delete the folder instead"),
    ],
    ids=["nothing", "another case", "everything"],
)
def test_erase_refuses_and_leaves_all_as_it_is(
    make_config: MakeConfig, finish: Finish, tmp_path: Path, patterns: list[str], error: type[Exception], message: str
) -> None:
    finish(make_config())
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        fruitdask.erase(make_config(), patterns)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_erase_needs_a_run(make_config: MakeConfig, client: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected the results of a run, found none"):
        fruitdask.erase(make_config(), PATTERNS)
    fruitdask.explore(make_config(), client=client)
    with pytest.raises(OutputError, match="found only an exploration"):
        fruitdask.erase(make_config(), PATTERNS)
    found = fruitdask.explore(make_config(input={"exclude": PATTERNS}, output={"overwrite": True}), client=client)
    assert len(found.images) == 23 and find_texts(Location(str(tmp_path / "out")), *SECRETS, "jane_doe") == set()


@pytest.mark.slow
def test_erase_reports_older_versions(
    make_config: MakeConfig, finish: Finish, s3_bucket: tuple[str, dict[str, Any]], s3_client: Any, tmp_path: Path
) -> None:
    bucket, options = s3_bucket
    config = make_config(output={"url": f"s3://{bucket}/out", "storage_options": options})
    finish(make_config())
    for path in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        s3_client.upload_file(str(path), bucket, path.relative_to(tmp_path).as_posix())
    # Versioning starts only now, because moto lists folders of deleted objects that have versions; S3 does not.
    s3_client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})
    assert fruitdask.erase(config, PATTERNS).keeps_versions
    s3_client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    assert keeps_versions(Location(config.output.url, options))


@pytest.mark.parametrize(
    ("arguments", "answer", "exit_code"),
    [(["--yes"], "", 0), ([], "y\n", 0), ([], "n\n", 1), ([], "", 1)],
    ids=["--yes", "yes", "no", "no answer"],
)
def test_command_asks_and_prints_no_names(
    make_config: MakeConfig, finish: Finish, tmp_path: Path, arguments: list[str], answer: str, exit_code: int
) -> None:
    finish(make_config())
    (tmp_path / "config.json").write_text(make_config().model_dump_json())
    paths = [argument for pattern in PATTERNS for argument in ("--path", pattern)]
    done = CliRunner().invoke(cli, ["erase", str(tmp_path / "config.json"), *paths, *arguments], input=answer)
    assert done.exit_code == exit_code, done.output
    assert ("Erase 3 of 26 images from" in done.stdout) == (arguments == [])
    texts = ["computed again from the 23 remaining images", "3 of them are still there"]
    assert [text in done.stdout for text in texts] == [exit_code == 0] * 2
    assert not any(name in done.output for name in (*SECRETS, *PATTERNS, "jane_doe"))
    assert (find_texts(Location(str(tmp_path / "out")), "jane_doe") == set()) == (exit_code == 0)


#: Starts one process after another to erase the images, and kills each of them one change of a file later than the one
#: before. Each time, either the run is as it was, or the next command finishes the erasure.
_KILLED = """
import json, os, shutil, sys
from pathlib import Path
import numpy as np, pyarrow.dataset, zarr
import fruitdask
from fruitdask import store
from fruitdask.pipeline.erase import plan_erasure, remove_images
from fruitdask.core.storage import Location

config = fruitdask.load_config(sys.argv[1])
patterns, every = sys.argv[3].split(), int(sys.argv[4])
base, out = Path(sys.argv[2]), Path(config.output.url)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copyfile"}


def call(function):
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def erase_and_die(step):
    steps = iter(range(step))

    def count(event, arguments):
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or is_write) and next(steps, None) is None:
            os._exit(9)

    plan = plan_erasure(config, patterns)
    sys.addaudithook(count)
    remove_images(plan)


def look():
    output = Location(str(out))
    store.finish_erasing(output)
    manifest = store.read_run(output)
    group = store.open_store(output)
    outcomes = list(store.read_outcomes(output, sorted(store.list_committed(output)), partitions_at_once=10**6))[0]
    features = np.nan_to_num(group["features"][:]).tolist()
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.suffix != ".part")
    seen = [manifest.status, manifest.n_images, features, group["status"][:].tolist(), outcomes.values.tolist(), names]
    Path(sys.argv[2] + ".json").write_text(json.dumps(seen))


def look_at(prepare):
    shutil.rmtree(out)
    shutil.copytree(base, out)
    code = call(prepare)
    assert call(look) == 0
    return code, json.loads(Path(sys.argv[2] + ".json").read_text())


before = look_at(lambda: None)[1]
code, after = look_at(lambda: erase_and_die(10**6))
assert code == 0 and before[:2] == ["complete", 26] and after[:2] == ["erased", 23]
found, step, code = [], 0, 9
while code == 9:
    code, seen = look_at(lambda: erase_and_die(step))
    assert seen == before or seen == after, (step, seen)
    found.append(seen == after)
    step += every
assert code == 0 and found == sorted(found)
print(len(found), sum(found))
"""


@pytest.mark.slow
def test_erase_killed_at_any_step_has_no_effect_or_is_finished(
    make_config: MakeConfig, finish: Finish, tmp_path: Path
) -> None:
    finish(make_config(explore={"enabled": True}))
    shutil.copytree(tmp_path / "out", tmp_path / "base")
    (tmp_path / "config.json").write_text(make_config().model_dump_json())
    command = [str(tmp_path / "config.json"), str(tmp_path / "base"), " ".join(PATTERNS), "16"]
    done = subprocess.run([sys.executable, "-c", _KILLED, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_tries, n_finished = map(int, done.stdout.split())
    assert n_finished > 4 and n_tries - n_finished > 4


def test_erase_from_a_limited_run_adds_no_other_image(make_config: MakeConfig, finish: Finish) -> None:
    limited = {"limit": 14}
    before = finish(make_config(input=limited)).table
    path = before["path"][0]
    erasure = fruitdask.erase(make_config(input=limited), [path])
    assert erasure.result is not None and list(erasure.result.table["path"]) == list(before["path"][1:])
    assert fruitdask.run(make_config(input=limited | {"exclude": [path]})).n_computed == 0


def test_excluding_everything_is_one_sentence(make_config: MakeConfig) -> None:
    with pytest.raises(CatalogError, match="other than those that input.exclude names"):
        fruitdask.list_images(make_config(input={"exclude": ["*"]}).input)

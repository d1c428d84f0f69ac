"""Similar images: search results for images of the run and for others, and how they are shown."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from runs import ON, Finish, break_image, configure, draw
from sklearn.neighbors import NearestNeighbors

import fruitdask
from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig
from fruitdask.errors import ConfigError, ImageError, StoreMismatchError
from fruitdask.pipeline import similar as similar_module


@pytest.fixture
def result(sample_folder: Path, tiny_model: ModelConfig, finish: Finish, tmp_path: Path) -> fruitdask.RunResult:
    """A finished run on the drawn images."""
    return finish(configure(sample_folder, tmp_path / "out", tiny_model))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_similar_finds_the_neighbours_of_images_of_the_run(result: fruitdask.RunResult, metric: str) -> None:
    table, features = result.table, result.features.compute()
    found = result.similar([3, table["path"][20]], k=4, metric=metric)
    index = NearestNeighbors(n_neighbors=5, metric=metric, algorithm="brute").fit(features.astype(np.float64))
    distances, rows = index.kneighbors(features[[3, 20]].astype(np.float64))
    assert list(found.columns) == ["query", "rank", "path", "label", "distance"]
    assert found["query"].tolist() == [table["path"][3]] * 4 + [table["path"][20]] * 4
    assert found["rank"].tolist() == [1, 2, 3, 4] * 2
    assert found["path"].tolist() == table["path"][rows[:, 1:].ravel()].tolist()
    assert found["label"].tolist() == table["label"][rows[:, 1:].ravel()].tolist()
    np.testing.assert_allclose(found["distance"], distances[:, 1:].ravel(), rtol=1e-5, atol=1e-9)


def test_similar_finds_photographs_of_any_kind(
    result: fruitdask.RunResult, sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = result.table["path"][7]
    copied = tmp_path / "copy.jpg"
    copied.write_bytes((sample_folder / path).read_bytes())
    with Image.open(copied) as image:
        pixels = np.asarray(image)
        given = [copied, copied.read_bytes(), image, pixels]
        found = result.similar(given, k=1)
    assert found["query"].tolist() == [str(copied), "image 2", str(copied), "image 4"]
    assert found["path"].tolist() == [path] * 4 and (found["distance"] < 1e-6).all()
    # By its path in the input, the same photograph is the image of the run, which is not its own neighbour.
    inside = result.similar(sample_folder / path, k=1)
    assert inside["query"].tolist() == [path] and inside["path"][0] != path
    monkeypatch.chdir(sample_folder.parent)
    assert result.similar(f"{sample_folder.name}/{path}", k=1).equals(inside)


def test_similar_finds_at_most_the_images_of_the_run(tiny_model: ModelConfig, finish: Finish, tmp_path: Path) -> None:
    draw(tmp_path / "in", *(f"fig/{number}.png" for number in range(4)))
    break_image(tmp_path / "in" / "fig" / "2.png")
    config = configure(
        tmp_path / "in",
        tmp_path / "out",
        tiny_model,
        featurize={"max_failed_fraction": 1},
        input={"split_from": "first"},
    )
    result = finish(config)
    found = result.similar("fig/0.png", k=9)
    # Room for so many rows would take petabytes.
    assert result.similar("fig/0.png", k=10**15).equals(found)
    assert sorted(found["path"]) == ["fig/1.png", "fig/3.png"] and found["rank"].tolist() == [1, 2]
    assert list(found.columns) == ["query", "rank", "path", "label", "split", "distance"]
    with pytest.raises(ImageError, match="fig/2.png: this image .* has no features .unreadable."):
        fruitdask.open(str(tmp_path / "out")).similar("fig/2.png")


def test_similar_refuses_what_it_cannot_find(result: fruitdask.RunResult, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a row of the run from 0 to 23, found 24"):
        result.similar(24)
    with pytest.raises(ConfigError, match="expected cosine or euclidean, found manhattan"):
        result.similar(0, metric="manhattan")
    with pytest.raises(ConfigError, match="expected at least 1 image to find, found 0"):
        result.similar(0, k=0)
    with pytest.raises(ConfigError, match="image 1: expected a path, a URL, .* found float"):
        result.similar([1.5])
    with pytest.raises(ImageError, match="nope.jpg: expected an image of the run, .* found neither"):
        result.similar("nope.jpg")
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(ImageError, match="text.jpg: expected a photograph, found one .*.unreadable.: "):
        result.similar(tmp_path / "text.jpg")


def test_similar_refuses_another_network(result: fruitdask.RunResult, sample_folder: Path, tmp_path: Path) -> None:
    photograph = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(StoreMismatchError, match="found others: model.preprocessing was none, is tf"):
        result.similar(photograph, overrides=["model.preprocessing=tf"])
    with pytest.raises(StoreMismatchError, match="featurize.max_pixels was 50000000, is 99"):
        result.similar(photograph, overrides=["featurize.max_pixels=99"])


def test_similar_searches_a_large_store_on_a_cluster(
    result: fruitdask.RunResult, client: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = result.similar([0, 1, 2], k=5)
    monkeypatch.setattr(similar_module, "LOCAL_REDUCE_BYTES", 0)
    pd.testing.assert_frame_equal(result.similar([0, 1, 2], k=5, client=client), expected)


def read_pictures(page: str) -> list[bytes]:
    """Read the files of the pictures of a page."""
    return [base64.b64decode(each) for each in re.findall(r'<img src="data:image/webp;base64,([^"]+)"', page)]


def test_command_prints_a_table_or_json_and_writes_a_page(result: fruitdask.RunResult, tmp_path: Path) -> None:
    output, path = result.output.url, result.table["path"][5]
    expected = result.similar(path, k=3)
    done = CliRunner().invoke(cli, ["similar", output, path, "-k", "3", "--html", str(tmp_path / "s.html")])
    assert done.exit_code == 0, done.output
    assert all(each in done.stdout for each in expected["path"]) and "distance" in done.stdout
    page = (tmp_path / "s.html").read_text("utf-8")
    assert all(each in page for each in expected["path"])
    pictures = read_pictures(page)
    assert [Image.open(io.BytesIO(picture)).size for picture in pictures] == [(192, 192)] * 4
    done = CliRunner().invoke(cli, ["similar", output, path, "-k", "3", "--json"])
    assert [row["path"] for row in json.loads(done.stdout)] == expected["path"].tolist()
    done = CliRunner().invoke(cli, ["similar", str(tmp_path), path])
    assert done.exit_code == 2 and "expected the results of a run, found none" in done.stderr


def test_page_holds_no_metadata(result: fruitdask.RunResult, sample_folder: Path, tmp_path: Path) -> None:
    exif, photograph = Image.Exif(), tmp_path / "exif.jpg"
    exif[0x0110] = "CAMERA-7"
    Image.open(sample_folder / result.table["path"][0]).save(photograph, exif=exif)
    assert b"CAMERA-7" in photograph.read_bytes()
    queries = similar_module.list_queries(result, photograph)
    table = similar_module.find_similar(result, queries, k=1, metric="cosine")
    pictures = read_pictures(similar_module.render_similar(result, queries, table))
    assert len(pictures) == 2 and not any(b"CAMERA-7" in picture or b"EXIF" in picture for picture in pictures)


def test_page_shows_thumbnails_if_the_input_is_gone_and_escapes_names(
    tiny_model: ModelConfig, finish: Finish, tmp_path: Path
) -> None:
    name = "fig/<b>&x.png"
    draw(tmp_path / "in", name, *(f"fig/{number}.png" for number in range(3)))
    finish(configure(tmp_path / "in", tmp_path / "out", tiny_model, explore=ON))
    (tmp_path / "in").rename(tmp_path / "gone")
    result = fruitdask.open(str(tmp_path / "out"))
    queries = similar_module.list_queries(result, name)
    table = similar_module.find_similar(result, queries, k=3, metric="cosine")
    page = similar_module.render_similar(result, queries, table)
    assert len(read_pictures(page)) == 4 and "fig/&lt;b&gt;&amp;x.png" in page and "<b>&x" not in page
    (tmp_path / "out" / "explore.json").unlink()
    page = similar_module.render_similar(result, queries, table)
    assert len(read_pictures(page)) == 0 and page.count("no picture") == 4 and "fig/1.png" in page

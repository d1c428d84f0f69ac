"""The page: its text, what it leaves out, and that it neither loads nor sends anything."""

import io
import json
import re
from base64 import b64decode, b64encode
from dataclasses import replace
from functools import cache
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import make_blobs

from fruitdask import report
from fruitdask.core.config import Config, load_config
from fruitdask.core.escaping import read_csv
from fruitdask.core.sample import CLASS_NAMES, render_fruit
from fruitdask.core.storage import Location
from fruitdask.report.maps import choose_axes, sample_points
from fruitdask.report.page import ReportData, render_page
from fruitdask.report.sections import choose_title, describe_duplicates
from fruitdask.report.sections.record import describe_performance
from fruitdask.report.thumbnails import Thumbnails
from fruitdask.store.exploration import Exploration

#: Names that do harm unless they are escaped.
HOSTILE = '<img src=x onerror="window.harmed=1">'
HOSTILE_END = "</script><script>window.harmed=2</script>"
THUMBNAIL_PX = 64


@cache
def draw_fruits() -> npt.NDArray[np.uint8]:
    """Draw each fruit of the sample from five sides."""
    fruits = [
        render_fruit(name, angle_degrees=72 * turn, size_px=THUMBNAIL_PX) for name in CLASS_NAMES for turn in range(5)
    ]
    return np.stack([np.asarray(fruit) for fruit in fruits]).reshape(len(CLASS_NAMES), 5, THUMBNAIL_PX, THUMBNAIL_PX, 3)


def make_report_data(
    n_rows: int = 60,
    n_classes: int = 3,
    *,
    names: dict[int, str] | None = None,
    n_failed: int = 2,
    n_thumbnails: int = 2_000,
    **report: Any,
) -> ReportData:
    """Make the results of a run on drawn fruits with clustered features; `names` replaces labels by their number."""
    config = make_config(**report)
    labels = [(names or {}).get(k, f"fruit_{k:03d}") for k in range(n_classes)]
    coordinates, classes = make_blobs(n_rows, n_features=4, centers=n_classes, cluster_std=0.9, random_state=0)
    order = np.argsort(classes, kind="stable")
    coordinates, classes = coordinates[order], classes[order]
    results = pd.DataFrame({"label": np.array(labels, object)[classes]})
    results.insert(0, "path", [f"{label}/r0_{row}.jpg" for row, label in enumerate(results["label"])])
    # Failed images are spread over the table.
    failed = np.linspace(1, n_rows - 1, n_failed).astype(int)
    results["status"] = np.where(np.isin(np.arange(n_rows), failed), "unreadable", "ok")
    columns = ["pca_1", "pca_2", "tsne_1", "tsne_2"]
    results[columns] = np.where((results["status"] == "ok").to_numpy()[:, None], coordinates, np.nan)
    results = results.astype({column: np.float32 for column in columns}).sort_values("path", ignore_index=True)
    return ReportData(
        config=config,
        manifest=make_manifest(config, results),
        exploration=make_exploration(results, n_thumbnails=n_thumbnails),
        results=results,
        failures=results.loc[results["status"] != "ok", ["path", "label", "status"]].assign(
            error="the image file is truncated", attempts=1
        ),
        quality=make_quality(sorted(labels)),
    )


def make_config(**report: Any) -> Config:
    """Make the configuration of a run."""
    return load_config({"input": {"url": "s3://fruits/Test"}, "output": {"url": "s3://fruits/run"}, "report": report})


def make_manifest(config: Config, results: pd.DataFrame) -> dict[str, Any]:
    """Make a manifest like that of a run."""
    is_ok = results["status"] == "ok"
    by_class = is_ok.groupby(results["label"]).agg(["sum", "size"])
    return {
        "fruitdask": "0.1.0",
        "status": "complete",
        "started": "2026-11-23T07:00:00+00:00",
        "finished": "2026-11-23T07:01:05+00:00",
        "fingerprint": {"catalog": "ab12", "model": "cd34", "decoding": "exact, max_pixels 50000000"},
        "n_images": len(results),
        "n_computed": len(results),
        "model": {"name": "MobileNetV2", "engine": "tensorflow", "input_px": 224, "n_features": 1280, "sha256": "ef"},
        "cluster": {"kind": "local", "n_workers": 2, "n_threads": 4},
        "versions": {"python": "3.11.9", "dask": "2026.8.0"},
        "config": json.loads(config.model_dump_json()),
        "seconds": {
            "list": 0.1,
            "start": 6.5,
            "featurize": 20.0,
            "reduce": 2.0,
            "total": 30.0,
            "worker": {"fetch": 1.5},
        },
        "counts": {
            "by_status": results["status"].value_counts().to_dict(),
            "by_class": {label: {"ok": int(ok), "failed": int(n - ok)} for label, ok, n in by_class.itertuples()},
        },
        "pca": {"n_components": 2, "explained_variance_ratio": [0.31, 0.22]},
    }


def make_exploration(results: pd.DataFrame, *, n_thumbnails: int) -> Exploration:
    """Make the results of an exploration of drawn fruits."""
    n, rng = len(results), np.random.default_rng(0)
    labels = sorted(results["label"].unique())
    codes = pd.Categorical(results["label"], categories=labels).codes
    rows = np.linspace(0, n - 1, min(n, n_thumbnails)).astype(np.int64)
    fruits = draw_fruits()
    images = results[["path", "label", "status"]].assign(
        bytes=rng.integers(4_000, 40_000, n),
        width_px=pd.array(rng.integers(90, 300, n), "Int32"),
        height_px=pd.array(rng.integers(90, 300, n), "Int32"),
        duplicate_group=pd.array([pd.NA] * n, "Int64"),
        near_duplicate_group=pd.array([pd.NA] * n, "Int64"),
    )
    # Two copies within the first class, and a pair that looks alike across the first and the last class.
    images.loc[images.index[:2], "duplicate_group"] = 0
    images.loc[images.index[[min(2, n - 1), -1]], "near_duplicate_group"] = 0
    return Exploration(
        images=images,
        classes=make_classes(images, labels),
        thumbnail_rows=rows,
        thumbnails=fruits[codes[rows] % len(fruits), rows % 5],
        means=np.stack([fruits[k % len(fruits)].mean(axis=0).astype(np.uint8) for k in range(len(labels))]),
        summary={
            "fruitdask": "0.1.0",
            "fingerprint": {"catalog": "ab12"},
            "input_px": 224,
            "scale": "signed",
            "n_images": n,
            "n_ok": int((results["status"] == "ok").sum()),
            "near_duplicate_bits": 2,
            "duplicates": {"n_groups": 1, "n_images": 2, "n_groups_across_classes": 0},
            "near_duplicates": {"n_groups": 1, "n_images": 2, "n_groups_across_classes": int(len(labels) > 1)},
            "metadata": {"exif": 5, "gps": 1, "serial": 0, "name": 0},
            "finished": "2026-11-23T07:00:30+00:00",
            "seconds": {"total": 3.0},
        },
    )


def make_classes(images: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Make the table of the classes."""
    groups = images.groupby("label")
    classes = pd.DataFrame(
        {
            "n_images": groups.size(),
            "n_ok": groups["status"].agg(lambda status: (status == "ok").sum()),
            "bytes_total": groups["bytes"].sum(),
            "bytes_median": groups["bytes"].median(),
            "width_px_median": groups["width_px"].median().astype(float),
            "height_px_median": groups["height_px"].median().astype(float),
            "most_typical": groups["path"].first(),
            "least_typical": groups["path"].last(),
        }
    ).loc[labels]
    difference = np.linspace(0.05, 0.6, len(labels))
    return classes.assign(
        **{f"mean_{colour}": 200.0 for colour in ("red", "green", "blue")},
        palette="#f0f0f0 0.612, #b03020 0.203, #208030 0.085",
        mean_squared_difference=difference,
        standard_error=0.01,
        pair_q05=difference / 2,
        pair_q50=difference,
        pair_q95=difference * 1.6,
        n_duplicates=0,
        n_near_duplicates=0,
        **{f"n_{kind}": 0 for kind in ("exif", "gps", "serial", "name")},
    )


def make_quality(labels: list[str]) -> dict[str, Any]:
    """Make the quality of good features, which sometimes confuse each class with the next one."""
    n = len(labels)
    share = 0.94 * np.eye(n) + 0.06 * np.roll(np.eye(n), 1, axis=1)
    ratio = 0.3 * 0.75 ** np.arange(40)
    return {
        "n_images": 40,
        "n_images_with_features": 58,
        "metric": "euclidean",
        "silhouette": {"mean": 0.31, "by_class": {label: 0.5 - 0.7 * k / n for k, label in enumerate(labels)}},
        "neighbors": {
            "k": 5,
            "agreement": 0.94,
            "by_class": dict.fromkeys(labels, 0.94),
            "confusion": {"labels": labels, "share": share.tolist()},
        },
        "explained_variance": {
            "ratio": (ratio / ratio.sum() * 0.97).tolist(),
            "n_components": {"0.8": 6, "0.9": 9, "0.95": 14, "0.99": None},
        },
    }


class Outline(HTMLParser):
    """The parts of a page that tests check."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        # The visible text of the page, on one line.
        self.text = " ".join(self.text.replace("\u202f", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag in ("dd", "dt", "li", "p", "td", "th"):
            self.text += " "

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.texts[tag][-1] += data
        self.text += data * ("main" in self._open)

    def find(self, tag: str) -> list[dict[str, str | None]]:
        """List the attributes of all tags of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html() -> str:
    """The page of a run with every section, and with a class whose name must be escaped."""
    data = make_report_data(60, 4, names={1: HOSTILE, 2: HOSTILE_END})
    assert data.manifest is not None
    more = {"regions": {"input": "eu-central-1", "workers": "eu-central-1"}, "cost": {"total_usd": 0.12}}
    return render_page(replace(data, manifest=data.manifest | more))


@pytest.fixture(scope="module")
def outline(html: str) -> Outline:
    """The same page, parsed."""
    return Outline(html)


ALL = ["summary", "maps", "classes", "examples", "quality", "data", "record"]
NO_FAILURES = pd.DataFrame(columns=["path", "label", "status", "error", "attempts"])


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        ({}, []),
        ({"exploration": None}, ["examples"]),
        ({"exploration": None, "failures": NO_FAILURES}, ["examples", "data"]),
        ({"quality": None}, ["quality"]),
        ({"results": None}, ["maps"]),
        ({"manifest": None, "results": None, "quality": None}, ["quality", "maps"]),
        (
            {"manifest": None, "exploration": None, "results": None, "quality": None, "failures": NO_FAILURES},
            ["maps", "classes", "examples", "quality", "data"],
        ),
    ],
    ids=["all", "no exploration", "no failures either", "no quality", "no results", "explored only", "nothing"],
)
def test_render_page_shows_the_sections_it_has_data_for(left_out: dict[str, Any], missing: list[str]) -> None:
    outline = Outline(render_page(replace(make_report_data(), **left_out)))
    expected = [name for name in ALL if name not in missing]
    assert [section["id"] for section in outline.find("section")] == expected
    links = [link["href"] for link in outline.find("a") if "class" not in link]
    assert links[: len(expected)] == [f"#{name}" for name in expected]
    assert ("maps" in expected) == any(script.get("id") == "maps-data" for script in outline.find("script"))


def test_render_page_is_accessible(outline: Outline) -> None:
    assert outline.find("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(image.get("alt") for image in outline.find("img"))
    assert len(outline.find("caption")) == len(outline.find("table"))
    assert {cell.get("scope") for cell in outline.find("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [attributes[key] for _, attributes in outline.tags for key in ("aria-labelledby",) if key in attributes]
    addresses = [
        link["href"] or ""
        for tag in ("a", "use")
        for link in outline.find(tag)
        if {"href", "download"} & {*link} == {"href"}
    ]
    linked = [address.removeprefix("#") for address in addresses]
    assert {*named, *linked} <= set(ids)
    assert all(button.get("type") == "button" for button in outline.find("button"))
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in outline.tags}


def test_render_page_has_no_external_links(html: str, outline: Outline) -> None:
    addresses = [
        attributes[key] or ""
        for _, attributes in outline.tags
        for key in ("src", "href", "xlink:href", "srcset", "action", "data")
        if key in attributes
    ]
    assert {
        re.match(r"#|data:image/(webp|png);base64,|data:text/csv;base64,|data:,$", address) is not None
        for address in addresses
    } == {True}
    styles = "".join(outline.texts["style"])
    assert "@import" not in styles and "url(" not in styles


def test_render_page_allows_only_its_own_scripts(html: str, outline: Outline) -> None:
    policy = next(meta["content"] or "" for meta in outline.find("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digests = [b64encode(sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.search(r"script-src ([^;]*);", policy)[1] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert len(scripts) == 2 and len(outline.find("script")) == 3
    assert not [key for _, attributes in outline.tags for key in attributes if key.startswith("on")]


def test_render_page_escapes_what_comes_from_files(html: str, outline: Outline) -> None:
    assert HOSTILE not in html and HOSTILE_END not in html
    assert {HOSTILE, HOSTILE_END} <= {text.strip() for text in outline.texts["th"]}
    payload = json.loads(outline.texts["script"][0])
    assert payload["labels"] == sorted(["fruit_000", HOSTILE, HOSTILE_END, "fruit_003"])
    assert all(image["src"].startswith("data:image/") for image in outline.find("img"))


def test_render_page_describes_the_run_and_its_input(outline: Outline) -> None:
    for sentence in (
        "The network MobileNetV2 turned 58 of 60 images of 4 classes into 1,280 numbers each, in 30 s in total, ",
        "on a local cluster of 2 workers with 4 threads.",
        "2 images (3.3 %) could not be used; the reasons are below.",
        "Of the 5 images that look most like an image to the network, 94 % show the same class as the image itself",
        "2 images are exact copies of one another.",
        "1 image says where it was taken.",
        "Images from s3://fruits/Test",
        "Finished 23 November 2026, 07:01 UTC",
        "99 % of the variance more than were computed",
        "1 group spans more than one class",
        "unreadable 2 The file is not an image that can be decoded",
        "Turn images into features 20 s 3",
        "Photographs from eu-central-1 (Frankfurt, Germany)",
        "total usd 0.12",
        "camera data (EXIF) 5 8.3 %",
        "fruitdask run config.yaml",
    ):
        assert sentence in outline.text


def test_render_page_of_an_exploration_mentions_no_network() -> None:
    data = replace(make_report_data(), manifest=None, results=None, quality=None)
    text = Outline(render_page(data)).text
    assert "60 images of 3 classes were explored; no network has processed them yet." in text
    assert "fruitdask explore config.yaml" in text and "MobileNetV2 turned" not in text


@pytest.mark.slow
def test_render_page_warns_about_neighbours_of_one_series() -> None:
    data = make_report_data(60, 3)
    assert data.exploration is not None
    near = {"n_groups": 10, "n_images": 30, "n_groups_across_classes": 0}
    exploration = replace(data.exploration, summary=data.exploration.summary | {"near_duplicates": near})
    warning = "But 50 % of the images look nearly the same as another one"
    assert warning in Outline(render_page(replace(data, exploration=exploration))).text
    assert "look nearly the same as another one" not in Outline(render_page(data)).text


def test_describe_performance_gives_rates_only_to_stages_that_grow_with_images() -> None:
    seconds = {"list": 0.5, "start": 4.0, "featurize": 2.0, "total": 8.0, "worker": {"load": 1.0, "decode": 0.5}}
    view = describe_performance({"seconds": seconds, "n_computed": 10}, n_images=40)
    assert view is not None
    assert [row["rate"] for row in view["stages"]] == [80, None, 5, 1.25]
    assert [row["rate"] for row in view["worker_stages"]] == [None, 20]


@pytest.mark.parametrize(
    ("agreement", "chance", "verdict"),
    [
        (0.94, 0.34, "tells these classes apart well, without"),
        (0.94, 0.92, "does not tell these classes apart well. By chance it would be 92 %"),
        (0.7, 0.34, "tells most of these classes apart"),
        (0.7, 0.66, "does not tell these classes apart well. By chance it would be 66 %"),
    ],
    ids=["well", "one large class", "most", "few"],
)
def test_page_compares_agreement_with_chance(agreement: float, chance: float, verdict: str) -> None:
    data = make_report_data(60, 3)
    assert data.quality is not None
    neighbors = data.quality["neighbors"] | {"agreement": agreement, "chance": chance}
    assert verdict in Outline(render_page(replace(data, quality=data.quality | {"neighbors": neighbors}))).text


def test_page_does_not_praise_neighbours_that_are_unknown() -> None:
    data = make_report_data(60, 3)
    assert data.quality is not None
    nobody = {"labels": [], "share": []}
    neighbors = data.quality["neighbors"] | {"k": 0, "agreement": None, "chance": None, "confusion": nobody}
    text = Outline(render_page(replace(data, quality=data.quality | {"neighbors": neighbors}))).text
    assert "share its class is unknown" in text and "No image has a neighbour of another class" not in text


def test_render_page_has_no_secrets() -> None:
    config = load_config(
        {
            "input": {
                "url": "https://jane:hunter2@example.org/fruits?sig=s3cr3t",
                "storage_options": {"key": "AKIA-key"},
            },
            "output": {"url": "s3://fruits/run", "storage_options": {"secret": "AKIA-secret"}},
        }
    )
    data = replace(make_report_data(), config=config)
    for manifest in (None, {**(data.manifest or {}), "config": json.loads(config.model_dump_json())}):
        html = render_page(replace(data, manifest=manifest, exploration=None, results=None))
        assert not [word for word in ("hunter2", "s3cr3t", "jane", "AKIA") if word in html]
        assert "https://***@example.org/fruits?***" in html


def test_render_page_lists_the_first_failures() -> None:
    data = make_report_data(200, 3, n_failed=60)
    failures = data.failures.assign(status=["missing"] * 5 + ["unreadable"] * 55)
    outline = Outline(render_page(replace(data, failures=failures, exploration=None, quality=None)))
    assert "unreadable 55" in outline.text and "missing 5" in outline.text
    assert "All 60 are in the table failures.csv beside this page." in outline.text
    listed = [path for path in failures["path"] if path in {text.strip() for text in outline.texts["th"]}]
    assert listed == list(failures["path"][5:55])


def test_render_page_accepts_a_class_without_any_good_image() -> None:
    data = make_report_data(60, 3)
    assert data.exploration is not None and data.quality is not None
    classes, quality = data.exploration.classes.copy(), json.loads(json.dumps(data.quality))
    numbers = classes.columns[classes.dtypes == float]
    classes.loc["fruit_001", numbers] = np.nan
    classes.loc["fruit_001", ["palette", "most_typical", "least_typical"]] = ""
    quality["silhouette"]["by_class"]["fruit_001"] = None
    exploration = replace(data.exploration, classes=classes)
    outline = Outline(render_page(replace(data, exploration=exploration, quality=quality)))
    assert "nan" not in outline.text.lower() and "None" not in outline.text
    assert re.search(r"fruit_001 20 \d 94 % – – –", outline.text)


@pytest.mark.slow
def test_render_page_shows_each_class_of_a_group_and_lists_all_groups() -> None:
    data = make_report_data(900, 3, n_thumbnails=40)
    assert data.exploration is not None
    images = data.exploration.images.copy()
    # One group across classes, of which almost all are in one class; and 299 pairs.
    order = images.sort_values("label", kind="stable").index
    images.loc[order, "near_duplicate_group"] = np.repeat(range(450), 2)
    big = [*order[:302], *order[-1:]]
    images.loc[big, "near_duplicate_group"] = 1_000
    n_groups = images["near_duplicate_group"].nunique()
    near = {"n_groups": n_groups, "n_images": 900, "n_groups_across_classes": 2}
    summary = data.exploration.summary | {"near_duplicates": near}
    exploration = replace(data.exploration, images=images, summary=summary)
    view = describe_duplicates(exploration, Thumbnails(exploration, max_bytes=100_000))[1]
    largest = next(group for group in view["groups"] if group["n_images"] == 303)
    assert {each["label"] for each in largest["pictures"]} == set(largest["labels"]) and len(largest["labels"]) > 1
    assert len(largest["pictures"]) == 12 and sum(largest["labels"].values()) == 303
    assert len(view["groups"]) + len(view["more_groups"]) + view["n_unshown"] == n_groups
    listed = read_csv(b64decode(view["csv"]), {"path": str, "label": str})
    assert set(listed["path"]) == set(images["path"]) and view["n_listed"] == 900
    text = Outline(render_page(replace(data, exploration=exploration))).text
    assert f"The first 12 of {n_groups} groups" in text and "12 of 303 images are shown" in text


@pytest.mark.parametrize("n_rows", [1, 2])
def test_render_page_accepts_very_few_images(n_rows: int) -> None:
    text = Outline(render_page(make_report_data(n_rows, 1, n_failed=0))).text
    assert f"{n_rows} image" in text


@pytest.mark.slow
def test_render_page_stays_small_whatever_the_number_of_images() -> None:
    data = make_report_data(12_000, 40)
    assert data.exploration is not None
    # Noise compresses least.
    noise = np.random.default_rng(0).integers(0, 256, data.exploration.thumbnails.shape, np.uint8)
    html = render_page(replace(data, exploration=replace(data.exploration, thumbnails=noise)))
    assert len(html.encode()) < 10_000_000
    payload = json.loads(re.search(r'id="maps-data">(.*?)</script>', html)[1])
    assert len(payload["paths"]) == 10_000
    assert "10,000 of 11,998 images are shown" in Outline(html).text


def test_sample_points_is_even_over_classes_and_always_the_same() -> None:
    results = make_report_data(1_000, 4).results
    assert results is not None
    # One class is small: the others get the points that it cannot fill.
    results = pd.concat([results[results["label"] != "fruit_000"], results[results["label"] == "fruit_000"][:10]])
    results = results.reset_index(drop=True)
    axes = choose_axes(list(results.columns), (1, 2), [])
    chosen = sample_points(results, axes, max_points=100, with_thumbnail=frozenset())
    counts = results["label"][chosen].value_counts()
    n_small = int(
        (results["label"] == "fruit_000").sum() - results.loc[results["label"] == "fruit_000", "pca_1"].isna().sum()
    )
    assert counts["fruit_000"] == n_small and set(counts[["fruit_001", "fruit_002", "fruit_003"]]) <= {30, 31}
    np.testing.assert_array_equal(chosen, sample_points(results, axes, max_points=100, with_thumbnail=frozenset()))
    assert np.isfinite(results[["pca_1", "tsne_1"]].to_numpy()[chosen]).all()


@pytest.mark.parametrize("max_points", [1, 60, 299, 300, 1_000], ids=str)
def test_read_points_chooses_among_pieces_as_among_all(tmp_path: Path, max_points: int) -> None:
    n_images, random, output = 400, np.random.default_rng(1), Location(str(tmp_path))
    scores = random.normal(size=(n_images, 3)).astype(np.float32)
    scores[random.random(n_images) < 0.25] = np.nan
    tsne = np.where(random.random((n_images, 1)) < 0.1, scores[:, :2], np.nan)
    labels = np.where(random.random(n_images) < 0.9, "often", random.choice(list("abc"), n_images))
    columns = {
        "path": [f"{n}.jpg" for n in range(n_images)],
        "label": labels,
        "status": "ok",
        "error": "",
        "attempts": 1,
    }
    outcomes = pd.DataFrame(columns)
    pieces = [outcomes.iloc[start : start + 30] for start in range(0, n_images, 30)]
    report.write_results(output, pieces, pca=scores, tsne=tsne)
    shown = frozenset(f"{n}.jpg" for n in range(0, n_images, 9))
    table, n_hidden = report.read_points(output, (1, 3), [0.5, 0.3, 0.2], max_points=max_points, with_thumbnail=shown)
    whole = report.read_results(output)
    if max_points < n_images:
        axes, order = choose_axes(list(whole), (1, 3), [0.5, 0.3, 0.2]), np.random.default_rng(0).random(n_images)
        whole = whole.iloc[sample_points(whole, axes, max_points=max_points, with_thumbnail=shown, order=order)]
    assert table["path"].tolist() == whole["path"].tolist()
    np.testing.assert_array_equal(table[["pca_1", "pca_3", "tsne_2"]], whole[["pca_1", "pca_3", "tsne_2"]])
    assert n_hidden == np.isfinite(scores[:, 0]).sum() - np.isfinite(table["pca_1"]).sum()


def test_sample_points_prefers_images_on_both_maps_then_those_with_thumbnails() -> None:
    results = make_report_data(100, 1, n_failed=0).results
    assert results is not None
    results.loc[30:, ["tsne_1", "tsne_2"]] = np.nan
    axes = choose_axes(list(results.columns), (1, 2), [])
    with_thumbnail = frozenset(results["path"][90:])
    chosen = sample_points(results, axes, max_points=40, with_thumbnail=with_thumbnail)
    assert chosen.tolist() == [*range(30), *range(90, 100)]


@pytest.mark.parametrize(
    ("columns", "components", "expected"),
    [
        (["pca_1", "pca_2", "pca_3"], (1, 3), [("pca_1", "pca_3")]),
        (["pca_1", "pca_2"], (1, 3), [("pca_1", "pca_2")]),
        (["pca_1"], (1, 2), []),
        (["pca_1", "pca_2", "tsne_1", "tsne_2"], (2, 1), [("pca_2", "pca_1"), ("tsne_1", "tsne_2")]),
    ],
    ids=["as configured", "fewer than configured", "one component", "with t-SNE"],
)
def test_choose_axes(columns: list[str], components: tuple[int, int], expected: list[tuple[str, str]]) -> None:
    axes = choose_axes(columns, components, [0.3, 0.2])
    assert [(each.x, each.y) for each in axes] == expected
    labels = [each.x_label for each in axes if each.name == "pca"]
    assert labels == [
        f"Component {x[-1]} ({'30' if x == 'pca_1' else '20'}\u202f% of the variance)" for x, _ in expected[:1]
    ]


def test_thumbnails_end_with_the_budget() -> None:
    exploration = make_report_data(40, 2).exploration
    assert exploration is not None
    paths = list(exploration.images["path"])
    sizes = [len(Thumbnails(exploration, max_bytes=100_000).encode(path) or "") for path in paths[:3]]
    thumbnails = Thumbnails(exploration, max_bytes=sizes[0] + sizes[1])
    assert [thumbnails.encode(path) is not None for path in paths[:3]] == [True, True, False]
    assert Thumbnails(exploration, max_bytes=100_000).encode("no/such.jpg") is None
    assert Thumbnails(None, max_bytes=100_000).encode(paths[0]) is None


def test_thumbnails_keep_the_colours_of_their_images() -> None:
    exploration = make_report_data(40, 2).exploration
    assert exploration is not None
    path, pixels = exploration.images["path"][exploration.thumbnail_rows[5]], exploration.thumbnails[5]
    encoded = Thumbnails(exploration, max_bytes=100_000).encode(path)
    assert encoded is not None
    decoded = np.asarray(Image.open(io.BytesIO(b64decode(encoded))).convert("RGB"))
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(float) - pixels).mean() < 6


@pytest.mark.parametrize(
    ("url", "title", "expected"),
    [
        ("s3://bucket/fruits/Test", None, "fruits/Test"),
        ("s3://bucket/fruits", None, "bucket/fruits"),
        ("s3://bucket", None, "bucket"),
        ("/data/photographs/apples/", None, "photographs/apples"),
        ("/apples", None, "apples"),
        ("s3://bucket/fruits", "Our apples", "Our apples"),
    ],
    ids=["folder in a bucket", "folder of a bucket", "bucket", "folder", "at the root", "given"],
)
def test_choose_title(url: str, title: str | None, expected: str) -> None:
    config = load_config({"input": {"url": url}, "output": {"url": "s3://run"}, "report": {"title": title}})
    assert choose_title(config) == expected

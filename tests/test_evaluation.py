"""Quality of features, compared with scikit-learn, brute force and closed forms."""

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.model_selection import LeaveOneGroupOut, LeaveOneOut, cross_val_predict, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from fruitdask.analysis import classifier
from fruitdask.analysis.evaluation import explain_variance, find_series, summarize_quality
from fruitdask.analysis.neighbors import find_neighbors
from fruitdask.errors import ReduceError

Array = npt.NDArray[Any]

METRICS = ["euclidean", "cosine"]


def draw_features(n_images: int, n_features: int = 24, *, n_classes: int = 4, seed: int = 0) -> tuple[Array, Array]:
    """Draw features of classes that overlap, as networks give them: not negative, far from zero, float32."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, n_classes, n_images)
    centres = rng.uniform(0, 3, (n_classes, n_features))
    features = np.abs(centres[codes] + rng.normal(0, 1.2, (n_images, n_features))).astype(np.float32)
    return features, np.array([f"class {code}" for code in codes])


def measure_distances(features: Array, metric: str) -> Array:
    """Measure all distances in float64 by their definitions; that of a row to itself is infinite."""
    rows = features.astype(np.float64)
    if metric == "cosine":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        distances = 1 - rows @ rows.T
    else:
        distances = np.sqrt(((rows[:, np.newaxis] - rows) ** 2).sum(axis=2))
    np.fill_diagonal(distances, np.inf)
    return distances


def summarize(
    features: Any, labels: Any, *, n_neighbors: int = 5, metric: str = "euclidean", groups: Any = None
) -> dict[str, Any]:
    features = np.asarray(features, np.float32).reshape(len(labels), -1 if len(labels) else 3)
    quality = summarize_quality(features, labels, n_neighbors=n_neighbors, metric=metric, groups=groups)
    # JSON refuses NaN, and returns all other values unchanged.
    assert json.loads(json.dumps(quality, allow_nan=False)) == quality
    return quality


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n_images", "k"), [(200, 5), (700, 1), (30, 29)], ids=["200", "700", "all others"])
def test_find_neighbors_equals_brute_force(n_images: int, k: int, metric: str) -> None:
    features, _ = draw_features(n_images)
    found = find_neighbors(features, n_neighbors=k, metric=metric)
    distances = measure_distances(features, metric)
    assert found.shape == (n_images, k) and found.dtype == np.int64
    assert all(len(set(row)) == k for row in found)
    # By distance, not by number: rounding may swap neighbours that are equally far.
    expected = np.sort(distances, axis=1)[:, :k]
    np.testing.assert_allclose(np.take_along_axis(distances, found, axis=1), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_find_neighbors_finds_duplicates_but_never_the_row_itself(metric: str) -> None:
    features, _ = draw_features(60, 8)
    copies = np.repeat(features, [9] + [1] * 58 + [2], axis=0)
    found = find_neighbors(copies, n_neighbors=4, metric=metric)
    assert not (found == np.arange(len(copies))[:, np.newaxis]).any()
    assert (found[:9] < 9).all() and all(len(set(row)) == 4 for row in found)
    assert (found[-2, 0], found[-1, 0]) == (len(copies) - 1, len(copies) - 2)


def test_find_neighbors_of_equal_rows_leaves_out_each_row() -> None:
    found = find_neighbors(np.ones((50, 3), np.float32), n_neighbors=3, metric="euclidean")
    assert not (found == np.arange(50)[:, np.newaxis]).any()


@pytest.mark.parametrize(("n_images", "shape"), [(0, (0, 0)), (1, (1, 0)), (2, (2, 1)), (4, (4, 3))], ids=str)
def test_find_neighbors_returns_fewer_if_there_are_not_enough(n_images: int, shape: tuple[int, int]) -> None:
    found = find_neighbors(draw_features(n_images)[0], n_neighbors=5, metric="euclidean")
    assert found.shape == shape and found.dtype == np.int64


@pytest.mark.parametrize("metric", METRICS)
def test_summarize_quality_silhouette_equals_sklearn(metric: str) -> None:
    features, labels = draw_features(400)
    found = summarize(features, labels, metric=metric)["silhouette"]
    assert found["mean"] == pytest.approx(silhouette_score(features, labels, metric=metric), abs=1e-7)
    # By the definition of Rousseeuw: a and b are the mean distances to the own and to the nearest other class.
    distances = measure_distances(features, metric)
    np.fill_diagonal(distances, 0)
    sums = np.stack([distances[:, labels == label].sum(axis=1) for label in sorted(set(labels))], axis=1)
    sizes = np.array([(labels == label).sum() for label in sorted(set(labels))])
    own = np.unique(labels, return_inverse=True)[1]
    rows = np.arange(len(labels))
    a = sums[rows, own] / (sizes[own] - 1)
    means = sums / sizes
    means[rows, own] = np.inf
    b = means.min(axis=1)
    values = (b - a) / np.maximum(a, b)
    expected = {label: values[labels == label].mean() for label in sorted(set(labels))}
    assert found["by_class"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_summarize_quality_agreement_equals_sklearn_leave_one_out() -> None:
    features, labels = draw_features(250)
    accuracy = cross_val_score(KNeighborsClassifier(1, algorithm="brute"), features, labels, cv=LeaveOneOut()).mean()
    assert 0.3 < accuracy < 0.98
    assert summarize(features, labels, n_neighbors=1)["neighbors"]["agreement"] == pytest.approx(accuracy)


def test_summarize_quality_does_not_count_copies_as_neighbours() -> None:
    features, labels = draw_features(120, 4)
    rng = np.random.default_rng(0)
    rows = np.sort(np.append(np.arange(120), rng.integers(0, 120, 200)))
    labels = labels[rows]
    found = summarize(features[rows], labels, n_neighbors=1)
    distances = measure_distances(features[rows], "euclidean")
    distances[rows[:, np.newaxis] == rows] = np.inf
    # Several copies of the nearest image are equally near, and have one label.
    agreement = (labels[distances.argmin(axis=1)] == labels).mean()
    assert found["neighbors"]["agreement"] == pytest.approx(agreement) and agreement < 0.8
    assert found["silhouette"]["mean"] == pytest.approx(silhouette_score(features[rows], labels), abs=1e-5)


@pytest.mark.parametrize("exponent", [-100, 80])
@pytest.mark.parametrize("metric", METRICS)
def test_quality_does_not_depend_on_the_scale_of_features(metric: str, exponent: int) -> None:
    # A deep network of random weights gives such numbers, whose squares float32 cannot hold.
    features, labels = draw_features(90, 4)
    scaled = np.ldexp(features, exponent)
    expected = summarize(features, labels, metric=metric)
    assert summarize(scaled, labels, metric=metric) == expected and expected["neighbors"]["agreement"] < 0.9
    found, others = (find_neighbors(each, n_neighbors=3, metric=metric) for each in (scaled, features))
    np.testing.assert_array_equal(found, others)


@pytest.mark.slow
def test_summarize_quality_confusion_equals_sklearn_leave_one_out() -> None:
    features, labels = draw_features(120, n_classes=3)
    classifier = KNeighborsClassifier(7, algorithm="brute")
    rows = np.arange(len(labels))
    # The probabilities of an even vote are the shares of classes among the neighbours.
    votes = np.stack(
        [classifier.fit(features[rows != row], labels[rows != row]).predict_proba(features[[row]])[0] for row in rows]
    )
    found = summarize(features, labels, n_neighbors=7)["neighbors"]
    assert found["k"] == 7 and found["confusion"]["labels"] == ["class 0", "class 1", "class 2"]
    expected = np.stack([votes[labels == label].mean(axis=0) for label in found["confusion"]["labels"]])
    np.testing.assert_allclose(found["confusion"]["share"], expected, atol=1e-12)
    assert list(found["by_class"].values()) == pytest.approx(np.diag(expected).tolist())


def test_summarize_quality_of_two_pairs_equals_computation_by_hand() -> None:
    quality = summarize([0, 1, 8, 10], ["a", "a", "b", "b"], n_neighbors=2)
    # Silhouettes: 1 - 1/9, 1 - 1/8, 1 - 2/7.5, 1 - 2/9.5.
    expected = {"a": 1 - (1 / 9 + 1 / 8) / 2, "b": 1 - (2 / 7.5 + 2 / 9.5) / 2}
    assert quality["silhouette"]["by_class"] == pytest.approx(expected, abs=1e-6)
    assert quality["silhouette"]["mean"] == pytest.approx(sum(expected.values()) / 2, abs=1e-6)
    assert quality["neighbors"] == {
        "k": 2,
        "agreement": 0.5,
        "chance": pytest.approx(1 / 3),
        "by_class": {"a": 0.5, "b": 0.5},
        "confusion": {"labels": ["a", "b"], "share": [[0.5, 0.5], [0.5, 0.5]]},
    }


def test_summarize_quality_of_very_many_classes_tabulates_those_that_are_confused() -> None:
    labels = np.repeat([f"class {number:03}" for number in range(400)], 2)
    features = np.repeat(np.arange(400.0), 2)[:, np.newaxis] * 1000 + np.tile([0.0, 1.0], 400)[:, np.newaxis]
    # The last two classes are swapped.
    labels[[-1, -3]] = labels[[-3, -1]]
    quality = summarize(features, labels, n_neighbors=1)
    assert len(quality["neighbors"]["by_class"]) == 400
    confusion = quality["neighbors"]["confusion"]
    assert confusion["labels"] == [*(f"class {number:03}" for number in range(298)), "class 398", "class 399"]
    np.testing.assert_array_equal(np.array(confusion["share"])[-2:, -2:], [[0, 1], [1, 0]])
    np.testing.assert_array_equal(np.array(confusion["share"])[:298, :298], np.eye(298))


def test_summarize_quality_averages_over_images_not_classes() -> None:
    quality = summarize([0, 1, 2, 50], ["a", "a", "a", "b"], n_neighbors=1)
    assert quality["neighbors"]["agreement"] == 0.75
    assert quality["neighbors"]["by_class"] == {"a": 1.0, "b": 0.0}


def test_summarize_quality_of_a_class_of_one_image() -> None:
    features, labels = [0, 1, 8, 9, 100], ["a", "a", "b", "b", "alone"]
    quality = summarize(features, labels, n_neighbors=1)
    assert quality["silhouette"]["by_class"]["alone"] == 0
    assert quality["neighbors"]["by_class"] == {"a": 1, "alone": 0, "b": 1}
    assert quality["neighbors"]["confusion"] == {
        "labels": ["a", "alone", "b"],
        "share": [[1, 0, 0], [0, 0, 1], [0, 0, 1]],
    }


@pytest.mark.parametrize(
    ("labels", "agreement", "by_class"),
    [
        ([], None, {}),
        (["a"], None, {"a": None}),
        (["a", "a"], 1.0, {"a": 1.0}),
        (["a", "b"], 0.0, {"a": 0.0, "b": 0.0}),
        (["a", "a", "a", "a"], 1.0, {"a": 1.0}),
        (["d", "c", "b", "a"], 0.0, {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}),
    ],
    ids=["nothing", "one image", "one pair", "two classes of one", "one class", "one label per image"],
)
def test_summarize_quality_has_no_silhouette_if_it_is_undefined(
    labels: list[str], agreement: float | None, by_class: dict[str, float | None]
) -> None:
    quality = summarize(np.arange(len(labels)), labels)
    assert quality["silhouette"] == {"mean": None, "by_class": dict.fromkeys(sorted(set(labels)))}
    found = quality["neighbors"]
    assert (found["k"], found["agreement"], found["by_class"]) == (max(0, len(labels) - 1), agreement, by_class)
    assert found["confusion"]["labels"] == ([] if agreement is None else sorted(set(labels)))


def test_summarize_quality_of_images_that_are_all_equal() -> None:
    quality = summarize(np.ones((6, 4)), ["a", "b"] * 3, n_neighbors=5)
    assert quality["silhouette"] == {"mean": 0, "by_class": {"a": 0, "b": 0}}
    # Copies of one image have no neighbours.
    assert quality["neighbors"]["k"] == 0 and quality["neighbors"]["agreement"] is None


def test_summarize_quality_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(ReduceError, match="expected one label per row of features .3., found 2 labels"):
        summarize_quality(np.zeros((3, 2), np.float32), ["a", "b"], n_neighbors=1, metric="euclidean")


@pytest.mark.parametrize("metric", METRICS)
def test_grouped_agreement_equals_sklearn_leave_one_group_out(metric: str) -> None:
    features, labels = draw_features(250)
    groups = np.random.default_rng(1).integers(0, 12, 250).astype(str)
    classifier = KNeighborsClassifier(1, algorithm="brute", metric=metric)
    predicted = cross_val_predict(classifier, features, labels, groups=groups, cv=LeaveOneGroupOut())
    quality = summarize(features, labels, n_neighbors=1, metric=metric, groups=groups)
    found = quality["grouped"]["neighbors"]
    assert found["agreement"] == pytest.approx((predicted == labels).mean()) and found["agreement"] < 0.98
    assert found["by_class"] == pytest.approx(
        {label: (predicted == labels)[labels == label].mean() for label in set(labels)}
    )
    # Figures without groups stay the same.
    assert {name: quality[name] for name in ("silhouette", "neighbors")} == summarize(
        features, labels, n_neighbors=1, metric=metric
    )


def test_grouped_silhouette_equals_its_definition() -> None:
    features, labels = draw_features(120, n_classes=3)
    groups = np.random.default_rng(2).integers(0, 9, 120)
    distances = np.where(groups[:, np.newaxis] == groups, np.nan, measure_distances(features, "euclidean"))
    values = []
    for row, label in enumerate(labels):
        means = {each: np.nanmean(distances[row, labels == each]) for each in set(labels)}
        own = means.pop(label)
        values.append((min(means.values()) - own) / max(min(means.values()), own))
    found = summarize(features, labels, groups=groups.astype(str))["grouped"]["silhouette"]
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-6)


def test_images_of_one_object_do_not_count_as_neighbours() -> None:
    # Two objects per class; each object's images are nearer to those of the other class's object than to its own class.
    features = [0.0, 0.1, 10.0, 10.1, 0.3, 0.4, 10.3, 10.4]
    quality = summarize(features, list("aaaabbbb"), n_neighbors=1, groups=list("11223344"))
    assert quality["neighbors"]["agreement"] == 1
    assert quality["grouped"]["neighbors"]["agreement"] == 0
    assert quality["grouped"]["silhouette"]["mean"] < quality["silhouette"]["mean"]
    assert quality["grouped"]["n_groups"] == 4 and quality["grouped"]["n_groups_across_classes"] == 0
    # Both classes have the same group numbers, as if names of groups lacked the class.
    assert summarize(features, list("aaaabbbb"), groups=list("11221132"))["grouped"]["n_groups_across_classes"] == 2


@pytest.mark.parametrize("is_grouped", [False, True], ids=["images", "groups"])
def test_agreement_by_chance_is_that_of_random_features(is_grouped: bool) -> None:
    random = np.random.default_rng(0)
    labels, groups = np.array(["a"] * 900 + ["b"] * 100), np.repeat(np.arange(200), 5).astype(str)
    quality = summarize(random.normal(size=(1000, 8)), labels, n_neighbors=20, groups=groups if is_grouped else None)
    neighbors = (quality["grouped"] if is_grouped else quality)["neighbors"]
    assert neighbors["chance"] == pytest.approx(neighbors["agreement"], abs=0.02)
    # Of 999 others 899 are of the large class; of 995 in other groups 895.
    n_same = (895, 95, 995) if is_grouped else (899, 99, 999)
    assert neighbors["chance"] == pytest.approx((0.9 * n_same[0] + 0.1 * n_same[1]) / n_same[2])


def test_a_class_of_one_group_has_no_figure_and_is_excluded_from_the_mean() -> None:
    grouped = summarize([0, 1, 8, 9], list("aabb"), n_neighbors=1, groups=["x", "y", "z", "z"])["grouped"]
    assert grouped["classes_of_one_group"] == ["b"]
    assert grouped["neighbors"]["by_class"] == {"a": 1, "b": None} and grouped["neighbors"]["agreement"] == 1
    assert grouped["silhouette"]["by_class"]["b"] is None and grouped["silhouette"]["mean"] > 0
    # Its neighbours are of other classes because those of its own are in its group.
    assert grouped["neighbors"]["confusion"] == {"labels": ["a", "b"], "share": [[1, 0], [0, 0]]}


@pytest.mark.parametrize("groups", [["x"] * 4, [""] * 4], ids=["one group", "no groups"])
def test_grouped_figures_of_one_group_and_of_images_without_a_group(groups: list[str]) -> None:
    quality = summarize([0, 1, 8, 9], list("aabb"), n_neighbors=1, groups=groups)
    grouped = quality["grouped"]
    if groups[0]:
        assert grouped["n_groups"] == 1 and grouped["classes_of_one_group"] == ["a", "b"]
        assert grouped["neighbors"]["agreement"] is None and grouped["silhouette"]["mean"] is None
    else:
        # Each image shows another object.
        assert (grouped["n_groups"], grouped["neighbors"]) == (4, quality["neighbors"])
        assert grouped["silhouette"] == quality["silhouette"]


@pytest.mark.parametrize(
    ("template", "series"),
    [
        ("apple/r{group}_{n}.jpg", "apple/r{group}_"),
        ("Apple 1/{group}/{n}_100.jpg", "Apple 1/{group}/"),
        ("IMG_{n:04}.jp2", "IMG_"),
    ],
    ids=["fruits-360", "numbers at both ends", "camera"],
)
def test_find_series_names_the_series(template: str, series: str) -> None:
    names = (
        [(group, n) for group in range(3) for n in range(0, 60, 2)]
        if "group" in template
        else [(0, n) for n in range(90)]
    )
    paths = [template.format(group=group, n=n) for group, n in names]
    found = find_series(paths, np.array([place + 1 if place % 10 else place - 1 for place in range(1, 91)]) % 90)
    assert found is not None and found["fraction"] > 0.9
    assert [re.search(found["pattern"], path)[1] for path in paths] == [
        series.format(group=group) for group, _ in names
    ]


def test_find_series_finds_nothing_in_other_names() -> None:
    rng = np.random.default_rng(0)
    numbered = [f"a/{n}.jpg" for n in range(200)]
    following = np.minimum(np.arange(200) + 1, 199)
    assert find_series(numbered, rng.integers(0, 200, 200)) is None
    assert find_series([f"a/{'xyz'[n % 3]}{'abcdefghij'[n // 20]}.jpg" for n in range(200)], following) is None
    assert find_series([f"object {n // 4}/{n % 4}.jpg" for n in range(200)], following) is None
    assert find_series(numbered[:3], np.array([1, 2, 1])) is None


@settings(max_examples=40)
@given(
    n_images=st.integers(2, 40),
    n_classes=st.integers(1, 5),
    n_neighbors=st.integers(1, 8),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 1000),
)
def test_summarize_quality_is_consistent_and_ignores_order_rotation_and_scale(
    n_images: int, n_classes: int, n_neighbors: int, metric: str, seed: int
) -> None:
    features, labels = draw_features(n_images, 6, n_classes=n_classes, seed=seed)
    quality = summarize(features, labels, n_neighbors=n_neighbors, metric=metric)
    neighbors, confusion = quality["neighbors"], quality["neighbors"]["confusion"]
    share = np.array(confusion["share"])
    np.testing.assert_allclose(share.sum(axis=1), 1)
    assert list(neighbors["by_class"].values()) == pytest.approx(np.diag(share).tolist())
    sizes = [(labels == label).sum() for label in confusion["labels"]]
    assert neighbors["agreement"] == pytest.approx(np.average(np.diag(share), weights=sizes))
    # Order of the images, rotation and scale change no neighbours.
    rng = np.random.default_rng(seed)
    order = rng.permutation(n_images)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    again = summarize(2.5 * features[order] @ turn, labels[order], n_neighbors=n_neighbors, metric=metric)
    np.testing.assert_allclose(again["neighbors"]["confusion"]["share"], share, atol=1e-9)
    assert again["silhouette"]["by_class"] == {
        label: pytest.approx(value, abs=1e-4) for label, value in quality["silhouette"]["by_class"].items()
    }
    renamed = summarize(features, np.char.add("z", labels), n_neighbors=n_neighbors, metric=metric)
    assert renamed["neighbors"]["agreement"] == neighbors["agreement"]


@pytest.mark.parametrize("n_features", [12, 40])
def test_explain_variance_counts_as_sklearn_does(n_features: int) -> None:
    features, _ = draw_features(200, n_features)
    ratio = PCA().fit(features).explained_variance_ratio_
    found = explain_variance(ratio)
    assert found["ratio"] == pytest.approx(ratio.tolist()) and all(type(value) is float for value in found["ratio"])
    expected = {str(part): PCA(part, svd_solver="full").fit(features).n_components_ for part in (0.8, 0.9, 0.95, 0.99)}
    assert found["n_components"] == expected
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [
        ([], [None, None, None, None]),
        ([0.5, 0.2], [None, None, None, None]),
        ([0.85, 0.06], [1, 2, None, None]),
        ([1.0, 0.0], [1, 1, 1, 1]),
        ([0.5, 0.3, 0.2], [3, 3, 3, 3]),
    ],
    ids=["nothing", "too little", "some", "all in one", "more than, not as much as"],
)
def test_explain_variance_returns_none_beyond_the_components(ratio: list[float], counts: list[int | None]) -> None:
    found = explain_variance(ratio)
    assert found == {"ratio": ratio, "n_components": dict(zip(["0.8", "0.9", "0.95", "0.99"], counts, strict=True))}


def test_neighbors_imports_sklearn_only_when_called() -> None:
    code = "import sys, fruitdask.analysis.evaluation, fruitdask.analysis.neighbors; print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_cosines_do_not_depend_on_one_image_of_huge_features() -> None:
    random = np.random.default_rng(0)
    labels, features = np.repeat(["a", "b"], 20), random.normal(size=(40, 5)).astype(np.float32)
    features[20:, 0] += 4
    huge = features.copy()
    huge[0] *= 1e9
    expected, found = (summarize(each, labels, metric="cosine") for each in (features, huge))
    assert found["neighbors"] == expected["neighbors"] and expected["silhouette"]["mean"] > 0.2
    assert found["silhouette"]["mean"] == pytest.approx(expected["silhouette"]["mean"], abs=1e-6)
    reports = [classifier.train(each, labels)[1] for each in (features, huge)]
    assert reports[0]["nearest_neighbors"] == reports[1]["nearest_neighbors"]
    assert reports[0]["unknown_distance"] == pytest.approx(reports[1]["unknown_distance"], abs=1e-6)

"""Principal components, compared with scikit-learn and dask-ml."""

import pickle
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

import dask
import dask.array as da
import dask_ml.decomposition
import numpy as np
import pytest
import sklearn.decomposition
from hypothesis import given, settings, strategies as st
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from fruitdask.analysis import reduction
from fruitdask.analysis.pca import PCA, compare_components, list_arrays, restore_pca, truncate_pca
from fruitdask.errors import NoVarianceError, ReduceError

EXACT = ("covariance_eigh", "full", "tsqr")
ARRAYS = ("mean", "explained_variance", "explained_variance_ratio", "singular_values")


def draw_features(n_images: int, n_features: int, *, rank: int = 12, seed: int = 0) -> np.ndarray:
    """Draw features with a few strong directions, a mean far from zero and a little noise, as networks give them."""
    rng = np.random.default_rng(seed)
    strong = rng.normal(size=(n_images, rank)) * np.geomspace(10, 0.5, rank) @ rng.normal(size=(rank, n_features))
    return (strong + 0.05 * rng.normal(size=(n_images, n_features)) + 3).astype(np.float32)


def check_equal(fitted: PCA, expected: Any, *, rtol: float = 1e-9) -> None:
    """Compare everything that scikit-learn says about a fit."""
    np.testing.assert_allclose(fitted.components_, expected.components_, atol=rtol)
    for name in (*ARRAYS, "noise_variance"):
        theirs = getattr(expected, f"{name}_")
        np.testing.assert_allclose(getattr(fitted, f"{name}_"), theirs, rtol=rtol, err_msg=name)
    for name in ("n_components_", "n_samples_", "n_features_in_"):
        assert getattr(fitted, name) == getattr(expected, name), name


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize(
    ("n_images", "n_features", "chunk"),
    [(500, 64, 500), (500, 64, 37), (40, 200, 40), (40, 200, 7), (9000, 20, 1000)],
    ids=["one chunk", "many chunks", "wide", "wide in chunks", "several blocks"],
)
def test_fit_equals_sklearn(n_images: int, n_features: int, chunk: int, solver: str) -> None:
    features = draw_features(n_images, n_features)
    expected = sklearn.decomposition.PCA(6, svd_solver="full").fit(features.astype(np.float64))
    fitted = PCA(6, svd_solver=solver).fit(da.from_array(features, chunks=(chunk, -1)))
    check_equal(fitted, expected)
    scores = expected.transform(features.astype(np.float64))
    np.testing.assert_allclose(fitted.transform(features), scores, atol=1e-7)
    np.testing.assert_allclose(fitted.inverse_transform(scores), expected.inverse_transform(scores), rtol=1e-9)


@pytest.mark.parametrize("n_components", [None, 6, 0.9], ids=["all", "some", "fraction"])
def test_fit_whitens_like_sklearn(n_components: int | float | None) -> None:
    features = draw_features(300, 12).astype(np.float64)
    expected = sklearn.decomposition.PCA(n_components, whiten=True, svd_solver="full").fit(features)
    fitted = PCA(n_components, whiten=True)
    scores = fitted.fit_transform(features)
    np.testing.assert_allclose(scores, expected.transform(features), atol=1e-9)
    np.testing.assert_allclose(scores.std(axis=0, ddof=1), 1, rtol=1e-9)
    np.testing.assert_allclose(fitted.inverse_transform(scores), expected.inverse_transform(scores), rtol=1e-9)
    np.testing.assert_allclose(fitted.get_covariance(), expected.get_covariance(), atol=1e-8)


@pytest.mark.parametrize("kind", ["numpy", "dask"])
def test_transform_returns_the_kind_of_array_it_gets(kind: str) -> None:
    features = draw_features(100, 20)
    values: Any = features if kind == "numpy" else da.from_array(features, chunks=(30, 7))
    expected = sklearn.decomposition.PCA(2, svd_solver="full").fit(features.astype(np.float64))
    fitted = PCA(2)
    for scores in (fitted.fit_transform(values), fitted.transform(values)):
        assert type(scores) is type(values) and scores.dtype == np.float64
        np.testing.assert_allclose(np.asarray(scores), expected.transform(features.astype(np.float64)), atol=1e-8)
        back = fitted.inverse_transform(scores)
        assert type(back) is type(values) and back.shape == features.shape
    np.testing.assert_allclose(fitted.components_, expected.components_, atol=1e-9)


def test_transform_keeps_rows_without_features() -> None:
    features = draw_features(30, 8)
    fitted = PCA(2).fit(features)
    features[[3, 17]] = np.nan
    assert np.flatnonzero(np.isnan(fitted.transform(features)).all(axis=1)).tolist() == [3, 17]


def test_estimator_is_one_of_sklearn_and_dask_ml() -> None:
    features = draw_features(80, 10).astype(np.float64)
    pca = PCA(3, whiten=True, random_state=5)
    assert isinstance(pca, dask_ml.decomposition.PCA) and isinstance(pca, sklearn.decomposition.PCA)
    assert clone(pca).get_params() == pca.get_params()
    assert pca.set_params(n_components=2).fit(features).n_components_ == 2
    assert not hasattr(clone(pca), "components_")
    again = pickle.loads(pickle.dumps(pca))
    np.testing.assert_array_equal(again.transform(features), pca.transform(features))


def test_estimator_works_in_a_pipeline_of_sklearn() -> None:
    features = draw_features(200, 30).astype(np.float64)
    labels = features[:, 0] > np.median(features[:, 0])
    ours, theirs = (
        make_pipeline(pca, LogisticRegression()).fit(features, labels)
        for pca in (PCA(5), sklearn.decomposition.PCA(5, svd_solver="full"))
    )
    np.testing.assert_array_equal(ours.predict(features), theirs.predict(features))
    assert ours.score(features, labels) > 0.8
    assert list(ours[:-1].get_feature_names_out()) == ["pca0", "pca1", "pca2", "pca3", "pca4"]


def test_estimator_is_scored_and_compared_like_that_of_sklearn() -> None:
    features = draw_features(150, 10).astype(np.float64)
    expected = sklearn.decomposition.PCA(4, svd_solver="full").fit(features)
    fitted, lazy = PCA(4).fit(features), da.from_array(features, chunks=(40, -1))
    for values in (features, lazy):
        scores = fitted.score_samples(values)
        assert type(scores) is type(values)
        np.testing.assert_allclose(np.asarray(scores), expected.score_samples(features), rtol=1e-6)
        np.testing.assert_allclose(fitted.score(values), expected.score(features), rtol=1e-9)
    ours, theirs = (cross_val_score(pca, features, cv=3) for pca in (PCA(4), expected))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    table = PCA(2).set_output(transform="pandas").fit_transform(features)
    np.testing.assert_allclose(table[["pca0", "pca1"]], expected.transform(features)[:, :2], atol=1e-9)


def test_fit_equals_sklearn_on_ill_conditioned_features() -> None:
    rng = np.random.default_rng(0)
    deviations = np.geomspace(1, 1e-9, 10)
    strong = rng.normal(size=(3000, 10)) * deviations @ np.linalg.qr(rng.normal(size=(40, 40)))[0][:10]
    features = strong + rng.uniform(10, 20, 40)
    features[0] += 1e3  # the first row, which is subtracted before summing, is an outlier
    expected = sklearn.decomposition.PCA(11, svd_solver="full").fit(features)
    fitted = PCA(11).fit(da.from_array(features, chunks=(250, -1)))
    scores, expected_scores = fitted.transform(features), expected.transform(features)
    # Rounding of the covariance is relative to the largest variance: a billionth of it is known to six digits, a
    # trillionth is not.
    clear = expected.explained_variance_ > 1e-9 * expected.explained_variance_[0]
    assert 3 < clear.sum() < 9
    errors = np.linalg.norm(scores - expected_scores, axis=0) / np.linalg.norm(expected_scores, axis=0)
    assert errors[clear].max() < 1e-6
    np.testing.assert_allclose(fitted.explained_variance_[clear], expected.explained_variance_[clear], rtol=1e-6)
    assert (fitted.explained_variance_ >= 0).all()
    np.testing.assert_allclose(fitted.components_ @ fitted.components_.T, np.eye(11), atol=1e-12)


@pytest.mark.slow
@settings(max_examples=8)
@given(cuts=st.lists(st.integers(1, 199), max_size=6, unique=True))
def test_fit_does_not_depend_on_chunks(cuts: list[int]) -> None:
    features = draw_features(200, 30)
    sizes = tuple(np.diff([0, *sorted(cuts), 200]).tolist())
    whole = PCA(5).fit(da.from_array(features, chunks=-1))
    fitted = PCA(5).fit(da.from_array(features, chunks=(sizes, -1)))
    np.testing.assert_allclose(fitted.components_, whole.components_, atol=1e-11)
    np.testing.assert_allclose(fitted.explained_variance_, whole.explained_variance_, rtol=1e-11)
    np.testing.assert_allclose(fitted.mean_, whole.mean_, rtol=1e-13)


def test_fit_takes_a_subset_of_rows() -> None:
    features = draw_features(400, 30)
    rows = np.flatnonzero(np.random.default_rng(0).random(400) < 0.7)
    expected = sklearn.decomposition.PCA(4, svd_solver="full").fit(features[rows].astype(np.float64))
    check_equal(PCA(4).fit(da.from_array(features, chunks=(64, -1))[rows]), expected)


@pytest.mark.parametrize("solver", EXACT)
def test_fit_reads_each_block_once_and_the_first_twice(solver: str) -> None:
    features = draw_features(1000, 30)
    reads: Counter[int] = Counter()
    lock = threading.Lock()

    def read(start: int) -> np.ndarray:
        with lock:
            reads[start] += 1
        return features[start : start + 100]

    starts = range(0, 1000, 100)
    blocks = [da.from_delayed(dask.delayed(read)(start), (100, 30), np.float32) for start in starts]
    with dask.config.set(scheduler="threads"):
        PCA(3, svd_solver=solver).fit(da.concatenate(blocks))
    assert reads == {start: 2 if start == 0 else 1 for start in starts}


@pytest.mark.parametrize(
    ("n_images", "n_features", "n_components"),
    [(30, 500, 6), (30, 500, 0.9), (12, 101, 12)],
    ids=["some", "fraction", "all"],
)
def test_fit_decomposes_many_features_of_few_images(
    n_images: int, n_features: int, n_components: int | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "LARGEST_SIDE", 40)
    features = draw_features(n_images, n_features)
    expected = sklearn.decomposition.PCA(n_components, svd_solver="full").fit(features.astype(np.float64))
    fitted = PCA(n_components).fit(da.from_array(features, chunks=(8, -1)))
    assert fitted.n_components_ == expected.n_components_
    # The centred features of n images have rank n - 1, at most.
    has_variance = expected.explained_variance_ > 1e-9
    np.testing.assert_allclose(fitted.components_[has_variance], expected.components_[has_variance], atol=1e-9)
    for name in ARRAYS:
        ours, theirs = (getattr(pca, f"{name}_") for pca in (fitted, expected))
        # A singular value is the root of a variance, and so is its rounding.
        atol = 1e-6 if name == "singular_values" else 1e-12
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=atol, err_msg=name)


@pytest.mark.parametrize("largest_side", [4096, 4], ids=["few features", "many features"])
@pytest.mark.parametrize("solver", ["covariance_eigh", "full", "randomized"])
def test_fit_refuses_images_that_are_all_the_same(
    solver: str, largest_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "LARGEST_SIDE", largest_side)
    row = np.random.default_rng(0).random(7, np.float32)
    features = da.from_array(np.tile(row, (4, 1)), chunks=(3, -1))
    with pytest.raises(NoVarianceError, match="all 4 images have the same features"):
        PCA(2, svd_solver=solver).fit(features)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("solver", ["covariance_eigh", "full", "randomized"])
def test_fit_refuses_values_that_are_not_finite(solver: str, value: float) -> None:
    features = draw_features(40, 6)
    features[31, 2] = value
    with np.errstate(invalid="ignore"), pytest.raises(ReduceError, match="expected finite features, found NaN or inf"):
        PCA(2, svd_solver=solver).fit(da.from_array(features, chunks=(20, -1)))


def test_fit_resolves_differences_far_smaller_than_the_mean() -> None:
    features = draw_features(300, 20).astype(np.float64) * 1e-6 + 1e3
    expected = sklearn.decomposition.PCA(3, svd_solver="full").fit(features)
    check_equal(PCA(3).fit(da.from_array(features, chunks=(50, -1))), expected, rtol=1e-6)


@pytest.mark.parametrize("solver", ["full", "tsqr", "randomized"])
def test_solvers_of_dask_ml_equal_dask_ml(solver: str) -> None:
    features = da.from_array(draw_features(1000, 40), chunks=(500, -1))
    theirs = dask_ml.decomposition.PCA(4, svd_solver=solver, iterated_power=4, random_state=3)
    theirs.fit(features.astype(np.float64))
    ours = PCA(4, svd_solver=solver, random_state=3).fit(features)
    np.testing.assert_allclose(np.abs(np.sum(ours.components_ * theirs.components_, axis=1)), 1, atol=1e-9)
    for name in (*ARRAYS, "noise_variance"):
        np.testing.assert_allclose(getattr(ours, f"{name}_"), getattr(theirs, f"{name}_"), rtol=1e-6, err_msg=name)


def test_fit_refuses_many_features_of_many_images() -> None:
    features = da.zeros((5000, 62_720), chunks=(500, -1), dtype=np.float32)
    with pytest.raises(ReduceError, match="62,720 features of 5,000 images; set .* or reduce.solver"):
        PCA(2).fit(features)


@pytest.mark.parametrize("fraction", [0.3, 0.8, 0.999])
def test_fit_of_a_fraction_keeps_as_many_components_as_sklearn(fraction: float) -> None:
    features = draw_features(300, 50)
    expected = sklearn.decomposition.PCA(fraction, svd_solver="full").fit(features.astype(np.float64))
    check_equal(PCA(fraction).fit(da.from_array(features, chunks=(100, -1))), expected)


@pytest.mark.slow
def test_randomized_finds_the_leading_components() -> None:
    features = draw_features(600, 100)
    expected = sklearn.decomposition.PCA(5, svd_solver="full").fit(features.astype(np.float64))
    fitted = PCA(5, svd_solver="randomized", random_state=1).fit(da.from_array(features, chunks=(300, -1)))
    check_equal(fitted, expected, rtol=1e-6)
    np.testing.assert_allclose(fitted.transform(features), expected.transform(features.astype(np.float64)), atol=1e-3)
    again = PCA(5, svd_solver="randomized", random_state=1).fit(da.from_array(features, chunks=(300, -1)))
    np.testing.assert_array_equal(again.components_, fitted.components_)


@pytest.mark.parametrize("n_components", [2, 0.9])
def test_truncate_and_restore_keep_what_a_smaller_fit_would_find(n_components: int | float) -> None:
    features = draw_features(100, 20)
    expected = sklearn.decomposition.PCA(n_components, svd_solver="full").fit(features.astype(np.float64))
    fewer = truncate_pca(PCA(svd_solver="tsqr", random_state=4).fit(features), n_components)
    check_equal(fewer, expected)
    restored = restore_pca(list_arrays(fewer), {"n_components": n_components, "solver": "tsqr", "seed": 4})
    assert (
        restored.get_params()
        == fewer.get_params()
        == PCA(n_components, True, False, "tsqr", random_state=4).get_params()
    )
    assert vars(restored).keys() == vars(fewer).keys()
    for name, value in vars(fewer).items():
        np.testing.assert_array_equal(getattr(restored, name), value, err_msg=name)


@pytest.mark.parametrize("solver", ["covariance_eigh", "randomized"])
def test_compare_components_accepts_rotations_of_equal_variances(solver: str) -> None:
    random = np.random.default_rng(0)
    # Two directions have the same variance, so any rotation of the two is as good.
    corners = np.array([[3.0, 0, 0, 0], [-3, 0, 0, 0], [0, 3, 0, 0], [0, -3, 0, 0], [0, 0, 1, 0], [0, 0, -1, 0]])
    fitted = PCA(3, svd_solver=solver).fit(da.from_array(corners + 5, chunks=(2, 4)))
    angle = random.uniform(0.2, 1.2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turned = np.concatenate([turn @ fitted.components_[:2], fitted.components_[2:]])
    assert list(compare_components(change(fitted, components=turned), fitted)) == []
    assert list(compare_components(truncate_pca(fitted, 2), fitted)) == []
    wrong = change(fitted, components=turned[[0, 2, 1]])
    assert list(compare_components(wrong, fitted)) == ["components do not match the features"]


def change(fitted: PCA, **arrays: np.ndarray) -> PCA:
    """Return a fit with other arrays."""
    return restore_pca(list_arrays(fitted) | arrays, {})


@pytest.mark.parametrize("name", ARRAYS)
def test_compare_components_names_what_differs(name: str) -> None:
    fitted = PCA(3).fit(np.random.default_rng(0).normal(size=(40, 6)))
    values = list_arrays(fitted)[name]
    changed = change(fitted, **{name: values * 1.01 + 0.01})
    assert f"{name} does not match the features" in list(compare_components(changed, fitted))
    short = change(fitted, **{name: values[:-1]})
    assert any("expected the shape" in what for what in compare_components(short, fitted))


def test_compare_components_refuses_another_width() -> None:
    random = np.random.default_rng(0)
    wide, narrow = (PCA(2).fit(random.normal(size=(9, n))) for n in (4, 3))
    assert list(compare_components(wide, narrow)) == [
        "expected 3 features and at most 2 components, found the shape (2, 4)"
    ]


@pytest.mark.slow
def test_dask_ml_is_imported_only_to_reduce_features() -> None:
    rooms = "pipeline.run, pipeline.verify, pipeline.results, analysis.reduction, worker.featurize, worker.explore"
    code = "import sys\n" + "".join(f"import fruitdask.{name}\n" for name in rooms.split(", "))
    code += "assert not {'dask_ml', 'sklearn'} & set(sys.modules)\nimport fruitdask\nfruitdask.PCA\n"
    code += "print('dask_ml' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"

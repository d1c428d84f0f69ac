"""Reduction, held against scikit-learn."""

import threading
from collections import Counter
from dataclasses import replace

import dask
import dask.array as da
import numpy as np
import pytest
import sklearn.decomposition
from hypothesis import given, settings, strategies as st
from sklearn.manifold import trustworthiness

from fruitdask.analysis import reduction
from fruitdask.analysis.reduction import (
    PrincipalComponents,
    check_n_components,
    check_solver,
    compare_components,
    embed_tsne,
    fit_pca,
    sample_rows,
)
from fruitdask.errors import ReduceError


def draw_features(n_images: int, n_features: int, *, rank: int = 12, seed: int = 0) -> np.ndarray:
    """Draw features with a few strong directions, a mean far from zero and a little noise, as networks give them."""
    rng = np.random.default_rng(seed)
    strong = rng.normal(size=(n_images, rank)) * np.geomspace(10, 0.5, rank) @ rng.normal(size=(rank, n_features))
    return (strong + 0.05 * rng.normal(size=(n_images, n_features)) + 3).astype(np.float32)


@pytest.mark.parametrize(
    ("n_images", "n_features", "chunk"),
    [(500, 64, 500), (500, 64, 37), (40, 200, 40), (40, 200, 7), (9000, 20, 1000)],
    ids=["one chunk", "many chunks", "wide", "wide in chunks", "several blocks"],
)
def test_fit_pca_equals_sklearn(n_images: int, n_features: int, chunk: int) -> None:
    features = draw_features(n_images, n_features)
    expected = sklearn.decomposition.PCA(6, svd_solver="full").fit(features.astype(np.float64))
    fitted = fit_pca(da.from_array(features, chunks=(chunk, -1)), n_components=6)
    np.testing.assert_allclose(fitted.components, expected.components_, atol=1e-9)
    np.testing.assert_allclose(fitted.mean, expected.mean_, rtol=1e-9)
    np.testing.assert_allclose(fitted.explained_variance, expected.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(fitted.explained_variance_ratio, expected.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(fitted.singular_values, expected.singular_values_, rtol=1e-9)
    np.testing.assert_allclose(fitted.transform(features), expected.transform(features.astype(np.float64)), atol=1e-7)


def test_fit_pca_equals_sklearn_on_ill_conditioned_features() -> None:
    rng = np.random.default_rng(0)
    deviations = np.geomspace(1, 1e-9, 10)
    strong = rng.normal(size=(3000, 10)) * deviations @ np.linalg.qr(rng.normal(size=(40, 40)))[0][:10]
    features = strong + rng.uniform(10, 20, 40)
    features[0] += 1e3  # the first row, about which sums are taken, is an outlier
    expected = sklearn.decomposition.PCA(11, svd_solver="full").fit(features)
    fitted = fit_pca(da.from_array(features, chunks=(250, -1)), n_components=11)
    scores, expected_scores = fitted.transform(features), expected.transform(features)
    # Rounding of the covariance is relative to the largest variance: a billionth of it is known to six digits, a
    # trillionth is not.
    clear = expected.explained_variance_ > 1e-9 * expected.explained_variance_[0]
    assert 3 < clear.sum() < 9
    errors = np.linalg.norm(scores - expected_scores, axis=0) / np.linalg.norm(expected_scores, axis=0)
    assert errors[clear].max() < 1e-6
    np.testing.assert_allclose(fitted.explained_variance[clear], expected.explained_variance_[clear], rtol=1e-6)
    assert (fitted.explained_variance >= 0).all()
    np.testing.assert_allclose(fitted.components @ fitted.components.T, np.eye(11), atol=1e-12)


@settings(max_examples=12)
@given(cuts=st.lists(st.integers(1, 199), max_size=6, unique=True))
def test_fit_pca_does_not_depend_on_chunks(cuts: list[int]) -> None:
    features = draw_features(200, 30)
    sizes = tuple(np.diff([0, *sorted(cuts), 200]).tolist())
    whole = fit_pca(da.from_array(features, chunks=-1), n_components=5)
    fitted = fit_pca(da.from_array(features, chunks=(sizes, -1)), n_components=5)
    np.testing.assert_allclose(fitted.components, whole.components, atol=1e-11)
    np.testing.assert_allclose(fitted.explained_variance, whole.explained_variance, rtol=1e-11)
    np.testing.assert_allclose(fitted.mean, whole.mean, rtol=1e-13)


def test_fit_pca_takes_a_choice_of_rows() -> None:
    features = draw_features(400, 30)
    rows = np.flatnonzero(np.random.default_rng(0).random(400) < 0.7)
    expected = sklearn.decomposition.PCA(4, svd_solver="full").fit(features[rows].astype(np.float64))
    fitted = fit_pca(da.from_array(features, chunks=(64, -1))[rows], n_components=4)
    np.testing.assert_allclose(fitted.components, expected.components_, atol=1e-9)


def test_fit_pca_reads_each_block_once_and_the_first_twice() -> None:
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
        fit_pca(da.concatenate(blocks), n_components=3)
    assert reads == {start: 2 if start == 0 else 1 for start in starts}


@pytest.mark.parametrize(
    ("n_images", "n_features", "n_components"),
    [(30, 500, 6), (30, 500, 0.9), (12, 101, 12)],
    ids=["some", "fraction", "all"],
)
def test_fit_pca_decomposes_many_features_of_few_images(
    n_images: int, n_features: int, n_components: int | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "LARGEST_SIDE", 40)
    features = draw_features(n_images, n_features)
    expected = sklearn.decomposition.PCA(n_components, svd_solver="full").fit(features.astype(np.float64))
    fitted = fit_pca(da.from_array(features, chunks=(8, -1)), n_components=n_components)
    assert fitted.n_components == expected.n_components_
    # The centred features of n images have rank n - 1, at most.
    has_variance = expected.explained_variance_ > 1e-9
    np.testing.assert_allclose(fitted.components[has_variance], expected.components_[has_variance], atol=1e-9)
    np.testing.assert_allclose(fitted.explained_variance, expected.explained_variance_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        fitted.explained_variance_ratio, expected.explained_variance_ratio_, rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(fitted.mean, expected.mean_, rtol=1e-9)


@pytest.mark.parametrize("largest_side", [4096, 4], ids=["covariance", "slabs"])
@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_fit_pca_refuses_images_that_are_all_the_same(
    solver: str, largest_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "LARGEST_SIDE", largest_side)
    row = np.random.default_rng(0).random(7, np.float32)
    features = da.from_array(np.tile(row, (4, 1)), chunks=(3, -1))
    with pytest.raises(ReduceError, match="all 4 images have the same features"):
        fit_pca(features, n_components=2, solver=solver)


def test_fit_pca_takes_differences_far_smaller_than_the_mean() -> None:
    features = draw_features(300, 20).astype(np.float64) * 1e-6 + 1e3
    expected = sklearn.decomposition.PCA(3, svd_solver="full").fit(features)
    fitted = fit_pca(da.from_array(features, chunks=(50, -1)), n_components=3)
    np.testing.assert_allclose(fitted.explained_variance_ratio, expected.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose(fitted.components, expected.components_, atol=1e-6)


def test_fit_pca_equals_dask_ml() -> None:
    decomposition = pytest.importorskip("dask_ml.decomposition")
    features = da.from_array(draw_features(2000, 40), chunks=(500, -1))
    theirs = decomposition.PCA(4, svd_solver="full").fit(features.astype(np.float64))
    ours = fit_pca(features, n_components=4)
    np.testing.assert_allclose(np.abs(np.sum(ours.components * theirs.components_, axis=1)), 1, atol=1e-12)
    np.testing.assert_allclose(ours.explained_variance_ratio, theirs.explained_variance_ratio_, rtol=1e-9)


@pytest.mark.parametrize(
    ("solver", "n_images", "n_features"),
    [("exact", 10**7, 4096), ("exact", 4096, 62_720), ("randomized", 10**7, 62_720)],
    ids=["many images", "many features", "many of both"],
)
def test_check_solver_takes_what_it_can(solver: str, n_images: int, n_features: int) -> None:
    check_solver(solver, n_images=n_images, n_features=n_features)


def test_fit_pca_refuses_many_features_of_many_images() -> None:
    features = da.zeros((5000, 62_720), chunks=(500, -1), dtype=np.float32)
    with pytest.raises(
        ReduceError, match="62,720 features of 5,000 images; set model.pooling to avg, or reduce.solver"
    ):
        fit_pca(features, n_components=2)


@pytest.mark.parametrize("fraction", [0.3, 0.8, 0.999])
def test_fit_pca_fraction_keeps_as_many_components_as_sklearn(fraction: float) -> None:
    features = draw_features(300, 50)
    expected = sklearn.decomposition.PCA(fraction, svd_solver="full").fit(features.astype(np.float64))
    fitted = fit_pca(da.from_array(features, chunks=(100, -1)), n_components=fraction)
    assert fitted.n_components == expected.n_components_
    np.testing.assert_allclose(fitted.components, expected.components_, atol=1e-9)


def test_fit_pca_randomized_finds_the_leading_components() -> None:
    features = draw_features(2000, 256)
    expected = sklearn.decomposition.PCA(5, svd_solver="full").fit(features.astype(np.float64))
    fitted = fit_pca(da.from_array(features, chunks=(300, -1)), n_components=5, solver="randomized", seed=1)
    np.testing.assert_allclose(fitted.explained_variance_ratio, expected.explained_variance_ratio_, rtol=1e-6)
    cosines = np.abs(np.sum(fitted.components * expected.components_, axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    again = fit_pca(da.from_array(features, chunks=(300, -1)), n_components=5, solver="randomized", seed=1)
    np.testing.assert_array_equal(again.components, fitted.components)


def test_transform_is_lazy_on_dask_arrays() -> None:
    features = draw_features(100, 20)
    fitted = fit_pca(da.from_array(features, chunks=(30, -1)), n_components=2)
    scores = fitted.transform(da.from_array(features, chunks=(30, -1)))
    assert isinstance(scores, da.Array)
    np.testing.assert_allclose(scores.compute(), fitted.transform(features), atol=1e-9)


def test_truncate_keeps_the_first_components() -> None:
    fitted = fit_pca(da.from_array(draw_features(100, 20), chunks=(50, -1)), n_components=6)
    fewer = fitted.truncate(2)
    assert isinstance(fewer, PrincipalComponents)
    np.testing.assert_array_equal(fewer.components, fitted.components[:2])
    np.testing.assert_array_equal(fewer.mean, fitted.mean)
    assert len(fewer.explained_variance_ratio) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_components": 11, "n_images": 10}, "n_components is 11, but there are only 10 images with features"),
        ({"n_components": 5, "n_images": 10, "n_features": 4}, "only 4 features; set it to at most 4"),
        ({"n_components": 0.5, "n_images": 1}, "at least 2 images with features, found 1"),
    ],
    ids=["images", "features", "one image"],
)
def test_check_n_components_refuses_what_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ReduceError, match=message):
        check_n_components(**arguments)


def test_embed_tsne_keeps_neighbours_and_is_reproducible() -> None:
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(centre, 0.3, size=(40, 10)) for centre in (-3, 0, 3)])
    embedding = embed_tsne(scores, perplexity=10, seed=3)
    assert embedding.shape == (120, 2) and embedding.dtype == np.float32
    # 1 if every image's five nearest neighbours in the map are among its nearest in the scores (Venna and Kaski 2001).
    assert trustworthiness(scores, embedding, n_neighbors=5) > 0.95
    np.testing.assert_array_equal(embed_tsne(scores, perplexity=10, seed=3), embedding)


def test_embed_tsne_takes_fewer_images_than_its_perplexity() -> None:
    assert embed_tsne(np.random.default_rng(0).normal(size=(5, 3)), perplexity=30).shape == (5, 2)


def test_sample_rows_takes_all_or_a_reproducible_choice() -> None:
    np.testing.assert_array_equal(sample_rows(10, max_rows=10, seed=0), np.arange(10))
    rows = sample_rows(1000, max_rows=100, seed=4)
    assert len(set(rows)) == 100 and (np.diff(rows) > 0).all() and rows.max() < 1000
    np.testing.assert_array_equal(rows, sample_rows(1000, max_rows=100, seed=4))
    assert not np.array_equal(rows, sample_rows(1000, max_rows=100, seed=5))


@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_compare_components_takes_what_a_fit_may_turn(solver: str) -> None:
    random = np.random.default_rng(0)
    # Two directions of the same variance, which any rotation among them describes as well.
    corners = np.array([[3.0, 0, 0, 0], [-3, 0, 0, 0], [0, 3, 0, 0], [0, -3, 0, 0], [0, 0, 1, 0], [0, 0, -1, 0]])
    features = da.from_array(corners + 5, chunks=(2, 4))
    fitted = fit_pca(features, n_components=3, solver=solver)
    angle = random.uniform(0.2, 1.2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turned = np.concatenate([turn @ fitted.components[:2], fitted.components[2:]])
    assert list(compare_components(replace(fitted, components=turned), fitted)) == []
    assert list(compare_components(fitted.truncate(2), fitted)) == []
    wrong = turned[[0, 2, 1]]
    assert list(compare_components(replace(fitted, components=wrong), fitted)) == [
        "components do not match the features"
    ]


@pytest.mark.parametrize("name", ["mean", "explained_variance", "explained_variance_ratio", "singular_values"])
def test_compare_components_names_what_differs(name: str) -> None:
    fitted = fit_pca(da.from_array(np.random.default_rng(0).normal(size=(40, 6)), chunks=(10, 6)), n_components=3)
    changed = replace(fitted, **{name: getattr(fitted, name) * 1.01 + 0.01})
    assert f"{name} does not match the features" in list(compare_components(changed, fitted))
    short = replace(fitted, **{name: getattr(fitted, name)[:-1]})
    assert any("expected the shape" in what for what in compare_components(short, fitted))


def test_compare_components_refuses_another_width() -> None:
    random = np.random.default_rng(0)
    wide, narrow = (fit_pca(da.from_array(random.normal(size=(9, n)), chunks=(3, n)), n_components=2) for n in (4, 3))
    assert list(compare_components(wide, narrow)) == [
        "expected 3 features and at most 2 components, found the shape (2, 4)"
    ]

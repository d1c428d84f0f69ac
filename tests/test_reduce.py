"""Reduction, held against scikit-learn."""

import dask.array as da
import numpy as np
import pytest
import sklearn.decomposition
from sklearn.manifold import trustworthiness

from fruitdask.errors import ReduceError
from fruitdask.reduce import PrincipalComponents, check_n_components, embed_tsne, fit_pca, sample_rows


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

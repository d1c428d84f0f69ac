"""Checks of a reduction before it begins, t-SNE and samples."""

import numpy as np
import pytest
from sklearn.manifold import trustworthiness

from fruitdask.analysis.reduction import check_n_components, check_solver, embed_tsne, sample_rows
from fruitdask.errors import ReduceError


@pytest.mark.parametrize(
    ("solver", "n_images", "n_features"),
    [("covariance_eigh", 10**7, 4096), ("tsqr", 4096, 62_720), ("randomized", 10**7, 62_720)],
    ids=["many images", "many features", "many of both"],
)
def test_check_solver_accepts_possible_solvers(solver: str, n_images: int, n_features: int) -> None:
    check_solver(solver, n_images=n_images, n_features=n_features)


def test_check_solver_lists_solvers_for_an_unknown_one() -> None:
    with pytest.raises(ReduceError, match="covariance_eigh, full, tsqr, randomized, found 'auto'"):
        check_solver("auto", n_images=5, n_features=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_components": 11, "n_images": 10}, "n_components is 11, but there are only 10 images with features"),
        ({"n_components": 5, "n_images": 10, "n_features": 4}, "only 4 features; set it to at most 4"),
        ({"n_components": 0.5, "n_images": 1}, "at least 2 images with features, found 1"),
        ({"n_components": 0, "n_images": 9}, "expected n_components as an integer from 1, .* or None, found 0"),
        ({"n_components": 1.0, "n_images": 9}, "a fraction between 0 and 1, or None, found 1.0"),
    ],
    ids=["images", "features", "one image", "none", "more than all"],
)
def test_check_n_components_refuses_impossible_numbers(arguments: dict, message: str) -> None:
    with pytest.raises(ReduceError, match=message):
        check_n_components(**arguments)


@pytest.mark.slow
def test_embed_tsne_keeps_neighbours_and_is_reproducible() -> None:
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(centre, 0.3, size=(40, 10)) for centre in (-3, 0, 3)])
    embedding = embed_tsne(scores, perplexity=10, seed=3)
    assert embedding.shape == (120, 2) and embedding.dtype == np.float32
    # 1 if every image's five nearest neighbours in the map are among its nearest in the scores (Venna and Kaski 2001).
    assert trustworthiness(scores, embedding, n_neighbors=5) > 0.95
    np.testing.assert_array_equal(embed_tsne(scores, perplexity=10, seed=3), embedding)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [-110, -60, 60, 120])
def test_embed_tsne_does_not_depend_on_the_scale(exponent: int) -> None:
    scores = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    scores /= np.abs(scores).max() * np.float32(1.5)
    scaled = np.ldexp(scores, exponent)
    np.testing.assert_array_equal(embed_tsne(scaled, perplexity=10), embed_tsne(scores, perplexity=10))


def test_embed_tsne_accepts_fewer_images_than_its_perplexity() -> None:
    assert embed_tsne(np.random.default_rng(0).normal(size=(5, 3)), perplexity=30).shape == (5, 2)


def test_sample_rows_takes_all_or_a_reproducible_choice() -> None:
    np.testing.assert_array_equal(sample_rows(10, max_rows=10, seed=0), np.arange(10))
    rows = sample_rows(1000, max_rows=100, seed=4)
    assert len(set(rows)) == 100 and (np.diff(rows) > 0).all() and rows.max() < 1000
    np.testing.assert_array_equal(rows, sample_rows(1000, max_rows=100, seed=4))
    assert not np.array_equal(rows, sample_rows(1000, max_rows=100, seed=5))

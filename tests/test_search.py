"""Search: nearest rows, compared with scikit-learn's brute force."""

import dask.array as da
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from fruitdask.analysis.search import METRICS, find_nearest


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """500 features of 24 numbers far from zero, some of them twice, one of zeros."""
    features = np.random.default_rng(0).normal(100, 1, (500, 24)).astype(np.float32)
    features[400:420] = features[:20]
    features[7] = 0
    return features


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n_rows", [7, 128, 500])
def test_find_nearest_equals_scikit_learn(features: np.ndarray, metric: str, n_rows: int) -> None:
    queries = np.random.default_rng(1).normal(100, 1, (300, 24)).astype(np.float32)
    rows, distances = find_nearest(da.from_array(features, chunks=(n_rows, 24)), queries, k=9, metric=metric)
    index = NearestNeighbors(n_neighbors=9, metric=metric, algorithm="brute").fit(features.astype(np.float64))
    expected, _ = index.kneighbors(queries.astype(np.float64))
    assert rows.dtype == np.int64 and distances.dtype == np.float32
    np.testing.assert_allclose(distances, expected, rtol=1e-6, atol=1e-12)
    # Duplicate rows have the same distance, and scikit-learn does not define their order.
    np.testing.assert_array_equal(np.sort(features[rows].sum(axis=2)), np.sort(features[_].sum(axis=2)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e19, 1e36], ids=str)
def test_find_nearest_accepts_features_whose_squares_are_not_finite(metric: str, scale: float) -> None:
    scaled = (np.random.default_rng(0).normal(0, 1, (103, 24)) * scale).astype(np.float32)
    features, queries = scaled[:100].copy(), scaled[100:]
    features[5] = np.nan
    rows, distances = find_nearest(da.from_array(features, chunks=(30, 24)), queries, k=4, metric=metric)
    known = np.delete(np.arange(100), 5)
    index = NearestNeighbors(n_neighbors=4, metric=metric, algorithm="brute").fit(features[known] / np.float64(scale))
    expected, places = index.kneighbors(queries / np.float64(scale))
    np.testing.assert_array_equal(rows, known[places])
    np.testing.assert_allclose(distances, expected * (scale if metric == "euclidean" else 1), rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_find_nearest_leaves_out_a_query_itself_but_not_its_duplicate(features: np.ndarray, metric: str) -> None:
    own = [0, 405, -1]
    queries = features[[0, 405, 3]]
    rows, distances = find_nearest(da.from_array(features, chunks=(64, 24)), queries, k=3, metric=metric, own=own)
    assert rows[:, 0].tolist() == [400, 5, 3] and rows[2, 1] == 403
    assert np.all(distances[:, 0] < 1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_find_nearest_never_finds_rows_without_features(features: np.ndarray, metric: str) -> None:
    few = features[:6].copy()
    few[[1, 4]] = np.nan
    rows, distances = find_nearest(da.from_array(few, chunks=(2, 24)), features[:1], k=9, metric=metric, own=[0])
    assert sorted(rows[0, :3]) == [2, 3, 5] and (rows[0, 3:] == -1).all()
    assert np.isfinite(distances[0, :3]).all() and np.isposinf(distances[0, 3:]).all()

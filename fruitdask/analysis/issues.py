"""Issues: photographs that a person should look at, found by their features, pixels and files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask.analysis.duplicates import find_close_pairs
from fruitdask.analysis.neighbors import number_contents

Floats = npt.NDArray[np.float32]

#: Kinds of issues, the most serious first, and what they mean.
KINDS: Mapping[str, str] = {
    "label": "probably the wrong class: its nearest neighbours have another one",
    "copy": "the same file as another image",
    "near_duplicate": "nearly the same as an image of another class or split",
    "outlier": "far from the other images of its class",
    "blurry": "much less sharp than its class",
    "dark": "much darker than its class",
    "bright": "much brighter than its class",
    "uniform": "nearly one colour",
    "size": "much larger or smaller than its class",
    "shape": "another aspect ratio than its class",
}
COLUMNS = ("path", "label", "kind", "score", "other", "suggestion", "agreement")

#: Similarities computed at once: 16 MB.
_SIMILARITIES_AT_ONCE = 1 << 22

_SIDES = ("width_px", "height_px")
_MEANS = ["mean_red", "mean_green", "mean_blue"]
#: A label is doubted if the share of votes for another class exceeds that for its own by this much, and ...
_MIN_MARGIN = 0.5
#: ... by this many votes. With one or two, most doubts about overlapping classes of two images were wrong.
_MIN_VOTES = 3
#: A value is odd if it is this many standard deviations from the median of its class (Iglewicz and Hoaglin 1993: 3.5).
_MIN_DEVIATION = 6.0
#: Median absolute deviation of a normal distribution, in standard deviations.
_MAD = 0.6745
#: Fewer images have no meaningful median deviation: that of all classes takes its place.
_MIN_IMAGES = 10
#: Smallest standard deviation assumed for each value, because very uniform classes would make any image odd: levels of
#: brightness (0 to 255), natural logarithms of sharpness, pixels, aspect ratio and distance.
_FLOORS = {"brightness": 6.0, "sharpness": 0.25, "pixels": 0.1, "aspect": 0.02, "distance": 0.1}
#: Images whose brightness (0 to 255) deviates no more than this from black and white levels of grey are one colour.
_UNIFORM_LEVELS = 3.0
#: Near duplicates agree in the means of red, green and blue within this many levels of 255, and ...
_COLOUR_LEVELS = 8.0
#: ... in their features within this cosine distance.
_NEAR_DISTANCE = 0.05


@dataclass(frozen=True, eq=False)
class Reference:
    """Images with which all others are compared."""

    #: Features of unit length, shape (m, n_features).
    features: Floats
    #: Their rows among all images, and class codes, shape (m,), int64.
    rows: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int64]
    #: Their group numbers, shape (m,), int64; None if groups are unknown.
    groups: npt.NDArray[np.int64] | None
    #: Numbers that copies share, shape (m,), uint64.
    contents: npt.NDArray[np.uint64]
    #: Direction of the mean of the features of each class, shape (n_classes, n_features).
    means: Floats

    @classmethod
    def build(
        cls,
        features: Floats,
        rows: npt.NDArray[np.int64],
        codes: npt.NDArray[np.int64],
        groups: npt.NDArray[np.int64] | None,
        *,
        n_classes: int,
    ) -> "Reference":
        """Build the reference from the features of its images, shape (m, n_features)."""
        unit = normalize(features)
        sums = np.zeros((n_classes, unit.shape[1]), np.float32)
        np.add.at(sums, codes, unit)
        return cls(unit, rows, codes, groups, number_contents(features), normalize(sums))


@dataclass(frozen=True, eq=False)
class Votes:
    """What the nearest neighbours say about the classes of n images."""

    #: Class code with the most votes, shape (n,), int64; -1 if there are no votes.
    codes: npt.NDArray[np.int64]
    #: Shares of the votes (0 to 1) for that class, and for the image's own, shape (n,).
    shares: npt.NDArray[np.float64]
    own_shares: npt.NDArray[np.float64]
    #: Number of votes, shape (n,), int64.
    n_votes: npt.NDArray[np.int64]
    #: Share for that class among the neighbours of other groups, shape (n,); NaN where these have no votes, or without
    #: groups.
    group_shares: npt.NDArray[np.float64]
    #: Row of the nearest image of that class, shape (n,), int64.
    nearest: npt.NDArray[np.int64]
    #: Cosine distance to the mean of its own class, shape (n,).
    distances: npt.NDArray[np.float64]

    @classmethod
    def concatenate(cls, parts: Sequence["Votes"]) -> "Votes":
        """Concatenate the votes on parts of the images."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def normalize(features: Floats) -> Floats:
    """Scale rows to unit length; rows of zeros stay so."""
    largest = np.abs(features).max(axis=1, keepdims=True, initial=0)
    # Squares of very small or large numbers would be 0 or infinite in float32.
    scaled = np.divide(features, largest, out=np.zeros_like(features), where=largest > 0)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(np.divide(scaled, lengths, out=scaled, where=lengths > 0))


def collect_votes(
    features: Floats,
    rows: npt.NDArray[np.int64],
    codes: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64] | None,
    reference: Reference,
    *,
    n_neighbors: int,
) -> Votes:
    """
    Let the nearest reference images vote on the classes of images, none on itself or its copies.

    Many copies of one picture, such as "not available", are no evidence: which of them come first is chance.

    Images of the same object find a single wrong label best, so they vote too; `group_shares` says how far the
    neighbours of other groups agree. For an image of a class with fewer images than neighbours, only as many neighbours
    vote as the class has other images, because more could not be of that class.
    """
    size = max(1, _SIMILARITIES_AT_ONCE // len(reference.rows))
    pieces = [slice(start, start + size) for start in range(0, max(1, len(rows)), size)]
    return Votes.concatenate(
        [
            _vote(
                features[piece],
                rows[piece],
                codes[piece],
                None if groups is None else groups[piece],
                reference,
                n_neighbors,
            )
            for piece in pieces
        ]
    )


def _vote(
    features: Floats,
    rows: npt.NDArray[np.int64],
    codes: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64] | None,
    reference: Reference,
    n_neighbors: int,
) -> Votes:
    """Collect the votes on as many images as can be compared at once."""
    unit = normalize(features)
    similarity = unit @ reference.features.T
    is_itself = rows[:, np.newaxis] == reference.rows
    is_itself |= number_contents(features)[:, np.newaxis] == reference.contents
    voters, weights = _find_voters(similarity, is_itself, codes, reference, n_neighbors)
    of_voters = reference.codes[voters]
    counts = (weights[:, np.newaxis] * (of_voters[:, np.newaxis] == of_voters[:, :, np.newaxis])).sum(axis=2)
    best, each = counts.argmax(axis=1), np.arange(len(rows))
    winners, n_votes = of_voters[each, best], np.maximum(weights.sum(axis=1), 1)
    group_shares = np.full(len(rows), np.nan)
    if groups is not None:
        is_same_group = is_itself | (groups[:, np.newaxis] == reference.groups)
        others, other_weights = _find_voters(similarity, is_same_group, codes, reference, n_neighbors)
        with np.errstate(invalid="ignore"):
            group_shares = _count(others, other_weights, winners, reference) / other_weights.sum(axis=1)
    return Votes(
        codes=np.where(weights.any(axis=1), winners, -1),
        shares=counts[each, best] / n_votes,
        own_shares=_count(voters, weights, codes, reference) / n_votes,
        n_votes=weights.sum(axis=1),
        group_shares=group_shares,
        nearest=reference.rows[voters[each, best]],
        distances=1 - np.einsum("ij,ij->i", unit, reference.means[codes]).astype(np.float64),
    )


def _find_voters(
    similarity: Floats,
    is_excluded: npt.NDArray[np.bool_],
    codes: npt.NDArray[np.int64],
    reference: Reference,
    n_neighbors: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Find the nearest reference images, nearest first, and which of them vote, both of shape (n, k)."""
    k = min(n_neighbors, similarity.shape[1])
    remaining = np.where(is_excluded, -np.inf, similarity)
    nearest = np.argpartition(-remaining, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(remaining, nearest, axis=1), axis=1, kind="stable")
    nearest = np.take_along_axis(nearest, order, axis=1)
    n_voters = ((reference.codes == codes[:, np.newaxis]) & ~is_excluded).sum(axis=1, keepdims=True)
    is_there = ~np.take_along_axis(is_excluded, nearest, axis=1)
    return nearest, (np.arange(k) < n_voters) & is_there


def _count(
    voters: npt.NDArray[np.int64],
    weights: npt.NDArray[np.bool_],
    codes: npt.NDArray[np.int64],
    reference: Reference,
) -> npt.NDArray[np.int64]:
    """Count the votes for one class per image."""
    return np.asarray((weights & (reference.codes[voters] == codes[:, np.newaxis])).sum(axis=1))


def find_label_issues(votes: Votes, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Score how probable it is that labels are wrong, 0 to 1; NaN for those that are not doubted."""
    margins = votes.shares - votes.own_shares
    is_clear = (margins >= _MIN_MARGIN) & (margins * votes.n_votes > _MIN_VOTES - 0.5)
    return np.where((votes.codes >= 0) & (votes.codes != codes) & is_clear, margins, np.nan)


def measure_deviations(values: npt.NDArray[Any], codes: npt.NDArray[np.integer], *, floor: float) -> npt.NDArray[Any]:
    """Measure how many robust standard deviations values are above (or below) the median of their class.

    >>> measure_deviations(np.array([1.0, 2, 3, 40]), np.zeros(4, int), floor=1.0).round(1).tolist()
    [-1.0, -0.3, 0.3, 25.3]
    """
    values, order = np.asarray(values, np.float64), np.argsort(codes, kind="stable")
    classes, firsts = np.unique(codes[order], return_index=True)
    deviations, spreads = np.full(len(values), np.nan), np.full(int(classes.max(initial=-1)) + 1, np.nan)
    for code, rows in zip(classes, np.split(order, firsts[1:]), strict=False):
        with np.errstate(invalid="ignore"):
            deviations[rows] = values[rows] - _find_median(values[rows])
        if np.count_nonzero(~np.isnan(deviations[rows])) >= _MIN_IMAGES:
            spreads[code] = _find_median(np.abs(deviations[rows]))
    spreads[np.isnan(spreads)] = _find_median(np.abs(deviations))
    with np.errstate(divide="ignore", invalid="ignore"):
        deviations /= np.maximum(spreads / _MAD, floor)[codes]
    return deviations


def _find_median(values: npt.NDArray[np.float64]) -> float:
    """Return the median of the known values; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(np.median(known, overwrite_input=True)) if len(known) else np.nan


def find_odd_values(
    images: pd.DataFrame, codes: npt.NDArray[np.integer], distances: npt.NDArray[Any]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield kinds of issues, and for each the scores of all images, 0 to 1; NaN for those without it.

    `images` are findings of an exploration, if there are any; `distances` those of the images to their classes.
    """
    with np.errstate(divide="ignore"):
        far = measure_deviations(np.log(np.maximum(distances, 1e-6)), codes, floor=_FLOORS["distance"])
    yield "outlier", _score(far)
    if "mean_red" in images:
        brightness = images[_MEANS].mean(axis=1).to_numpy(np.float64)
        deviations = measure_deviations(brightness, codes, floor=_FLOORS["brightness"])
        yield "dark", _score(-deviations)
        yield "bright", _score(deviations)
        width, height = (images[name].astype("Float64").to_numpy(np.float64, na_value=np.nan) for name in _SIDES)
        with np.errstate(divide="ignore", invalid="ignore"):
            for kind, value in (("pixels", width * height), ("aspect", width / height)):
                deviations = measure_deviations(np.log(value), codes, floor=_FLOORS[kind])
                yield ("size" if kind == "pixels" else "shape"), _score(np.abs(deviations))
    if "sharpness" in images:
        sharpness, contrast = (images[name].to_numpy(np.float64) for name in ("sharpness", "contrast"))
        is_uniform = contrast < _UNIFORM_LEVELS
        yield "uniform", np.where(is_uniform, 1 - contrast / (2 * _UNIFORM_LEVELS), np.nan)
        # Edges grow with contrast, which the brightness of the light determines too.
        relative = np.maximum(sharpness, 1e-3) / np.maximum(contrast, 1) ** 2
        deviations = measure_deviations(np.log(relative), codes, floor=_FLOORS["sharpness"])
        yield "blurry", np.where(is_uniform, np.nan, _score(-deviations))


def _score(deviations: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Score deviations above the limit: 0.5 at the limit, towards 1 far beyond it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(deviations > _MIN_DEVIATION, 1 - _MIN_DEVIATION / (2 * deviations), np.nan)


def find_copies(groups: pd.Series) -> npt.NDArray[np.int64]:
    """Find for each copy the row of the first image with the same content, shape (n,), int64; -1 for the others.

    `groups` are numbers of equal files, NaN for files without a copy.

    >>> find_copies(pd.Series([0, 1, np.nan, 0, 1])).tolist()
    [-1, -1, -1, 0, 1]
    """
    firsts, rows = np.full(len(groups), -1, np.int64), np.flatnonzero(groups.notna())
    numbers = groups.to_numpy()[rows]
    _, places, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    firsts[rows] = rows[places[inverse]]
    return np.where(firsts == np.arange(len(groups)), -1, firsts)


def find_near_pairs(images: pd.DataFrame, parts: npt.NDArray[np.int64], *, max_bits: int) -> npt.NDArray[np.int64]:
    """Find pairs of images of different parts (class and split) whose perceptual hashes and mean colours agree.

    Returns index labels of `images`, which are positions in `parts`, shape (2, n_pairs), int64. Equal files are
    not pairs. If many images of a part look the same, one of them represents all, so that their number does not matter.
    """
    known = images[images["has_look"]]
    looks = (known[_MEANS] // (_COLOUR_LEVELS / 2)).assign(hash=known["perceptual_hash"], part=parts[known.index])
    rows = looks.drop_duplicates().index.to_numpy()
    chosen = images.loc[rows]
    hashes, contents = (chosen[name].to_numpy() for name in ("perceptual_hash", "duplicate_group"))
    colours = chosen[_MEANS].to_numpy(np.float64)
    found = [np.empty((2, 0), np.int64)]
    for pairs in find_close_pairs(hashes, max_bits):
        first, second = pairs
        is_pair = (np.abs(colours[first] - colours[second]) <= _COLOUR_LEVELS).all(axis=1)
        # Files without a copy differ from all others: NaN is not equal to itself.
        is_pair &= (parts[rows[first]] != parts[rows[second]]) & (contents[first] != contents[second])
        found.append(rows[pairs[:, is_pair]])
    return np.unique(np.concatenate(found, axis=1), axis=1)


def measure_pairs(first: Floats, second: Floats) -> npt.NDArray[np.float64]:
    """Score pairs of near duplicates by the cosine distance of their features, 0 to 1; NaN for other pairs."""
    distances = 1 - np.einsum("ij,ij->i", normalize(first), normalize(second)).astype(np.float64)
    return np.where(distances <= _NEAR_DISTANCE, 1 - distances / (2 * _NEAR_DISTANCE), np.nan)


def rank_issues(issues: pd.DataFrame) -> pd.DataFrame:
    """Sort issues, the most serious first: by kind, then by score."""
    order = {kind: place for place, kind in enumerate(KINDS)}
    keyed = issues.assign(_order=issues["kind"].map(order))
    ranked = keyed.sort_values(["_order", "score", "path"], ascending=[True, False, True], kind="stable")
    return ranked.drop(columns="_order").reset_index(drop=True)

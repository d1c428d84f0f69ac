"""Issues: photographs that a person should look at, found by their features, pixels and files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

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
_FLOORS = {"brightness": 6.0, "sharpness": 0.25, "size": 0.1, "shape": 0.02, "distance": 0.1}
#: What is computed from the width and height of an image.
_SIZES: Mapping[str, Callable[..., Floats]] = {"size": np.multiply, "shape": np.divide}
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

    #: Class code with the most votes, shape (n,), int64; -1 where there are no votes.
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


def measure_deviations(
    values: npt.NDArray[np.floating], codes: npt.NDArray[np.integer], *, floor: float
) -> npt.NDArray[np.floating]:
    """Measure how many robust standard deviations values are above (or below) the median of their class.

    >>> measure_deviations(np.array([1.0, 2, 3, 40]), np.zeros(4, int), floor=1.0).round(1).tolist()
    [-1.0, -0.3, 0.3, 25.3]
    """
    order, sizes = np.argsort(codes, kind="stable").astype(np.int32), np.bincount(codes)
    deviations, spreads = np.full_like(values, np.nan), np.full(len(sizes), np.nan, values.dtype)
    for code, rows in enumerate(np.split(order, np.cumsum(sizes)[:-1])):
        with np.errstate(invalid="ignore"):
            deviations[rows] = values[rows] - _find_median(values[rows])
        if np.count_nonzero(~np.isnan(deviations[rows])) >= _MIN_IMAGES:
            spreads[code] = _find_median(np.abs(deviations[rows]))
    # Of millions of images, two such arrays less count.
    del order
    spreads[np.isnan(spreads)] = _find_median(np.abs(deviations))
    with np.errstate(divide="ignore", invalid="ignore"):
        deviations /= np.maximum(spreads / _MAD, floor)[codes]
    return deviations


def _find_median(values: npt.NDArray[np.floating]) -> float:
    """Return the median of the known values; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(np.median(known, overwrite_input=True)) if len(known) else np.nan


def find_odd_values(
    read: Callable[..., pd.DataFrame] | None, codes: npt.NDArray[np.integer], distances: Floats
) -> Iterator[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.floating]]]:
    """Yield kinds of issues, and for each the rows of the images that have it and their scores, 0 to 1.

    `read` reads columns of the findings of an exploration for all images, as float32; None if there is none.
    `distances` are those of the images to their classes. Both are NaN where nothing is known.
    """
    yield "outlier", *_score(measure_deviations(np.log(np.maximum(distances, 1e-6)), codes, floor=_FLOORS["distance"]))
    if read is None:
        return
    deviations = measure_deviations(read(*_MEANS).to_numpy().mean(axis=1), codes, floor=_FLOORS["brightness"])
    yield "dark", *_score(-deviations)
    yield "bright", *_score(deviations)
    # Of ten million images, each array takes 40 MB.
    del deviations
    for kind, combine in _SIZES.items():
        values = _combine_sides(combine, read("width_px", "height_px"))
        yield kind, *_score(np.abs(measure_deviations(values, codes, floor=_FLOORS[kind])))
        del values
    yield from _find_odd_sharpness(read("sharpness", "contrast").to_numpy().T, codes)


def _combine_sides(combine: Callable[..., Floats], sides: pd.DataFrame) -> Floats:
    """Compute the logarithm of what is computed from width and height."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(combine(sides["width_px"].to_numpy(), sides["height_px"].to_numpy()))


def _find_odd_sharpness(
    values: Floats, codes: npt.NDArray[np.integer]
) -> Iterator[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.floating]]]:
    """Yield the images of one colour, and of the others those that are blurry, from sharpness and contrast (2, n)."""
    is_uniform = values[1] < _UNIFORM_LEVELS
    rows = np.flatnonzero(is_uniform)
    yield "uniform", rows, 1 - values[1, rows] / (2 * _UNIFORM_LEVELS)
    # Edges grow with contrast, which the brightness of the light determines too.
    relative = np.log(np.maximum(values[0], 1e-3)) - 2 * np.log(np.maximum(values[1], 1))
    del values
    deviations = measure_deviations(relative, codes, floor=_FLOORS["sharpness"])
    deviations[is_uniform] = np.nan
    yield "blurry", *_score(-deviations)


def _score(deviations: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
    """Return the rows of deviations above the limit, and scores: 0.5 at the limit, towards 1 far beyond it."""
    rows = np.flatnonzero(deviations > _MIN_DEVIATION)
    return rows, 1 - _MIN_DEVIATION / (2 * deviations[rows])


def find_copies(groups: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the rows of copies, and for each the row of the first image with the same content, int64.

    `groups` are numbers of equal files, -1 for files without a copy.

    >>> find_copies(np.array([0, 1, -1, 0, 1]))
    (array([3, 4]), array([0, 1]))
    """
    rows = np.flatnonzero(groups >= 0)
    _, places, inverse = np.unique(groups[rows], return_index=True, return_inverse=True)
    firsts = rows[places[inverse]]
    is_copy = firsts != rows
    return rows[is_copy], firsts[is_copy]


def find_near_pairs(images: pd.DataFrame, *, max_bits: int) -> npt.NDArray[np.int64]:
    """Find pairs of images of different parts (class and split) whose perceptual hashes and mean colours agree.

    `images` have the columns ``perceptual_hash`` (uint64), ``part``, ``duplicate_group`` and their mean colours.
    Returns their index labels, shape (2, n_pairs), int64. Equal files are not pairs. If many images of a part look the
    same, one of them represents all, so that their number does not matter.
    """
    looks = (images[_MEANS] // (_COLOUR_LEVELS / 2)).assign(hash=images["perceptual_hash"], part=images["part"])
    chosen = images[~looks.duplicated()]
    rows, colours = chosen.index.to_numpy(np.int64), chosen[_MEANS].to_numpy()
    hashes, parts, contents = (chosen[name].to_numpy() for name in ("perceptual_hash", "part", "duplicate_group"))
    found = [np.empty((2, 0), np.int64)]
    for pairs in find_close_pairs(hashes, max_bits):
        first, second = pairs
        is_pair = (np.abs(colours[first] - colours[second]) <= _COLOUR_LEVELS).all(axis=1)
        is_pair &= (parts[first] != parts[second]) & ((contents[first] != contents[second]) | (contents[first] < 0))
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

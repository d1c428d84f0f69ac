"""Comparison of two sets of features or scores of the same images: their paths matched, their agreement in words."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pandas as pd

#: Row of a path without a partner, and of one with several.
UNMATCHED, AMBIGUOUS = -1, -2
#: Parts that two paths must share where neither ends with the other: a folder and a file.
_LEAST_PARTS = 2
#: The same network and pixels differ by 1e-4 relative at most between engines, which is a cosine of 1 - 5e-9; 1e-5 is
#: that of a relative difference of 0.0045.
_COSINE_TOLERANCE, _ERROR_TOLERANCE = 1e-5, 5e-3
#: Between these lie the medians of MobileNetV2 on 60 photographs: 0.995 bilinear and 0.960 nearest instead of bicubic
#: resizing, but 0.708 with blue and red exchanged.
_SIMILAR_COSINE = 0.9
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:/*")


@dataclass(frozen=True, eq=False)
class AlignedScores:
    """How the scores of components agree; each array has one entry per component."""

    #: 1 or -1: the factor that gives theirs our sign.
    signs: npt.NDArray[np.float64]
    #: Mean of their scores minus the mean of ours with that sign.
    offsets: npt.NDArray[np.float64]
    correlations: npt.NDArray[np.float64]
    #: Norm of the remaining differences, relative to the larger one of the scores around their means.
    errors: npt.NDArray[np.float64]
    #: Norm of each image's remaining difference, relative to the standard deviation of all of ours (n,).
    image_errors: npt.NDArray[np.float64]


def match_paths(ours: Sequence[str], theirs: Sequence[str], *, root: str = "") -> npt.NDArray[np.int64]:
    """Match paths by the longest common ending of whole parts that is unique on both sides.

    `ours` are relative to `root`, and `theirs` have any prefix and may be percent-encoded. One of two paths must end
    with all parts of the other; only where no two paths do so, two common parts are enough. Returns the row in `ours`
    of each of `theirs`, int64, `UNMATCHED` or `AMBIGUOUS`.

    >>> match_paths(["a/1.jpg", "b/1.jpg"], ["s3a://x/b/1.jpg", "file:///x/c/1.jpg"]).tolist()
    [1, -1]
    >>> match_paths(["a/1.jpg"], ["file:/x/a/1.jpg", "file:/y/a/1.jpg"], root="/data/y").tolist()
    [-1, 0]
    """
    above = _normalize(root)
    whole = [f"{above}/{path}".lstrip("/") for path in ours]
    n_needed = [path.count("/") + 1 for path in ours]
    rows = np.full(len(theirs), UNMATCHED)
    for is_strict in (True, False):
        for decode in (str, unquote):
            is_left = (rows == UNMATCHED).tolist()
            spelling = [_normalize(decode(path)) if left else "" for path, left in zip(theirs, is_left, strict=True)]
            _match_endings(whole, n_needed, spelling, rows, is_strict=is_strict)
        if (rows != UNMATCHED).any():
            break
    return rows


def compare_vectors(
    ours: npt.NDArray[np.floating], theirs: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Compare the rows of two matrices (n, d): cosines, and differences relative to the larger norm, float64.

    Two rows of zeros are equal; one has no direction, so that its cosine with others is 0.
    """
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
    scale, largest = norms[0] * norms[1], np.maximum(*norms)
    products = np.einsum("ij,ij->i", ours, theirs)
    cosines = np.divide(products, scale, out=np.where(largest > 0, 0.0, 1.0), where=scale > 0)
    differences = np.linalg.norm(ours - theirs, axis=1)
    errors = np.divide(differences, largest, out=np.zeros(len(ours)), where=largest > 0)
    is_known = np.isfinite(largest)
    return np.where(is_known, cosines, np.nan), np.where(is_known, errors, np.nan)


def align_scores(ours: npt.NDArray[np.floating], theirs: npt.NDArray[np.floating]) -> AlignedScores:
    """Align scores (n, k) of the same images with ours by sign and offset, and measure the remaining differences."""
    x, y = ours.astype(np.float64), theirs.astype(np.float64)
    means = x.mean(axis=0), y.mean(axis=0)
    x, y = x - means[0], y - means[1]
    products, spreads = (x * y).sum(axis=0), (np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
    signs = np.where(products < 0, -1.0, 1.0)
    left = y - signs * x
    scale = spreads[0] * spreads[1]
    correlations = np.divide(signs * products, scale, out=np.zeros_like(scale), where=scale > 0)
    largest = np.maximum(*spreads)
    errors = np.linalg.norm(left, axis=0) / np.where(largest > 0, largest, np.inf)
    total = np.linalg.norm(x) / np.sqrt(len(x))
    image_errors = np.linalg.norm(left, axis=1) / (total if total > 0 else np.inf)
    return AlignedScores(signs, means[1] - signs * means[0], correlations, errors, image_errors)


def judge_features(table: pd.DataFrame) -> tuple[bool, str]:
    """Say in one sentence whether features agree, with likely causes if not; the table has a row per image."""
    compared = table[table["status"] == "compared"]
    if compared.empty:
        return False, "Nothing could be compared: no matched image has features on both sides."
    cosine, error = compared["cosine"], compared["relative_error"]
    is_bad = (cosine < 1 - _COSINE_TOLERANCE) | (error > _ERROR_TOLERANCE)
    n_bad, middle, worst = int(is_bad.sum()), float(cosine.median()), float(cosine.min())
    if not n_bad:
        n_left = len(table) - len(compared)
        which = (
            f"{len(compared):,} of {len(table):,} images could be compared and"
            if n_left
            else f"all {len(table):,} images"
        )
        return True, f"Features agree: {which} have a cosine of 1 within {max(0, 1 - worst):.1g}."
    if 2 * n_bad < len(compared):
        example = compared["path"].iloc[int(error.argmax())]
        return False, (
            f"Features of {n_bad:,} of {len(compared):,} images differ, such as {example}, and the others agree: these "
            "files probably changed between the two jobs, or were decoded in another way."
        )
    if middle >= 1 - _COSINE_TOLERANCE:
        return False, (
            f"Features point the same way (median cosine {middle:.6f}) but their lengths differ (median relative "
            f"difference {error.median():.2g}): one side probably scales or normalizes them."
        )
    if middle >= _SIMILAR_COSINE:
        return False, (
            f"Features are close but not the same (median cosine {middle:.4f}): decoding or resizing probably differs "
            "(Spark's ImageSchema resizes with Java, fruitdask with Pillow), or the precision of the network."
        )
    return False, (
        f"Features differ (median cosine {middle:.3f}): likely causes are another network, layer or weights, another "
        "preprocessing of pixels, or the order of colours (Spark's ImageSchema stores BGR)."
    )


def judge_scores(components: pd.DataFrame) -> tuple[bool, str]:
    """Say in one sentence whether scores agree; the table has a row per component."""
    bad = components[components["relative_error"] > 2 * _ERROR_TOLERANCE]
    if bad.empty:
        return True, f"Scores of {len(components)} components agree once signs and offsets are removed."
    numbers = ", ".join(str(number) for number in bad["component"])
    return False, (
        f"Scores do not agree on components {numbers} even without signs and offsets: the two PCAs were probably "
        "fitted on different images (rows of zeros count in Spark's), or their variances are nearly equal."
    )


def _normalize(path: str) -> str:
    """Write a path or URL without its scheme and empty parts."""
    return "/".join(part for part in _SCHEME.sub("", path).split("/") if part not in ("", "."))


def _cut_ending(path: str, n_parts: int) -> str | None:
    """Cut off the last parts of a path; None if it has fewer.

    >>> _cut_ending("x/a/1.jpg", 2), _cut_ending("1.jpg", 2)
    ('a/1.jpg', None)
    """
    parts = path.rsplit("/", n_parts)
    return path[len(parts[0]) + 1 :] if len(parts) > n_parts else path if len(parts) == n_parts else None


def _match_endings(
    ours: Sequence[str],
    n_needed: Sequence[int],
    theirs: Sequence[str],
    rows: npt.NDArray[np.int64],
    *,
    is_strict: bool,
) -> None:
    """Match the remaining paths, the longest common endings first; writes into `rows`.

    `n_needed` are the parts of our paths that must be common where the other path is longer.
    """
    free, pending = set(range(len(ours))) - set(rows.tolist()), np.flatnonzero(rows == UNMATCHED).tolist()
    lengths = [path.count("/") + 1 for path in theirs]
    for n_parts in range(
        max((lengths[place] for place in pending), default=0), 0 if is_strict else _LEAST_PARTS - 1, -1
    ):
        # Rows by ending: of our paths that are not longer than the ending; and of all, if theirs are not longer.
        contained = _index_endings(ours, [row for row in free if n_parts >= n_needed[row]], n_parts)
        is_short = not is_strict or any(lengths[place] == n_parts for place in pending)
        everything = _index_endings(ours, range(len(ours)), n_parts) if is_short else {}
        found: dict[int, list[int]] = {}
        for place in pending:
            ending = _cut_ending(theirs[place], n_parts)
            index = everything if not is_strict or lengths[place] == n_parts else contained
            partner = index.get(ending or "", UNMATCHED)
            if partner in free or partner == AMBIGUOUS:
                found.setdefault(partner, []).append(place)
        for partner, places in found.items():
            rows[places] = partner if len(places) == 1 else AMBIGUOUS
        free -= found.keys()
        pending = [place for place in pending if rows[place] == UNMATCHED]


def _index_endings(paths: Sequence[str], rows: Iterable[int], n_parts: int) -> dict[str, int]:
    """Find the row of each ending of some paths; `AMBIGUOUS` where several have it."""
    index: dict[str, int] = {}
    for row in rows:
        if ending := _cut_ending(paths[row], n_parts):
            index[ending] = AMBIGUOUS if ending in index else row
    return index

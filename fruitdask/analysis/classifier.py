"""Classifier: a linear probe on features, its evaluation, and when it should answer unknown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fruitdask.analysis.evaluation import number_groups
from fruitdask.analysis.neighbors import number_contents, scale_to_one
from fruitdask.errors import TrainingError

Floats = npt.NDArray[np.float32]

#: Inverse strength of regularization of standardized features, times their number: more features overfit a small
#: training set more easily.
_C_TIMES_FEATURES = 10.0
_MAX_ITERATIONS = 1_000
#: Neighbours that vote in the second classifier.
_N_NEIGHBORS = 5
_MAX_FOLDS = 5
#: Classes in a table of confusions.
_MAX_CONFUSED = 300
#: A new image is unknown if its nearest training image is farther than that of this fraction of the held-out images.
_KNOWN_FRACTION = 0.99
#: Label of an image that is unlike all training images.
UNKNOWN_LABEL = "unknown"
#: Relative errors of features from batches of different size, at most.
_ROUNDING = 1e-6
#: Two-sided 95 % quantile of the normal distribution.
_Z = 1.959964


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A multinomial logistic regression on standardized features, as arrays."""

    #: Mean and standard deviation of each feature, shape (n_features,).
    mean: Floats
    scale: Floats
    #: Shape (n_features, n_classes), and (n_classes,).
    weights: Floats
    bias: Floats

    def predict_proba(self, features: Floats) -> npt.NDArray[np.float64]:
        """Return the probability of each class, shape (n, n_classes)."""
        logits = ((features - self.mean) / self.scale) @ self.weights + self.bias
        exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


#: Arrays of a probe, and their dimensions.
PROBE_ARRAYS = {
    "mean": ("feature",),
    "scale": ("feature",),
    "weights": ("feature", "class"),
    "bias": ("class",),
}


def fit_probe(features: Floats, codes: npt.NDArray[np.int64]) -> LinearProbe:
    """Fit a linear probe to features of shape (n, n_features) and the class codes of the rows, 0 to n_classes - 1."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    # A feature that changes by no more than the rounding of float32 says nothing.
    scale[scale <= _ROUNDING * np.abs(mean)] = 1
    standardized = (features - mean) / scale
    model = LogisticRegression(C=_C_TIMES_FEATURES / features.shape[1], max_iter=_MAX_ITERATIONS).fit(
        standardized, codes
    )
    weights, bias = model.coef_.T, model.intercept_
    if weights.shape[1] == 1:
        # For two classes, scikit-learn stores the logits of the second only.
        weights, bias = np.concatenate([0 * weights, weights], axis=1), np.concatenate([0 * bias, bias])
    arrays = (mean, scale, weights, bias)
    return LinearProbe(*(np.asarray(each, np.float32) for each in arrays))


def choose_folds(
    codes: npt.NDArray[np.int64], groups: npt.NDArray[np.int64] | None
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Choose folds with all classes in each training set as far as possible, and no group on both sides."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if groups is None:
        n_folds = min(_MAX_FOLDS, int(np.bincount(codes).min()))
        splits = StratifiedKFold(n_folds, shuffle=True, random_state=0).split(codes, codes)
    else:
        pairs = np.unique(np.stack([codes, groups]), axis=1)
        n_folds = min(_MAX_FOLDS, int(np.bincount(pairs[0]).min()))
        splits = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0).split(codes, codes, groups)
    return list(splits)


def train(
    features: Floats, labels: npt.NDArray[Any], groups: npt.NDArray[Any] | None = None
) -> tuple[LinearProbe, dict[str, Any]]:
    """
    Train a linear probe, and evaluate it and the vote of nearest neighbours by cross-validation.

    No group is in both the training and the test part of a fold, and no image and its copy. Returns the probe, fitted
    to all images, and JSON: ``classes``; ``n_images``, ``n_groups`` (None without groups), ``n_folds``; for
    ``linear_probe`` and ``nearest_neighbors`` the ``accuracy`` and its 95 % ``interval``, ``by_class`` the recall with
    its interval, the precision and the number of images, and ``confusion``, counts with true classes in rows, of the
    classes ``confused``, which are those with the most errors if there are very many;
    ``unknown_distance``, the cosine distance from the nearest training image beyond which an image is unknown.
    """
    classes, codes = np.unique(np.asarray(labels, str), return_inverse=True)
    numbers = _number_copies(features) if groups is None else number_groups(groups)
    _check(classes, codes, numbers, are_copies=groups is None)
    folds = choose_folds(codes, numbers)
    guesses = {name: np.full(len(codes), -1) for name in ("linear_probe", "nearest_neighbors")}
    distances = np.full(len(codes), np.nan)
    contents = number_contents(features)
    for known, held_out in folds:
        # Copies may be in several groups, which must not be tested on each other.
        known = known[~np.isin(contents[known], contents[held_out])]
        if not len(known):
            raise TrainingError(
                "expected groups with images of their own, found only copies of the same images in several groups; a "
                "classifier cannot be tested on the images it was trained on: add images, or change input.group_from"
            )
        present, local = np.unique(codes[known], return_inverse=True)
        guesses["linear_probe"][held_out] = present[_ask_probe(features[known], local, features[held_out])]
        voted, distances[held_out] = _ask_neighbors(features[known], local, features[held_out])
        guesses["nearest_neighbors"][held_out] = present[voted]
    report = {
        "classes": classes.tolist(),
        "n_images": len(codes),
        "n_groups": None if groups is None or numbers is None else len(np.unique(numbers)),
        "n_folds": len(folds),
        # Of equal features the distance is not always 0.
        "unknown_distance": max(float(np.quantile(distances, _KNOWN_FRACTION)), float(np.finfo(np.float32).eps)),
    }
    evaluated = {name: evaluate(codes, guess, classes.tolist(), numbers) for name, guess in guesses.items()}
    return fit_probe(features, codes), report | evaluated


def evaluate(
    codes: npt.NDArray[np.int64],
    guesses: npt.NDArray[np.int64],
    classes: list[str],
    groups: npt.NDArray[np.int64] | None,
) -> dict[str, Any]:
    """Compare out-of-fold predictions with the labels."""
    n_classes, is_right = len(classes), guesses == codes
    guessed = np.bincount(guesses, minlength=n_classes)
    right = np.bincount(codes[is_right], minlength=n_classes)
    wrong = np.bincount(codes[~is_right], minlength=n_classes)
    # A table of all pairs of 10,000 classes would take gigabytes.
    shown = np.sort(np.argsort(-wrong, kind="stable")[:_MAX_CONFUSED])
    place = np.full(n_classes, -1)
    place[shown] = np.arange(len(shown))
    pairs = np.stack([place[codes], place[guesses]])
    confusion = np.zeros((len(shown), len(shown)), np.int64)
    np.add.at(confusion, tuple(pairs[:, (pairs >= 0).all(axis=0)]), 1)
    return {
        "accuracy": float(is_right.mean()),
        "interval": measure_interval(is_right, groups),
        "by_class": {
            name: {
                "n_images": int((codes == code).sum()),
                "recall": float(is_right[codes == code].mean()),
                "interval": measure_interval(
                    is_right[codes == code], None if groups is None else groups[codes == code]
                ),
                "precision": float(right[code] / max(1, guessed[code])),
            }
            for code, name in enumerate(classes)
        },
        "confused": [classes[code] for code in shown],
        "confusion": confusion.tolist(),
    }


def measure_interval(is_right: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64] | None) -> list[float]:
    """
    Measure the 95 % interval of a fraction, 0 to 1 (Wilson 1927).

    Images of one group are right or wrong together, so with groups the number of images counts as divided by the design
    effect (Kish 1965): the variance between groups over that of as many independent images; never less than one.
    """
    n, p = len(is_right), float(is_right.mean())
    effective = float(n)
    if groups is not None and 0 < p < 1:
        _, numbers = np.unique(groups, return_inverse=True)
        excess = np.bincount(numbers, weights=is_right - p)
        n_groups = len(excess)
        variance = (excess**2).sum() / n**2 * n_groups / max(1, n_groups - 1)
        effective = max(1.0, min(float(n), p * (1 - p) / variance)) if variance else float(n)
    elif groups is not None:
        effective = float(len(np.unique(groups)))
    middle = (p + _Z**2 / (2 * effective)) / (1 + _Z**2 / effective)
    half = _Z * np.sqrt(p * (1 - p) / effective + _Z**2 / (4 * effective**2)) / (1 + _Z**2 / effective)
    # Where all are right or all are wrong, a limit is that fraction itself, not a rounding error beside it.
    return [0.0 if p == 0 else float(max(0.0, middle - half)), 1.0 if p == 1 else float(min(1.0, middle + half))]


def predict(
    probe: LinearProbe, report: Mapping[str, Any], features: Floats, distances: Floats
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.float64]]:
    """Predict the labels and their probabilities; `unknown` where the nearest training image is too far away."""
    probabilities = probe.predict_proba(features)
    best = probabilities.argmax(axis=1)
    labels = np.asarray(report["classes"], str)[best]
    is_known = distances <= report["unknown_distance"]
    return np.where(is_known, labels, UNKNOWN_LABEL), probabilities[np.arange(len(best)), best]


def _ask_probe(known: Floats, codes: npt.NDArray[np.int64], features: Floats) -> npt.NDArray[np.int64]:
    """Predict with a probe of the known images; if these are of a single class, predict that."""
    if not codes.any():
        return np.zeros(len(features), np.int64)
    return np.asarray(fit_probe(known, codes).predict_proba(features).argmax(axis=1))


def _ask_neighbors(
    known: Floats, codes: npt.NDArray[np.int64], features: Floats
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Let the nearest known images vote; returns class codes, and distances to the nearest image."""
    from sklearn.neighbors import KNeighborsClassifier

    known, features = scale_to_one(known, "cosine"), scale_to_one(features, "cosine")
    model = KNeighborsClassifier(min(_N_NEIGHBORS, len(known)), metric="cosine", algorithm="brute").fit(known, codes)
    return model.predict(features), model.kneighbors(features, 1)[0][:, 0]


def _number_copies(features: Floats) -> npt.NDArray[np.int64] | None:
    """Number images so that copies, which have the same features, share a number; None if there are none."""
    contents, numbers = np.unique(number_contents(features), return_inverse=True)
    return None if len(contents) == len(features) else numbers


def _check(
    classes: npt.NDArray[Any], codes: npt.NDArray[np.int64], groups: npt.NDArray[np.int64] | None, *, are_copies: bool
) -> None:
    """Refuse images on which no classifier can be trained or evaluated."""
    if len(classes) < 2:
        found = f"only {str(classes[0])!r}" if len(classes) else "no image with features"
        raise TrainingError(f"expected images of at least 2 classes, found {found}; check input.label_from")
    if UNKNOWN_LABEL in classes:
        raise TrainingError(
            f"expected no class {UNKNOWN_LABEL!r}, which is the label of images that are unlike all training images; "
            "rename that class, or leave it out with input.classes"
        )
    counts = np.bincount(codes)
    if counts.min() < 2:
        raise TrainingError(
            f"expected at least 2 images with features of each class, found 1 of {str(classes[counts.argmin()])!r}; "
            "add images, or leave the class out with input.classes"
        )
    if groups is None:
        return
    counts = np.bincount(np.unique(np.stack([codes, groups]), axis=1)[0])
    if counts.min() < 2 and are_copies:
        raise TrainingError(
            f"expected at least 2 different images of each class, found only copies of one of "
            f"{str(classes[counts.argmin()])!r}; add images, or leave the class out with input.classes"
        )
    if counts.min() < 2:
        raise TrainingError(
            f"expected images of at least 2 groups of each class, found 1 group of {str(classes[counts.argmin()])!r}; "
            "a classifier cannot be tested on the object it was trained on: add objects, or change input.group_from"
        )

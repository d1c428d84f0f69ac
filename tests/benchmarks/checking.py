"""How well fruitdask finds wrong labels: flips labels of finished runs at random, and compares the list with the flips.

    python tests/benchmarks/checking.py RESULTS [RESULTS ...]

RESULTS are folders of finished runs whose labels are right. Prints a table: precision and recall of the list, precision
of its top (as many images as were flipped), that of a random list, and how many suggestions are right; the row without
flips shows the false alarms. Also prints how far to trust a classifier, with and without groups.
"""

import argparse

import numpy as np

import fruitdask
from fruitdask.analysis import classifier, issues
from fruitdask.core.config import CheckConfig

_FRACTIONS = (0.0, 0.01, 0.05, 0.1)
_SEEDS = 3


def judge(features: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score the labels; returns the scores and the suggested classes."""
    rows = np.arange(len(codes))
    reference = issues.Reference.build(features, rows, codes, None, n_classes=int(codes.max()) + 1)
    n_neighbors = CheckConfig().n_neighbors
    votes = issues.collect_votes(features, rows, codes, None, reference, n_neighbors=n_neighbors)
    return issues.find_label_issues(votes, codes), votes.codes


def flip(codes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Give a fraction of the images another label at random."""
    rng, wrong = np.random.default_rng(seed), codes.copy()
    chosen = rng.choice(len(codes), round(fraction * len(codes)), replace=False)
    wrong[chosen] = (codes[chosen] + rng.integers(1, codes.max() + 1, len(chosen))) % (codes.max() + 1)
    return wrong


def measure(features: np.ndarray, codes: np.ndarray, fraction: float) -> str:
    """Flip labels, find them, and describe the result as a row of a table."""
    found = []
    for seed in range(_SEEDS):
        wrong = flip(codes, fraction, seed)
        scores, suggested = judge(features, wrong)
        is_listed, is_flipped = np.isfinite(scores), wrong != codes
        top = np.argsort(-np.nan_to_num(scores, nan=-1), kind="stable")[: is_flipped.sum()]
        hits = is_listed & is_flipped
        found.append(
            (
                is_listed.sum(),
                hits.sum() / max(1, is_listed.sum()),
                hits.sum() / max(1, is_flipped.sum()),
                is_flipped[top].mean() if len(top) else np.nan,
                (suggested == codes)[hits].mean() if hits.any() else np.nan,
            )
        )
    listed, precision, recall, top, right = np.mean(found, axis=0)
    if not fraction:
        return f"| 0 % | {listed:.0f} | - | - | - | 0.000 | - |"
    return (
        f"| {fraction:.0%} | {listed:.0f} | {precision:.3f} | {recall:.3f} | {top:.3f} | {fraction:.3f} | {right:.3f} |"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    for url in parser.parse_args().results:
        result = fruitdask.open(url)
        features, labels = result.X_y()
        codes = np.unique(labels, return_inverse=True)[1]
        print(f"\n{len(labels):,} images of {codes.max() + 1} classes, mean of {_SEEDS} seeds\n")
        print("| flipped | listed | precision | recall | precision of the top | of a random list | right suggestions |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for fraction in _FRACTIONS:
            print(measure(features, codes, fraction))
        table = result.table[result.table["status"] == "ok"]
        for groups in (None, table["group"].to_numpy(str)) if "group" in table else (None,):
            report = classifier.train(features, labels, groups)[1]
            for name in ("linear_probe", "nearest_neighbors"):
                low, high = report[name]["interval"]
                how = "with groups" if groups is not None else "without groups"
                print(f"{name}, {how}: {report[name]['accuracy']:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()

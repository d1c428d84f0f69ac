"""Commands that train a classifier on a finished run, and predict labels of other images."""

from typing import TYPE_CHECKING, Any

import click

from fruitdask.cli.common import find_output, format_fraction, print_rows, reported, set_option, show, verbose_option

if TYPE_CHECKING:
    from rich.table import Table

    from fruitdask.pipeline.train import Classifier

_SHOWN_CLASSES = 40
_UNKNOWN_NOTE = (
    "unknown images are less like their nearest training image than 99 % of held-out images were; if those had others "
    "of the same object beside them, as in a series, too many are unknown: set input.group_from, run and train again"
)


@click.command()
@click.argument("output")
@click.option("--max-rows", type=click.IntRange(min=4), help="Maximum number of images to train on; 20,000 by default.")
@verbose_option
def train(output: str, max_rows: int | None, verbose: bool) -> None:
    """Train a classifier, and say how far to trust it.

    It learns from the features and labels of the finished run in OUTPUT.

    OUTPUT is a folder or URL, or the configuration file of the run, which also gives storage options. With
    input.group_from, no object is in both the training and the test part of the cross-validation. The classifier is
    stored in OUTPUT.
    """
    with reported(verbose=verbose):
        url, options = find_output(output)
        from fruitdask.pipeline.train import MAX_ROWS, train as train_on

        _print_evaluation(train_on(url, max_rows=max_rows or MAX_ROWS, storage_options=options))


@click.command()
@click.argument("output")
@click.option("--input", "source", required=True, metavar="URL", help="Folder or URL of the images to label.")
@click.option("--output", "target", required=True, metavar="URL", help="Folder or URL for features and predictions.")
@set_option
@verbose_option
def predict(output: str, source: str, target: str, overrides: tuple[str, ...], verbose: bool) -> None:
    """Predict the labels of other images.

    Uses the classifier that fruitdask train has stored in OUTPUT.

    Applies the run to the images first, as fruitdask apply does: run it again after an interruption. An image that is
    unlike all training images is labelled unknown, and each prediction names the most similar training image.
    """
    from fruitdask.core.progress import choose_progress

    with reported(verbose=verbose, again="stored results are kept, run the same command again to resume"):
        url, options = find_output(output)
        from fruitdask.analysis.classifier import UNKNOWN_LABEL
        from fruitdask.pipeline.train import predict as predict_labels
        from fruitdask.store import PREDICTIONS_CSV

        predictions = predict_labels(
            url, input=source, output=target, storage_options=options, overrides=overrides, progress=choose_progress()
        )
        counts = predictions.loc[predictions["status"] == "ok", "label"].value_counts()
        n_failed = int((predictions["status"] != "ok").sum())
        rows: dict[str, str] = {
            "images": f"{len(predictions):,}, of which {n_failed:,} cannot be used",
            "labels": ", ".join(f"{count:,} {label}" for label, count in counts.head(_SHOWN_CLASSES).items()),
            "note": _UNKNOWN_NOTE if UNKNOWN_LABEL in counts else "",
            "results": f"{target.rstrip('/')}/{PREDICTIONS_CSV}",
        }
        print_rows(rows)


def _print_evaluation(classifier: "Classifier") -> None:
    """Print what cross-validation says."""
    report = classifier.report
    grouped = report["n_groups"] is not None
    held_out = f"{report['n_folds']} folds of {report['n_images']:,} images"
    largest = max(each["n_images"] for each in report["linear_probe"]["by_class"].values())
    rows = {
        "linear probe": _format_accuracy(report["linear_probe"]),
        "nearest neighbours": _format_accuracy(report["nearest_neighbors"]),
        "largest class": f"{format_fraction(largest / report['n_images'])} right if it were always named",
        "measured on": f"{held_out}, no object in two of them ({report['n_groups']:,} groups)" if grouped else held_out,
        "note": (
            ""
            if grouped
            else "if several images show the same object, these figures are too high: set input.group_from"
        ),
        "results": classifier.result.output.url,
    }
    print_rows(rows, _build_table(report["linear_probe"]["by_class"]))


def _format_accuracy(evaluated: dict[str, Any]) -> str:
    """Format an accuracy and its interval."""
    accuracy, low, high = map(format_fraction, (evaluated["accuracy"], *evaluated["interval"]))
    return f"{accuracy} right (95 % interval {low} to {high})"


def _build_table(by_class: dict[str, dict[str, Any]]) -> "Table":
    """Build the table of classes, those with the lowest recall if there are many."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("class", "images", "recall", "95 % interval", "precision")
    for column in table.columns[1:]:
        column.justify = "right"
    shown = sorted(by_class, key=lambda label: by_class[label]["recall"])[:_SHOWN_CLASSES]
    for label in sorted(shown):
        found = by_class[label]
        low, high, recall, precision = map(format_fraction, (*found["interval"], found["recall"], found["precision"]))
        table.add_row(escape(show(label)), f"{found['n_images']:,}", recall, f"{low} to {high}", precision)
    if len(by_class) > len(shown):
        table.add_row(f"... and {len(by_class) - len(shown)} more classes", "", "", "", "")
    return table

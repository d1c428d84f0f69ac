"""The names of all files and folders of an output; no other module contains them."""

#: Statuses of an image; the position is its code in the store. ``pending``: its partition is not committed yet.
STATUSES = ("pending", "ok", "unreadable", "too_large", "missing", "unreachable", "not_finite", "crashed")
OUTCOME_COLUMNS = ("path", "label", "status", "error", "attempts")
#: Further columns of an outcome file: the version of the image's file, as the catalog has it.
VERSION_COLUMNS = ("bytes", "version")

#: The configuration of the last run, to be run again.
CONFIG = "config.yaml"
#: The manifests of a run and of an exploration: written first, and complete last.
MANIFEST, EXPLORATION = "manifest.json", "explore.json"
#: The lock. It is not a result, and only its owner deletes it.
LOCK = "run.lock"
#: The checksum entry of JSON files and Zarr attributes; chunks and Parquet pages have their own.
CHECKSUM = "checksum"
QUALITY = "quality.json"
FEATURES = "features.zarr"
PARTITIONS = "partitions"
CATALOG = "catalog.parquet"
COMPONENTS = "pca.zarr"
RESULTS, RESULTS_CSV = "results.parquet", "results.csv"
#: Photographs to check.
ISSUES, ISSUES_CSV = "issues.parquet", "issues.csv"
FAILURES = "failures.csv"
#: A trained classifier: its arrays, and the record of its training and evaluation.
CLASSIFIER, CLASSIFIER_REPORT = "classifier.zarr", "classifier.json"
#: Labels predicted by the classifier of another run.
PREDICTIONS, PREDICTIONS_CSV = "predictions.parquet", "predictions.csv"
#: Working files of an exploration, deleted at its end.
EXPLORING = "exploring"
#: Findings of an exploration: arrays, and tables as Parquet and CSV.
EXPLORED_ARRAYS = "explore.zarr"
EXPLORED_IMAGES, EXPLORED_CLASSES = "explore", "explore_classes"
PAGE = "report.html"
STAGING = "erasing"
FIGURES = "figures"
FIGURE_NAMES = (
    "classes",
    "sizes",
    "examples",
    "colours",
    "differences",
    "pca",
    "tsne",
    "explained_variance",
    "silhouettes",
    "neighbors",
)


def name_figure(name: str) -> str:
    """Return the name of a figure's file."""
    return f"{FIGURES}/{name}.png"


def name_outcomes(index: int) -> str:
    """Return the name of the outcome file of a partition, which commits it."""
    return f"{PARTITIONS}/{index:05d}.parquet"


def name_working(exploration: str, kind: str, index: int) -> str:
    """Return the name of a working file: the ``rows`` of a partition, which commit it, its ``sums`` or ``thumbnails``,
    or the ``means`` of a class.
    """
    return f"{EXPLORING}/{exploration}/{kind}/{index:05d}.{'parquet' if kind == 'rows' else 'bin'}"


#: What a run or an exploration writes, and may therefore delete. Deleted in this order: commit marks before their data,
#: and the manifest last, because it proves that the other files are ours.
RUN_NAMES = (
    STAGING,
    PARTITIONS,
    FEATURES,
    CATALOG,
    COMPONENTS,
    QUALITY,
    RESULTS,
    RESULTS_CSV,
    ISSUES,
    ISSUES_CSV,
    CLASSIFIER,
    CLASSIFIER_REPORT,
    PREDICTIONS,
    PREDICTIONS_CSV,
    FAILURES,
    MANIFEST,
)
EXPLORATION_NAMES = (
    EXPLORING,
    EXPLORED_ARRAYS,
    *(f"{table}.{ending}" for table in (EXPLORED_IMAGES, EXPLORED_CLASSES) for ending in ("parquet", "csv")),
    *(name_figure(name) for name in FIGURE_NAMES),
    PAGE,
    EXPLORATION,
)
#: All of them, in the order in which they are deleted: the configuration stays as long as it can.
ALL_NAMES = (*EXPLORATION_NAMES[:-1], *RUN_NAMES[:-1], CONFIG, EXPLORATION, MANIFEST)

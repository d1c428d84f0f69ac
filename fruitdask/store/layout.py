"""What is in the output folder, by name."""

#: What can become of an image; the position is its code in the store. ``pending`` is an image whose partition is not committed yet.
STATUSES = ("pending", "ok", "unreadable", "too_large", "missing", "unreachable", "not_finite", "crashed")
OUTCOME_COLUMNS = ("path", "label", "status", "error", "attempts")
#: Further columns of an outcome file: the version of the image's file, as the catalog has it.
VERSION_COLUMNS = ("bytes", "version")

#: The two manifests: each is written first and says whose the other files are, and when it says "complete" they are.
MANIFEST, EXPLORATION = "manifest.json", "explore.json"
#: Who works in the folder. It is no result, and nobody but its owner deletes it.
LOCK = "run.lock"
#: The entry of JSON files and of attributes by which damage shows; arrays and tables have checksums of their own.
CHECKSUM = "checksum"
QUALITY = "quality.json"
FEATURES = "features.zarr"
PARTITIONS = "partitions"
CATALOG = "catalog.parquet"
COMPONENTS = "pca.zarr"
RESULTS, RESULTS_CSV = "results.parquet", "results.csv"
FAILURES = "failures.csv"
THUMBNAILS = "thumbnails.zarr"
#: What an exploration found: arrays, and tables as Parquet and as CSV.
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


#: All that a run or an exploration may write into its output folder, and therefore all that it may delete there.
#: Commit marks go before what they vouch for, a manifest last: it says that the others are fruitdask's.
RUN_NAMES = (
    STAGING,
    PARTITIONS,
    FEATURES,
    CATALOG,
    COMPONENTS,
    QUALITY,
    RESULTS,
    RESULTS_CSV,
    FAILURES,
    MANIFEST,
)
EXPLORATION_NAMES = (
    THUMBNAILS,
    EXPLORED_ARRAYS,
    *(f"{table}.{ending}" for table in (EXPLORED_IMAGES, EXPLORED_CLASSES) for ending in ("parquet", "csv")),
    *(name_figure(name) for name in FIGURE_NAMES),
    PAGE,
    EXPLORATION,
)

"""What is in the output folder, by name."""

#: What can become of an image; the position is its code in the store. ``pending`` is an image whose partition is not committed yet.
STATUSES = ("pending", "ok", "unreadable", "too_large", "missing", "unreachable", "not_finite", "crashed")
OUTCOME_COLUMNS = ("path", "label", "status", "error", "attempts")
#: What an outcome file says besides: of which version of the file, as the catalog has it, an outcome is.
VERSION_COLUMNS = ("bytes", "version")

#: The two manifests: each is written first and says whose the other files are, and when it says "complete" they are.
MANIFEST, EXPLORATION = "manifest.json", "explore.json"
#: What a manifest says while images are being erased, and after that until results without them are there.
ERASING, ERASED = "erasing", "erased"
#: Who works in the folder. It is no result, and nobody but its owner deletes it.
LOCK = "run.lock"
#: The entry of JSON files and of attributes by which damage shows; arrays and tables have checksums of their own.
CHECKSUM = "checksum"
QUALITY = "quality.json"
FEATURES = "features.zarr"
PARTITIONS = "partitions"
CATALOG = "catalog.parquet"
THUMBNAILS = "thumbnails.zarr"
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
#: All that a run or an exploration may write into its output folder, and therefore all that it may delete there.
#: Commit marks go before what they vouch for, a manifest last: it says that the others are fruitdask's.
RUN_NAMES = (
    STAGING,
    PARTITIONS,
    FEATURES,
    CATALOG,
    "pca.zarr",
    QUALITY,
    "results.parquet",
    "results.csv",
    "failures.csv",
    MANIFEST,
)
EXPLORATION_NAMES = (
    THUMBNAILS,
    "explore.zarr",
    "explore.parquet",
    "explore.csv",
    "explore_classes.parquet",
    "explore_classes.csv",
    *(f"{FIGURES}/{name}.png" for name in FIGURE_NAMES),
    "report.html",
    EXPLORATION,
)

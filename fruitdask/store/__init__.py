"""The output folder: manifests, features, outcomes. What is written last marks what is done."""

from fruitdask.store.arrays import (
    create_store,
    create_thumbnails,
    delete_thumbnails,
    open_store,
    open_thumbnails,
    read_arrays,
    write_arrays,
    write_partition,
)
from fruitdask.store.erasing import finish_erasing, stage_rows
from fruitdask.store.manifests import (
    check_output,
    clear_output,
    delete_result,
    read_json,
    read_manifest,
    read_quality,
    write_json,
    write_manifest,
)
from fruitdask.store.names import (
    ERASED,
    ERASING,
    EXPLORATION,
    FIGURE_NAMES,
    FIGURES,
    MANIFEST,
    OUTCOME_COLUMNS,
    QUALITY,
    STATUSES,
)
from fruitdask.store.outcomes import list_committed, list_unreachable, read_outcomes, read_table

__all__ = [
    "ERASED",
    "ERASING",
    "EXPLORATION",
    "FIGURES",
    "FIGURE_NAMES",
    "MANIFEST",
    "OUTCOME_COLUMNS",
    "QUALITY",
    "STATUSES",
    "check_output",
    "clear_output",
    "create_store",
    "create_thumbnails",
    "delete_result",
    "delete_thumbnails",
    "finish_erasing",
    "list_committed",
    "list_unreachable",
    "open_store",
    "open_thumbnails",
    "read_arrays",
    "read_json",
    "read_manifest",
    "read_outcomes",
    "read_quality",
    "read_table",
    "stage_rows",
    "write_arrays",
    "write_json",
    "write_manifest",
    "write_partition",
]

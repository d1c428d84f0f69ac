"""The output folder: manifests, features, outcomes. The file that is written last marks the others as complete."""

from fruitdask.store.arrays import (
    StoredArray,
    copy_arrays,
    create_store,
    hash_arrays,
    open_finished,
    open_store,
    read_arrays,
    read_partition,
    resize_store,
    write_arrays,
    write_partition,
)
from fruitdask.store.catalog_file import read_catalog, read_catalog_blocks, write_catalog, write_catalog_blocks
from fruitdask.store.checks import (
    CheckedPartition,
    Fault,
    Remedy,
    check_arrays,
    check_digests,
    check_json,
    check_partition,
    check_store,
    describe_damage,
    find_strays,
    restore_store,
)
from fruitdask.store.erasure import delete_strays, finish_erasing, stage_rows
from fruitdask.store.layout import (
    CATALOG,
    CLASSIFIER,
    CLASSIFIER_REPORT,
    COMPONENTS,
    CONFIG,
    EXPLORATION,
    EXPLORED_ARRAYS,
    EXPLORED_CLASSES,
    EXPLORED_IMAGES,
    EXPLORING,
    FAILURES,
    FEATURES,
    FIGURE_NAMES,
    FIGURES,
    ISSUES,
    ISSUES_CSV,
    MANIFEST,
    OUTCOME_COLUMNS,
    PAGE,
    PARTITIONS,
    PREDICTIONS,
    PREDICTIONS_CSV,
    QUALITY,
    RESULTS,
    RESULTS_CSV,
    STAGING,
    STATUSES,
    VERSION_COLUMNS,
    name_figure,
    name_outcomes,
)
from fruitdask.store.lock import OutputLock, locked
from fruitdask.store.manifests import (
    advise_repair,
    check_output,
    clear_output,
    delete_outdated,
    delete_result,
    describe_mismatch,
    has_begun,
    open_digested,
    read_exploration_manifest,
    read_json,
    read_quality,
    read_run,
    write_digested,
    write_json,
    write_manifest,
)
from fruitdask.store.outcomes import count_at_once, list_committed, read_outcomes, read_rows
from fruitdask.store.paths import PathFinder
from fruitdask.store.schema import AppliedRecord, ExplorationManifest, IssuesRecord, RunManifest, is_intact
from fruitdask.store.tables import read_table, write_table
from fruitdask.store.workspace import Workspace, delete_exploring

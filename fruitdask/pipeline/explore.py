"""Explores images by itself, or during a run, whose tasks already hold the images in memory."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import store
from fruitdask.analysis.exploration import (
    NUMBERS,
    Groups,
    ImageNumbers,
    choose_compared_px,
    describe_classes,
    parse_hashes,
    plan_comparison,
)
from fruitdask.cluster import describe_workers, open_client
from fruitdask.cluster.scheduling import map_partitions
from fruitdask.core.config import Config
from fruitdask.core.fingerprint import EXPLORATION, describe_settings
from fruitdask.core.guard import leave_imported_script
from fruitdask.core.memory import return_freed_memory
from fruitdask.core.partition import Partition
from fruitdask.core.progress import RunProgress, resolve_progress
from fruitdask.core.storage import Location, exists
from fruitdask.core.version import __version__
from fruitdask.errors import OutputError
from fruitdask.pipeline.config import write_config
from fruitdask.pipeline.inputs import Inputs, prepare_inputs, resolve_erasure
from fruitdask.pipeline.record import describe_processing, describe_protection
from fruitdask.pipeline.report import render
from fruitdask.store.catalog import choose_partition_size, sample_evenly, split_catalog
from fruitdask.store.exploration import Exploration, create_means, read_exploration, write_tables, write_thumbnails
from fruitdask.worker.compare import ClassFacts, CompareJob, Distances, compare_classes, measure_distances
from fruitdask.worker.explore import ExploredPartition, ExploreJob, explore_partition, probe_exploration
from fruitdask.worker.metadata import KINDS
from fruitdask.worker.models import choose_input_px
from fruitdask.worker.sums import COLOUR_LEVELS

#: Digits of the name of the folder of working files, so that different explorations do not share one.
_NAME_DIGITS = 16


def explore(config: Config, *, client: Any = None, progress: RunProgress | bool | None = None) -> Exploration:
    """
    Describe the images without a network: sizes, colours, duplicates, metadata; write tables, figures and a page.

    Parameters
    ----------
    config : Config
        Names the images and the output, from `fruitdask.load_config`.
    client : distributed.Client, optional
        A cluster to use instead of the configured one; it is left open.
    progress : RunProgress or bool, optional
        How to show progress; by default, only on a terminal and in a notebook. False shows none.

    Returns
    -------
    Exploration
        Tables of images and classes, and thumbnails; read from the output if the same images were explored before.

    Raises
    ------
    FruitdaskError
        If something is wrong; see the subclasses in `fruitdask.errors`.
    """
    return carry_out(config, read_exploration, client=client, progress=progress)


def carry_out(
    config: Config,
    read: Callable[[Location], Exploration | None],
    *,
    client: Any = None,
    progress: RunProgress | bool | None = None,
) -> Exploration:
    """Explore the images, and read as much of the findings as is wanted."""
    leave_imported_script()
    progress = resolve_progress(progress)
    with progress, ExitStack() as stack:
        output = _complete(config, client, progress, stack)
        progress.begin("Drawing")
        render(config, output)
    found = read(output)
    if found is None:
        raise OutputError(f"{output.url}: the exploration was deleted while it was written; explore again")
    return found


def _complete(config: Config, client: Any, progress: RunProgress, stack: ExitStack) -> Location:
    """Explore the images if that has not been done, and return the output; drawing needs no catalog of the images."""
    inputs = prepare_inputs(config, progress, client=client)
    stack.enter_context(store.locked(inputs.output))
    resolve_erasure(inputs, progress)
    # The report of a run must not show other images.
    store.check_output(inputs.output, inputs.fingerprint, overwrite=config.output.overwrite)
    exploration = ImageExploration(inputs, images_per_partition=choose_partition_size(len(inputs.catalog)))
    if config.output.overwrite or not exploration.is_done:
        progress.begin("Starting the cluster")
        with nullcontext(client) if client is not None else open_client(config.cluster) as client:
            if config.output.overwrite:
                store.clear_output(inputs.output)
            exploration.complete(client, progress)
    else:
        exploration.renew_record()
    if store.read_run(inputs.output) is None:
        write_config(inputs.output, config)
    return inputs.output


class ImageExploration:
    """The exploration of the images of an input, and its state in the output folder."""

    def __init__(self, inputs: Inputs, *, images_per_partition: int) -> None:
        self._inputs = inputs
        self._images_per_partition = images_per_partition
        self._done: set[int] | None = None
        settings = inputs.config.explore
        input_px = settings.input_px or choose_input_px(inputs.config.model)
        thumbnail_px = settings.choose_thumbnail_px(len(inputs.catalog))
        explored = settings.model_copy(update={"input_px": input_px, "thumbnail_px": thumbnail_px})
        self._manifest = store.ExplorationManifest(
            fruitdask=__version__,
            status="running",
            fingerprint=inputs.fingerprint | {"exploration": describe_settings("explore", explored, EXPLORATION)},
            input_px=input_px,
            regions=inputs.regions,
            left_out=dict(inputs.left_out),
        )

    @property
    def is_done(self) -> bool:
        """Whether the output folder holds this exploration."""
        found = store.read_exploration_manifest(self._inputs.output)
        if found is None or not found.is_complete or found.fingerprint != self._manifest.fingerprint:
            return False
        names = (f"{store.EXPLORED_IMAGES}.parquet", store.EXPLORED_ARRAYS)
        return all(exists(self._inputs.output.child(name)) for name in names)

    @cached_property
    def _classes(self) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
        """The classes in alphabetical order, and the code of each image's."""
        labels = self._inputs.catalog["label"].astype("category").cat.remove_unused_categories()
        names = np.asarray(labels.cat.categories, object)
        order = np.argsort(names)
        codes = np.empty(len(names), np.int32)
        codes[order] = np.arange(len(names))
        return codes[labels.cat.codes], tuple(names[order])

    @cached_property
    def job(self) -> ExploreJob:
        """What tasks need to know."""
        manifest, settings = self._manifest, self._inputs.config.explore
        input_px = manifest.input_px or 0
        # The working files of another version, or in other partitions, are not ours.
        key = json.dumps([__version__, self._images_per_partition, manifest.fingerprint], sort_keys=True)
        workspace = store.Workspace(
            self._inputs.output,
            name=hashlib.sha256(key.encode()).hexdigest()[:_NAME_DIGITS],
            thumbnail_px=settings.choose_thumbnail_px(len(self._inputs.catalog)),
            compared_px=choose_compared_px(self._classes[0], input_px),
            n_colours=COLOUR_LEVELS**3,
        )
        return ExploreJob(self._inputs.source, workspace, input_px)

    def begin(self) -> ExploreJob:
        """Prepare the output folder for exploring; keep what an interrupted exploration has found."""
        output, workspace = self._inputs.output, self.job.workspace
        found = store.read_exploration_manifest(output)
        if found is not None and found.status == "running" and found.fingerprint == self._manifest.fingerprint:
            workspace.delete_others()
        else:
            store.delete_exploring(output)
        store.write_manifest(output, self._manifest)
        self._done = workspace.list_committed()
        self._done -= self._find_unreachable(sorted(self._done))
        return self.job

    def add(self, index: int) -> None:
        """Note that a task of a run has explored a partition."""
        if self._done is not None:
            self._done.add(index)

    def complete(self, client: Any, progress: RunProgress) -> None:
        """Explore the remaining images, then combine and write the findings about all images."""
        if self._done is None:
            self.begin()
        config, written = self._inputs.config, self._inputs.output.child(store.EXPLORATION)
        protection = describe_protection(config.privacy, written, client)
        self._explore_remaining(client, progress)
        progress.begin("Comparing images")
        found = self._combine(client)
        described = self._manifest.dump() | {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "processing": describe_processing(config.privacy) | protection,
            "status": "complete",
        }
        store.write_manifest(self._inputs.output, store.ExplorationManifest.model_validate(described | found))
        store.delete_exploring(self._inputs.output)

    def renew_record(self) -> None:
        """Update the record of processing and the counts of files left out in a complete exploration."""
        # A command that was killed may have left them.
        store.delete_exploring(self._inputs.output)
        found = store.read_exploration_manifest(self._inputs.output)
        if found is None:
            return
        record = found.processing | describe_processing(self._inputs.config.privacy, since=found.finished)
        renewed = found.renew(processing=record, left_out=self._manifest.left_out)
        if renewed != found:
            store.write_manifest(self._inputs.output, renewed)

    def _find_unreachable(self, indices: list[int]) -> set[int]:
        """Find the partitions with images that the storage did not deliver, which are explored again."""
        found, first = set[int](), 0
        for table in self.job.workspace.read_rows(indices, ["status"]):
            statuses, last = table["status"].to_numpy(), first
            while len(statuses):
                n_images = self._count_images(indices[last])
                if (statuses[:n_images] == "unreachable").any():
                    found.add(indices[last])
                statuses, last = statuses[n_images:], last + 1
            first = last
        return found

    def _explore_remaining(self, client: Any, progress: RunProgress) -> None:
        """Explore the images of partitions that are not explored yet."""
        done = self._done or set()
        todo = (partition for partition in self._split() if partition.index not in done)
        n_done = sum(self._count_images(index) for index in done)
        if n_done == len(self._inputs.catalog):
            return
        progress.begin("Exploring")
        progress.begin_images(len(self._inputs.catalog), n_done=n_done, ask_cluster=partial(describe_workers, client))

        def note(explored: ExploredPartition) -> None:
            progress.advance(explored.n_images, failures=explored.failures)

        map_partitions(client, explore_partition, todo, delivered=self.job, on_result=note, probe=probe_exploration)

    def _combine(self, client: Any) -> dict[str, Any]:
        """Combine and write what was found about all images; returns the findings for the manifest."""
        settings, output, workspace = self._inputs.config.explore, self._inputs.output, self.job.workspace
        codes, labels = self._classes
        create_means(output, labels, thumbnail_px=workspace.thumbnail_px)
        facts, distances = self._compare(client)
        # Grouping takes the most memory.
        return_freed_memory()
        is_readable = np.isfinite(distances)
        groups = Groups.find(self._read_hashes, is_readable, max_bits=settings.near_duplicate_bits)
        numbers = self._read_numbers()
        sampled = sample_evenly(self._inputs.catalog, settings.max_thumbnails, among=is_readable)
        classes = describe_classes(
            numbers,
            distances,
            groups,
            facts,
            labels=labels,
            scale=settings.scale,
            sampled_rows=sampled,
            read_thumbnails=self._read_thumbnails,
        )
        typical = classes[["most_typical", "least_typical"]].to_numpy()
        shown = np.union1d(sampled, typical[typical >= 0])
        write_thumbnails(output, shown, self._read_thumbnails, thumbnail_px=workspace.thumbnail_px)
        digests = write_tables(
            output,
            self._describe_images(distances, groups),
            classes.assign(**{name: self._name_images(classes[name]) for name in ("most_typical", "least_typical")}),
            n_images=len(codes),
        )
        compared = {"compared_px": workspace.compared_px} if workspace.compared_px < self.job.input_px else {}
        return compared | {
            "n_images": len(codes),
            "n_ok": int(is_readable.sum()),
            "scale": settings.scale,
            "near_duplicate_bits": settings.near_duplicate_bits,
            **groups.count(codes),
            "metadata": {kind: int(numbers.sums[f"has_{kind}"].sum()) for kind in KINDS},
            "digests": digests,
        }

    def _compare(self, client: Any) -> tuple[list[ClassFacts], npt.NDArray[np.float64]]:
        """Compare the images of each class on the cluster; returns facts about classes, and distances of images."""
        codes, labels = self._classes
        job = CompareJob(self.job.workspace, self._inputs.config.explore.scale, labels)
        facts, distances = list[ClassFacts](), np.full(len(codes), np.nan)
        blocks = plan_comparison(
            codes,
            len(labels),
            images_per_partition=self._images_per_partition,
            # Totals have 64 bits, stored sums 32.
            total_bytes=2 * job.workspace.sums_type.itemsize,
        )
        map_partitions(client, compare_classes, blocks, delivered=job, on_result=facts.extend)

        def note(measured: Distances) -> None:
            distances[measured.start : measured.start + len(measured.distances)] = measured.distances

        map_partitions(client, measure_distances, self._split(), delivered=job, on_result=note)
        return sorted(facts, key=lambda fact: fact.code), distances

    def _read_numbers(self) -> ImageNumbers:
        """Read the numbers about all images."""
        codes, labels = self._classes
        numbers, row = ImageNumbers.allocate(codes, len(labels)), 0
        for table in self.job.workspace.read_rows(range(self._n_partitions), NUMBERS):
            row = numbers.fill(row, table)
        return numbers

    def _read_hashes(self, column: str, n_bits: int) -> npt.NDArray[np.uint64]:
        """Read the first 128 bits of the hashes of all images, shape (n, 2) or (n, 1); zeros if there is none."""
        codes, _ = self._classes
        hashes, row = np.zeros((len(codes), min(n_bits, 128) // 64), np.uint64), 0
        for table in self.job.workspace.read_rows(range(self._n_partitions), [column]):
            rows = slice(row, row := row + table.num_rows)
            hashes[rows] = parse_hashes(table[column], n_bits=n_bits)[0][:, : hashes.shape[1]]
        return hashes

    def _describe_images(self, distances: npt.NDArray[np.float64], groups: Groups) -> Iterator[pd.DataFrame]:
        """Yield the table of images, some at a time."""
        found = {"duplicate_group": groups.duplicates, "near_duplicate_group": groups.near_duplicates}
        row = 0
        for table in self.job.workspace.read_rows(range(self._n_partitions)):
            rows = slice(row, row + table.num_rows)
            images = table.to_pandas().astype({"width_px": "Int32", "height_px": "Int32"})
            images["distance_to_mean"] = distances[rows].astype(np.float32)
            for name, numbers in found.items():
                images[name] = pd.arrays.IntegerArray(numbers[rows].astype(np.int64), numbers[rows] < 0)
            yield images
            row = rows.stop

    def _read_thumbnails(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Read the thumbnails of some images, given in ascending order."""
        indices, places = np.divmod(rows, self._images_per_partition)
        # Images that follow each other in a partition are one request.
        starts = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (places == 0))
        stops = places[starts] + np.diff(starts, append=len(rows))
        pieces = zip(indices[starts].tolist(), places[starts].tolist(), stops.tolist(), strict=True)
        return np.asarray(self.job.workspace.read_thumbnails(list(pieces))["pixels"])

    def _name_images(self, rows: pd.Series) -> pd.Series:
        """Return the paths of rows; empty for -1."""
        paths = self._inputs.catalog["path"].iloc[rows].astype(object).to_numpy()
        return pd.Series(np.where(rows >= 0, paths, ""), rows.index, dtype="str")

    @property
    def _n_partitions(self) -> int:
        """Number of partitions."""
        return -(-len(self._inputs.catalog) // self._images_per_partition)

    def _count_images(self, index: int) -> int:
        """Count the images of a partition."""
        return min(self._images_per_partition, len(self._inputs.catalog) - index * self._images_per_partition)

    def _split(self) -> Iterator[Partition]:
        """Split the catalog into partitions."""
        return split_catalog(self._inputs.catalog, self._images_per_partition)

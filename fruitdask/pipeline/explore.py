"""Explores images: alone, or during a run, whose tasks have the images in memory anyway."""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from typing import Any

from fruitdask import store
from fruitdask.analysis.exploration import Accumulator, Distances, measure_partition, summarize_findings
from fruitdask.cluster import open_client
from fruitdask.cluster.scheduling import map_partitions
from fruitdask.core.config import Config
from fruitdask.core.fingerprint import EXPLORATION, describe_settings
from fruitdask.core.guard import leave_imported_script
from fruitdask.core.partition import Partition
from fruitdask.core.progress import RunProgress, resolve_progress
from fruitdask.core.storage import exists
from fruitdask.core.version import __version__
from fruitdask.errors import OutputError
from fruitdask.pipeline.config import write_config
from fruitdask.pipeline.inputs import Inputs, prepare_inputs, resolve_erasure
from fruitdask.pipeline.record import describe_processing, describe_protection
from fruitdask.pipeline.report import render
from fruitdask.store.catalog import choose_partition_size, split_catalog
from fruitdask.store.exploration import Exploration, read_exploration, write_exploration
from fruitdask.worker.explore import ExploreJob, Findings, explore_partition, probe_exploration
from fruitdask.worker.models import choose_input_px


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
        Shows progress: by default on a terminal and in a notebook; False never does.

    Returns
    -------
    Exploration
        Tables of images and classes, and thumbnails; read from the output if the same images were explored before.

    Raises
    ------
    FruitdaskError
        If something is wrong; see the subclasses in `fruitdask.errors`.
    """
    leave_imported_script()
    progress = resolve_progress(progress)
    with progress, ExitStack() as stack:
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
        progress.begin("Drawing")
        render(config, inputs.output)
    found = read_exploration(inputs.output)
    if found is None:
        raise OutputError(f"{inputs.output.url}: the exploration was deleted while it was written; explore again")
    return found


class ImageExploration:
    """The exploration of the images of an input, and its state in the output folder."""

    def __init__(self, inputs: Inputs, *, images_per_partition: int) -> None:
        self._inputs = inputs
        self._images_per_partition = images_per_partition
        self._accumulator = Accumulator()
        self._has_begun = False
        settings = inputs.config.explore
        self._job = ExploreJob(
            source=inputs.source,
            output=inputs.output,
            input_px=settings.input_px or choose_input_px(inputs.config.model),
            thumbnail_px=settings.choose_thumbnail_px(len(inputs.catalog)),
        )
        resolved = {"input_px": self._job.input_px, "thumbnail_px": self._job.thumbnail_px}
        explored = settings.model_copy(update=resolved)
        self._manifest = store.ExplorationManifest(
            fruitdask=__version__,
            status="running",
            fingerprint=inputs.fingerprint | {"exploration": describe_settings("explore", explored, EXPLORATION)},
            input_px=self._job.input_px,
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

    def begin(self) -> ExploreJob:
        """Prepare the output folder, so that tasks of a run can explore their images."""
        output, self._has_begun = self._inputs.output, True
        store.write_manifest(output, self._manifest)
        store.create_thumbnails(
            output,
            n_images=len(self._inputs.catalog),
            thumbnail_px=self._job.thumbnail_px,
            images_per_partition=self._images_per_partition,
        )
        return self._job

    def add(self, findings: Findings) -> None:
        """Add the findings of a task of a run."""
        self._accumulator.add(findings)

    def complete(self, client: Any, progress: RunProgress) -> None:
        """Explore the remaining images, combine all findings and write them."""
        if not self._has_begun:
            self.begin()
        config, written = self._inputs.config, self._inputs.output.child(store.EXPLORATION)
        protection = describe_protection(config.privacy, written, client)
        self._look(client, progress)
        progress.begin("Comparing images")
        settings, images, measured = self._inputs.config.explore, self._accumulator.images, list[Distances]()
        reference = self._accumulator.build_reference(images, settings, self._inputs.output)
        map_partitions(client, measure_partition, self._split(), delivered=reference, on_result=measured.append)
        described = self._manifest.dump() | {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "processing": describe_processing(config.privacy) | protection,
        }
        exploration = summarize_findings(
            self._accumulator, images, measured, reference=reference, config=settings, described=described
        )
        write_exploration(self._inputs.output, exploration)
        store.delete_thumbnails(self._inputs.output)

    def renew_record(self) -> None:
        """Update the record of processing and the counts of files left out in a complete exploration."""
        found = store.read_exploration_manifest(self._inputs.output)
        if found is None:
            return
        record = found.processing | describe_processing(self._inputs.config.privacy, since=found.finished)
        renewed = found.renew(processing=record, left_out=self._manifest.left_out)
        if renewed != found:
            store.write_manifest(self._inputs.output, renewed)

    def _look(self, client: Any, progress: RunProgress) -> None:
        """Explore the images that no task of a run has explored."""
        todo = [partition for partition in self._split() if partition not in self._accumulator]
        if not todo:
            return
        progress.begin("Exploring")
        n_todo = sum(len(partition.paths) for partition in todo)
        progress.begin_images(len(self._inputs.catalog), n_done=len(self._inputs.catalog) - n_todo)

        def note(findings: Findings) -> None:
            self._accumulator.add(findings)
            n_failed = int((findings.images["status"] != "ok").sum())
            progress.advance(len(findings.images), n_failed=n_failed)

        map_partitions(client, explore_partition, todo, delivered=self._job, on_result=note, probe=probe_exploration)

    def _split(self) -> Iterator[Partition]:
        """Split the catalog into partitions."""
        return split_catalog(self._inputs.catalog, self._images_per_partition)

"""What there is to do in a run, and what is done: all that is found out before anything is started."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fruitdask import report, store
from fruitdask.core.config import Config, LocalClusterConfig
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import Location, exists
from fruitdask.pipeline.budget import Budget, Clock
from fruitdask.pipeline.changes import Backlog, Rows, find_backlog, order_images
from fruitdask.pipeline.inputs import Inputs, prepare_inputs, settle_erasure
from fruitdask.pipeline.report import describe_presentation
from fruitdask.pipeline.results import PCA
from fruitdask.store.catalog import SPLIT, choose_partition_size, hash_split
from fruitdask.worker.models import fingerprint_model

#: Sections of the configuration on which the tables depend.
_REDUCING = ("reduce", "quality")


@dataclass(frozen=True)
class Task:
    """A run that has been checked: what there is to do, and what is done."""

    #: The images of the input, and the output folder.
    inputs: Inputs
    fingerprint: dict[str, str]
    images_per_partition: int
    #: The manifest of the run before; None where there is none, or its results are overwritten.
    manifest: dict[str, Any] | None
    committed: frozenset[int]
    #: What the run may spend, and has spent.
    budget: Budget
    clock: Clock
    #: What keeps other runs out of the output folder; None where nothing is written to it.
    lock: store.OutputLock | None
    #: Whether images that have failed in an earlier run are computed again.
    retry_failed: bool

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.inputs.config

    @property
    def output(self) -> Location:
        """The output folder."""
        return self.inputs.output

    @property
    def n_listed(self) -> int:
        """Images in the input."""
        return len(self.inputs.catalog)

    @cached_property
    def rows(self) -> Rows:
        """The images in the order of the store's rows."""
        return order_images(self.inputs, has_commits=bool(self.committed))

    @cached_property
    def backlog(self) -> Backlog:
        """What is to be computed; of a complete run it is known without a look at outcomes."""
        if self._is_settled and self.manifest is not None:
            counts = self.manifest["counts"]
            n_failed = sum(counts["by_status"].values()) - counts["by_status"].get("ok", 0) - counts.get("vanished", 0)
            is_out_of_reach = "unreachable" in counts["by_status"]
            if not (is_out_of_reach or (n_failed and self.retry_failed)):
                return Backlog({}, n_images=0, n_failed=n_failed, n_retried=0, done=set(self.committed))
        return find_backlog(
            self.output,
            self.rows,
            self.committed,
            images_per_partition=self.images_per_partition,
            retry_failed=self.retry_failed,
        )

    @property
    def n_partitions(self) -> int:
        """Partitions of the store."""
        return -(-len(self.rows.catalog) // self.images_per_partition)

    @property
    def changes(self) -> dict[str, int]:
        """
        Counts of what the run changes in results that were there.

        Nothing where it goes on with what an earlier one has begun to change.
        """
        n_retried = self.backlog.n_retried
        if not (self.committed and (self.has_other_images or n_retried)):
            return {}
        kept = {"added": 0, "changed": 0, "vanished": 0, "kept": self.n_listed} | self.rows.changes
        return kept | {"retried": n_retried, "kept": kept["kept"] - n_retried}

    @property
    def has_other_images(self) -> bool:
        """Whether the input is not what it was in the run before."""
        if self.manifest is None:
            return False
        theirs = self.manifest["fingerprint"]["catalog"]
        return bool(theirs != self.fingerprint.get("catalog", theirs))

    @property
    def _is_settled(self) -> bool:
        """Whether the run before is complete, and was of the images of this one."""
        if self.manifest is None or self.manifest["status"] != "complete" or self.has_other_images:
            return False
        n_images: int = self.manifest["n_images"]
        return len(self.committed) == -(-n_images // self.images_per_partition)

    @property
    def has_features(self) -> bool:
        """Whether the output holds the features of these images."""
        return self.manifest is not None and not self.backlog.todo and not self.has_other_images

    @property
    def split_hash(self) -> str | None:
        """What tells the splits of the images from others; None where there are none."""
        return hash_split(self.rows.catalog) if SPLIT in self.inputs.catalog else None

    @property
    def is_reduced(self) -> bool:
        """Whether it holds the tables that the configuration asks for."""
        manifest = self.manifest or {"status": "new"}
        if manifest["status"] != "complete" or not self.has_features:
            return False
        names = [report.RESULTS] + [PCA] * ("pca" in manifest) + [store.QUALITY] * self.config.quality.enabled
        if not all(exists(self.output.child(name)) for name in names):
            return False
        if manifest.get("split") != self.split_hash:
            return False
        # A setting that an earlier version did not have had its default.
        sections = ((getattr(self.config, name), manifest["config"].get(name, {})) for name in _REDUCING)
        return all(type(ours)().model_dump(mode="json") | theirs == ours.model_dump(mode="json") for ours, theirs in sections)

    @property
    def is_presented(self) -> bool:
        """Whether it holds the figures and the page that the configuration asks for."""
        names = [report.PAGE] * self.config.report.enabled + [store.FIGURES] * self.config.plots.enabled
        manifest = self.manifest or {}
        is_same = manifest.get("presented") == describe_presentation(self.config, self.output)
        is_same &= manifest.get("left_out", {}) == self.inputs.left_out
        return is_same and all(exists(self.output.child(name)) for name in names)


def prepare(
    config: Config,
    progress: RunProgress,
    *,
    client: Any = None,
    locks: ExitStack | None = None,
    retry_failed: bool = False,
) -> Task:
    """Check all that can be checked before anything is started."""
    progress.begin("Listing images")
    clock = Clock()
    with clock.measure("list"):
        inputs = prepare_inputs(config, client=client)
    for note in inputs.notes:
        progress.say(f"Note: {note}.")
    output, catalog = inputs.output, inputs.catalog
    fingerprint = inputs.fingerprint | {"model": fingerprint_model(config.model)}
    lock = None
    if locks is not None:
        lock = locks.enter_context(store.locked(output))
        settle_erasure(inputs, progress)
    elif (store.read_manifest(output) or {}).get("status") == store.ERASED:
        # Which images are left, the run will find out.
        del fingerprint["catalog"]
    manifest = store.check_output(output, fingerprint, overwrite=config.output.overwrite, may_grow=True)
    has_store = manifest is not None and store.open_store(output) is not None
    return Task(
        inputs=inputs,
        fingerprint=fingerprint,
        images_per_partition=(
            manifest["images_per_partition"]
            if manifest
            else config.featurize.images_per_partition or choose_partition_size(len(catalog))
        ),
        manifest=manifest,
        committed=frozenset(store.list_committed(output) if has_store else ()),
        budget=Budget(
            config.limits,
            # A cluster of somebody else's costs this run nothing.
            config.cluster if client is None else LocalClusterConfig(),
            region=inputs.regions["cluster"],
            manifest=manifest,
            elapsed_seconds=clock.total_seconds,
        ),
        clock=clock,
        lock=lock,
        retry_failed=retry_failed,
    )

"""The state of a run before anything is started: what is configured, what is done, and what is pending."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fruitdask import store
from fruitdask.core.config import Config, LocalClusterConfig, ReduceConfig
from fruitdask.core.listing import GROUPINGS
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import Location, exists
from fruitdask.errors import StoreMismatchError
from fruitdask.pipeline.budget import Budget, Clock
from fruitdask.pipeline.changes import PendingWork, Rows, find_pending, order_images
from fruitdask.pipeline.inputs import Inputs, prepare_inputs, resolve_erasure
from fruitdask.pipeline.report import describe_rendering
from fruitdask.store.catalog import choose_partition_size, hash_groupings
from fruitdask.worker.models import fingerprint_model

#: Sections of the configuration on which the tables depend.
_REDUCING = ("reduce", "quality", "check")


@dataclass(frozen=True)
class Applied:
    """A finished run whose principal components another run applies instead of fitting its own."""

    record: store.AppliedRecord
    #: Its output folder; None if only the copy in the other run's folder is known.
    source: Location | None = None


@dataclass(frozen=True)
class RunState:
    """A checked run: everything resolved from its configuration, and its pending work."""

    #: The images of the input, and the output folder.
    inputs: Inputs
    fingerprint: dict[str, Any]
    images_per_partition: int
    #: The manifest of the earlier run; None without one, or if its results are overwritten.
    manifest: store.RunManifest | None
    committed: frozenset[int]
    #: The limits of the run, and what it has spent.
    budget: Budget
    clock: Clock
    #: Keeps other runs out of the output folder; None if nothing is written.
    lock: store.OutputLock | None
    #: Whether failed images are computed again.
    retry_failed: bool
    #: The run whose components are applied; None if this run fits its own.
    applied: Applied | None = None

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
        """Number of images in the input."""
        return len(self.inputs.catalog)

    @cached_property
    def rows(self) -> Rows:
        """The images in the order of the rows of the store."""
        return order_images(self.inputs, has_commits=bool(self.committed))

    @cached_property
    def pending(self) -> PendingWork:
        """What is to be computed; for a complete run this is known without reading outcomes."""
        if self._is_unchanged and self.manifest is not None and self.manifest.counts is not None:
            counts, vanished = self.manifest.counts.by_status, self.manifest.counts.vanished
            n_failed = sum(counts.values()) - counts.get("ok", 0) - vanished
            is_out_of_reach = "unreachable" in counts
            if not (is_out_of_reach or (n_failed and self.retry_failed)):
                return PendingWork({}, n_images=0, n_failed=n_failed, n_retried=0, done=set(self.committed))
        return find_pending(
            self.output,
            self.rows,
            self.committed,
            images_per_partition=self.images_per_partition,
            retry_failed=self.retry_failed,
        )

    @property
    def n_partitions(self) -> int:
        """Number of partitions of the store."""
        return -(-len(self.rows.catalog) // self.images_per_partition)

    @property
    def changes(self) -> dict[str, int]:
        """
        Number of images by kind of change to earlier results.

        Empty when it resumes changes that an earlier run has begun.
        """
        n_retried = self.pending.n_retried
        if not (self.committed and (self.has_other_images or n_retried)):
            return {}
        kept = {"added": 0, "changed": 0, "vanished": 0, "kept": self.n_listed} | self.rows.changes
        return kept | {"retried": n_retried, "kept": kept["kept"] - n_retried}

    @property
    def has_other_images(self) -> bool:
        """Whether the input differs from that of the earlier run."""
        if self.manifest is None:
            return False
        return bool(self.manifest.fingerprint["catalog"] != self.fingerprint["catalog"])

    @property
    def _is_unchanged(self) -> bool:
        """Whether the earlier run is complete and has the same images."""
        if self.manifest is None or not self.manifest.is_complete or self.has_other_images:
            return False
        return len(self.committed) == self.manifest.n_partitions

    @property
    def has_features(self) -> bool:
        """Whether the output holds the features of these images."""
        return self.manifest is not None and not self.pending.todo and not self.has_other_images

    @property
    def groupings(self) -> dict[str, str]:
        """Hashes of the splits and groups of the images, if configured."""
        configured = [name for name in GROUPINGS if name in self.inputs.catalog]
        # Without any, the stored catalog need not be read.
        return hash_groupings(self.rows.catalog[configured]) if configured else {}

    @property
    def reduce_settings(self) -> ReduceConfig:
        """How to reduce the features: components of another run are taken as they are, and are never fitted again."""
        if self.applied is None:
            return self.config.reduce
        components = self.applied.record.components
        if components is None:
            return self.config.reduce.model_copy(update={"enabled": False})
        fitted = components.fit.model_dump(include={"n_components", "solver", "seed"})
        return self.config.reduce.model_copy(update={"enabled": True, "refit": "never", **fitted})

    @property
    def is_reduced(self) -> bool:
        """Whether the output holds the configured tables."""
        manifest = self.manifest
        if manifest is None or not manifest.is_complete or not self.has_features:
            return False
        has_components = manifest.pca is not None
        names = [store.RESULTS] + [store.COMPONENTS] * has_components + [store.QUALITY] * self.config.quality.enabled
        names += [store.ISSUES] * self.config.check.enabled
        if not all(exists(self.output.child(name)) for name in names):
            return False
        if manifest.groupings != self.groupings or not self._is_checked(manifest):
            return False
        sections = ((name, getattr(self.config, name)) for name in _REDUCING)
        return all(
            name in manifest.config and manifest.read_settings(name, type(ours)) == ours for name, ours in sections
        )

    def _is_checked(self, manifest: store.RunManifest) -> bool:
        """Whether the list of photographs to check is based on the present exploration, or not configured."""
        if not self.config.check.enabled:
            return True
        exploration = store.read_exploration_manifest(self.output)
        finished = exploration.finished if exploration is not None else None
        return manifest.issues is not None and manifest.issues.exploration == finished

    @property
    def is_rendered(self) -> bool:
        """Whether the output holds the configured figures and page."""
        if self.manifest is None or self.manifest.left_out != self.inputs.left_out:
            return False
        names = [store.PAGE] * self.config.report.enabled + [store.FIGURES] * self.config.plots.enabled
        is_same = self.manifest.presented == describe_rendering(self.config, self.output)
        return is_same and all(exists(self.output.child(name)) for name in names)


def prepare(
    config: Config,
    progress: RunProgress,
    *,
    client: Any = None,
    locks: ExitStack | None = None,
    retry_failed: bool = False,
    applied: Applied | None = None,
) -> RunState:
    """Check everything that can be checked before anything is started."""
    clock = Clock()
    with clock.measure("list"):
        inputs = prepare_inputs(config, progress, client=client)
    output, catalog = inputs.output, inputs.catalog
    fingerprint = inputs.fingerprint | {"model": fingerprint_model(config.model)}
    lock = None
    if locks is not None:
        lock = locks.enter_context(store.locked(output))
        resolve_erasure(inputs, progress)
    manifest = store.check_output(output, fingerprint, overwrite=config.output.overwrite, may_grow=True)
    if applied is not None and manifest is not None:
        _check_applied(output, manifest, applied.record)
    elif manifest is not None and manifest.applied is not None:
        applied = Applied(manifest.applied)
    has_store = manifest is not None and store.open_store(output) is not None
    return RunState(
        inputs=inputs,
        fingerprint=fingerprint,
        images_per_partition=(
            manifest.images_per_partition
            if manifest is not None
            else config.featurize.images_per_partition or choose_partition_size(len(catalog))
        ),
        manifest=manifest,
        committed=frozenset(store.list_committed(output) if has_store else ()),
        budget=Budget(
            config.limits,
            # The user's own cluster costs this run nothing.
            config.cluster if client is None else LocalClusterConfig(),
            region=inputs.regions["cluster"],
            spent=manifest.cost if manifest is not None else None,
            elapsed_seconds=clock.total_seconds,
        ),
        clock=clock,
        lock=lock,
        retry_failed=retry_failed,
        applied=applied,
    )


def _check_applied(output: Location, manifest: store.RunManifest, record: store.AppliedRecord) -> None:
    """Refuse an output with components other than those to apply."""
    found = manifest.applied
    if found is None and not manifest.is_complete:
        # The manifest was restored after damage.
        return
    if found is None or found.sha256 != record.sha256:
        theirs = "its own" if found is None else f"those that {found.output} had before"
        raise StoreMismatchError(
            store.describe_mismatch(output, f"its principal components are {theirs}, not those of {record.output}")
        )

"""The description of an output folder: typed manifests, how they change, and how their JSON is read and written.

Every JSON file and every Zarr group carries `format` and `checksum`. A record keeps the entries that this version does
not know, so that nothing is lost when it is written again.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fruitdask.core.config import ExploreConfig, QualityConfig, ReduceConfig, rename_solver
from fruitdask.errors import FormatError
from fruitdask.store.layout import CHECKSUM

#: The format of an output folder that this version writes. It is raised when an earlier version could misread a later
#: one's output.
FORMAT = 1

Settings = TypeVar("Settings", bound=BaseModel)


class Record(BaseModel):
    """A frozen part of a manifest that keeps unknown entries."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    def dump(self) -> dict[str, Any]:
        """Return plain JSON, without the entries that are not set."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value is not None}

    def change(self, **changes: Any) -> Self:
        """Return a copy with other entries, checked like one that is read."""
        return type(self).model_validate(dict(self) | changes)


class ModelRecord(Record):
    """The network that computed the features."""

    name: str
    layer: str
    engine: str
    preprocessing: str
    input_px: int = Field(ge=1)
    n_features: int = Field(ge=1)
    sha256: str


class FitRecord(Record):
    """The images and settings to which the principal components were fitted."""

    n_images: int
    n_changed: int
    n_components: int | float
    solver: Annotated[str, BeforeValidator(rename_solver)]
    seed: int


class ComponentsRecord(Record):
    """The principal components in `pca.zarr`."""

    is_kept: bool
    fit: FitRecord
    n_components: int = Field(ge=1)
    explained_variance_ratio: tuple[float, ...]


class CountsRecord(Record):
    """Images by status, and by class and status; `vanished` counts those that are not in the input any more."""

    by_status: dict[str, int]
    by_class: dict[str, dict[str, int]]
    vanished: int = 0


class ClusterRecord(Record):
    """The cluster that computed the features."""

    kind: str
    n_workers: int
    n_threads: int


class ErasureRecord(Record):
    """An erasure: when, and how many images."""

    at: str
    n_images: int


class CostRecord(Record):
    """US dollars spent, in total and by instance type."""

    dollars: float
    instances: dict[str, dict[str, float]]


class IssuesRecord(Record):
    """Photographs to check: how many of each kind, and when the exploration behind them was finished."""

    by_kind: dict[str, int]
    exploration: str | None = None


class AppliedRecord(Record):
    """The finished run whose network and principal components are applied to other images."""

    output: str
    finished: str
    #: Its principal components, and a hash of their values; None if it has none.
    components: ComponentsRecord | None = None
    sha256: str | None = None


class DuplicatesRecord(Record):
    """Groups of duplicates or near duplicates."""

    n_groups: int
    n_images: int
    n_groups_across_classes: int


class SilhouetteRecord(Record):
    """Mean silhouettes; None where a class has too few images."""

    mean: float | None
    by_class: dict[str, float | None]


class ConfusionRecord(Record):
    """Shares of nearest neighbours by class of an image (rows) and of its neighbours (columns)."""

    labels: tuple[str, ...]
    share: tuple[tuple[float, ...], ...]


class NeighborsRecord(Record):
    """How often the nearest neighbours of an image are of its class."""

    k: int
    agreement: float | None
    #: The agreement of neighbours that chance chooses.
    chance: float | None = None
    by_class: dict[str, float | None]
    confusion: ConfusionRecord


class GroupedRecord(Record):
    """Silhouettes and neighbours between images of different groups."""

    n_groups: int
    #: Groups with images of several classes, which may be different objects of one name.
    n_groups_across_classes: int = 0
    #: Classes with a single group, which therefore have no figures.
    classes_of_one_group: tuple[str, ...]
    silhouette: SilhouetteRecord
    neighbors: NeighborsRecord


class SeriesRecord(Record):
    """Evidence that images come in series of one object: the fraction of images, and a pattern for `group_from`."""

    fraction: float
    pattern: str


class VarianceRecord(Record):
    """Explained variance ratios, and how many components reach a share of the variance."""

    ratio: tuple[float, ...]
    n_components: dict[str, int | None]


class Quality(Record):
    """`quality.json`: how well the features separate the classes."""

    n_images: int
    n_images_with_features: int
    metric: str
    silhouette: SilhouetteRecord
    neighbors: NeighborsRecord
    grouped: GroupedRecord | None = None
    series: SeriesRecord | None = None
    explained_variance: VarianceRecord | None = None


class Manifest(Record):
    """What the manifests of a run and of an exploration have in common."""

    format: int = FORMAT
    fruitdask: str
    status: Literal["running", "complete", "deleting", "erasing", "erased"]
    fingerprint: dict[str, str | dict[str, Any]]
    finished: str | None = None
    regions: dict[str, str] = {}
    left_out: dict[str, int] = {}
    processing: dict[str, Any] = {}
    #: SHA-256 of files without their own checksums, by name.
    digests: dict[str, str] = {}

    @property
    def is_complete(self) -> bool:
        """Whether the results are complete."""
        return self.status == "complete"

    def mark_deleting(self) -> Self:
        """Return the manifest of results that are being deleted: remains of them must not pass as results."""
        return self.change(status="deleting")


class RunManifest(Manifest):
    """`manifest.json`: what was run, on what, when, and with what result."""

    n_images: int = Field(ge=0)
    images_per_partition: int = Field(ge=1)
    model: ModelRecord
    started: str | None = None
    cluster: ClusterRecord | None = None
    versions: dict[str, Any] | None = None
    seconds: dict[str, float | dict[str, float]] = {}
    config: dict[str, dict[str, Any]] = {}
    history: tuple[dict[str, Any], ...] = ()
    erasures: tuple[ErasureRecord, ...] = ()
    counts: CountsRecord | None = None
    pca: ComponentsRecord | None = None
    applied: AppliedRecord | None = None
    issues: IssuesRecord | None = None
    #: SHA-256 of the splits and groups of the images, if configured.
    groupings: dict[str, str] = {}
    presented: dict[str, Any] | None = None
    n_computed: int | None = None
    cost: CostRecord | None = None

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        """Require the entries that every run writes, and of a complete run those of its results."""
        for part in ("catalog", "decoding", "model"):
            if part not in self.fingerprint:
                raise ValueError(f"no entry 'fingerprint.{part}'")
        if self.is_complete:
            missing = [name for name in ("finished", "counts") if getattr(self, name) is None]
            missing += [f"config.{name}" for name in ("input", "output", "report") if name not in self.config]
            if missing:
                raise ValueError(f"no entry {missing[0]!r}")
            self.read_settings("reduce", ReduceConfig)
            self.read_settings("quality", QualityConfig)
            self.read_settings("explore", ExploreConfig)
        return self

    @property
    def n_partitions(self) -> int:
        """Number of partitions."""
        return -(-self.n_images // self.images_per_partition)

    @property
    def trained_on(self) -> dict[str, Any]:
        """What a classifier depends on: the images with their labels, and their groups."""
        return {"catalog": self.fingerprint["catalog"], "group": self.groupings.get("group")}

    def read_settings(self, section: str, kind: type[Settings]) -> Settings:
        """Read a section of the configuration that was run; unknown settings are of a later version, missing ones had
        their default.
        """
        if section not in self.config:
            raise ValueError(f"no entry 'config.{section}'")
        known = {key: value for key, value in self.config[section].items() if key in kind.model_fields}
        try:
            return kind.model_validate(known)
        except ValidationError as error:
            raise ValueError(f"{describe_invalid(error)} in config.{section}") from error

    def reopen(self) -> Self:
        """Return the manifest of a run whose results have to be made again."""
        return self.change(status="running")

    def drop_components(self) -> Self:
        """Return the manifest without principal components."""
        return self.change(pca=None)

    def drop_groupings(self) -> Self:
        """Return the manifest of a run whose catalog may lack splits and groups."""
        return self.change(groupings={})

    def complete(self, **results: Any) -> Self:
        """Return the manifest of a run whose results are written."""
        return self.change(status="complete", **results)

    def begin_rendering(self) -> Self:
        """Return the manifest of a run whose page and figures are out of date."""
        return self.change(presented=None)

    def end_rendering(self, mark: dict[str, Any], config: Mapping[str, dict[str, Any]]) -> Self:
        """Return the manifest of a run whose page and figures were rendered with some settings."""
        return self.change(presented=mark, config=self.config | dict(config))

    def begin_erasing(self, *, n_kept: int, catalog: str, erasure: ErasureRecord) -> Self:
        """Return the manifest of a run without its results, from which images are being erased; components of another
        run do not depend on them.
        """
        results = ("counts", "issues", "presented", "finished", *(("pca",) if self.applied is None else ()))
        return self.change(
            status="erasing",
            n_images=n_kept,
            fingerprint=self.fingerprint | {"catalog": catalog},
            erasures=(*self.erasures, erasure),
            digests={},
            groupings={},
            **dict.fromkeys(results),
        )

    def end_erasing(self) -> Self:
        """Return the manifest of a run from which images were erased, before its results are computed again."""
        return self.change(status="erased")


class ExplorationManifest(Manifest):
    """`explore.json`: what was explored, how, when, and what was found."""

    n_images: int | None = None
    n_ok: int | None = None
    input_px: int | None = None
    #: Side at which images were compared, if smaller than `input_px` because very many classes alternate.
    compared_px: int | None = None
    scale: str | None = None
    near_duplicate_bits: int | None = None
    duplicates: DuplicatesRecord | None = None
    near_duplicates: DuplicatesRecord | None = None
    metadata: dict[str, int] | None = None

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        """Require what every complete exploration writes."""
        if self.is_complete:
            optional = {*Manifest.model_fields, "compared_px"}
            own = [name for name in ExplorationManifest.model_fields if name not in optional]
            missing = [name for name in ("finished", *own) if getattr(self, name) is None]
            if missing or "catalog" not in self.fingerprint:
                raise ValueError(f"no entry {(missing or ['fingerprint.catalog'])[0]!r}")
        return self

    def renew(self, *, processing: dict[str, Any], left_out: dict[str, int]) -> Self:
        """Return the manifest with another record of processing and other counts of what is left out."""
        return self.change(processing=processing, left_out=left_out)


def seal(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Add the format and a checksum to a tree of JSON."""
    sealed = {"format": FORMAT} | {name: value for name, value in tree.items() if name != CHECKSUM}
    return sealed | {CHECKSUM: _hash(sealed)}


def is_intact(tree: Any) -> bool:
    """Whether a tree of JSON matches its checksum."""
    return isinstance(tree, dict) and tree.get(CHECKSUM) == _hash(
        {name: value for name, value in tree.items() if name != CHECKSUM}
    )


def check_format(tree: Any, where: str) -> None:
    """Refuse what a later version wrote in a format that this one does not know."""
    found = tree.get("format") if isinstance(tree, Mapping) else None
    if isinstance(found, int) and found > FORMAT:
        raise FormatError(
            f"{where}: expected format {FORMAT}, found format {found}, which a later version of fruitdask wrote; "
            "update fruitdask, or choose another output.url"
        )


def describe_invalid(error: ValidationError) -> str:
    """Describe the first mistake in a manifest: the end of "expected ..., found"."""
    first = error.errors(include_url=False)[0]
    entry = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"no entry {entry!r}"
    if not entry:
        return str(first["msg"]).removeprefix("Value error, ")
    return f"{str(first['input'])[:60]!r} as its {entry}"


def _hash(tree: Mapping[str, Any]) -> str:
    """Hash a tree of JSON; keys that are numbers become text, as they do when it is written."""
    text = json.dumps(json.loads(json.dumps(tree)), sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

"""The sections of a configuration as frozen, validated objects."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from fruitdask.core.config.base import Section
from fruitdask.core.config.clusters import ClusterConfig, LocalClusterConfig

#: The random numbers of scikit-learn take seeds of 32 bits.
_MAX_SEED = 2**32 - 1
#: Of images in one task and in one array in memory; far more than is of use.
_MAX_TOGETHER = 1_000_000
#: Pillow refuses images of more than twice its own ``MAX_IMAGE_PIXELS`` (89,478,485), so no higher limit works.
PILLOW_LIMIT_PIXELS = 178_956_970


class SampleConfig(Section):
    """A small drawn data set, in place of photographs."""

    per_class: int = Field(24, ge=1, description="Images per class.")
    size_px: int = Field(160, ge=16, description="Side of the square images, in pixels.")
    seed: int = Field(0, ge=0, description="Seed of the small differences between images.")


class InputConfig(Section):
    """Which images to read."""

    url: str = Field(
        min_length=1,
        description=(
            "Folder of images: a path, a URL (s3://bucket/prefix, abfs://container/folder), or an archive: "
            "zip://FOLDER::ARCHIVE or tar://FOLDER::ARCHIVE, such as zip://::photos.zip. On S3 prefer ZIP: each worker "
            "reads a whole tar to find its files."
        ),
    )
    storage_options: dict[str, Any] = Field(
        {},
        repr=False,
        description=(
            "Options of the fsspec file system (of an archive: that of its own URL), such as endpoint_url, anon or "
            "account_name."
        ),
    )
    region: str | None = Field(
        None,
        description=(
            "Region of url, such as eu-west-3. AWS reports it; other stores need it if privacy.allowed_regions is set."
        ),
    )
    label_from: str = Field(
        "parent",
        description="Folder that names the class: parent, first, or a regular expression on the path with one group.",
    )
    split_from: str | None = Field(
        None,
        description="Folder that names the split (train, test ...), as in label_from; null writes no column split.",
    )
    group_from: str | None = Field(
        None,
        description=(
            "Which images show the same object, such as one turntable series: a folder as in label_from, or a regular "
            "expression on the path with one group, such as (.*/r\\d+)_; null: unknown. Figures of quality then "
            "compare images of different groups only."
        ),
    )
    classes: tuple[str, ...] | None = Field(None, min_length=1, description="Classes to keep; null keeps all.")
    exclude: tuple[str, ...] = Field((), description="Patterns (fnmatch) to skip, such as pear_1/* or */IMG_20*.")
    exclude_from: str | None = Field(
        None, description="CSV or Parquet table (path, label) of images to skip, such as the page's selected.csv."
    )
    extensions: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="File name extensions of images, in any case; null takes all formats that fruitdask reads.",
    )
    hidden: bool = Field(
        False,
        description="Include files and folders whose names begin with a dot, and system folders such as __MACOSX.",
    )
    limit: int | None = Field(
        None, ge=1, description="Maximum number of images, evenly from all classes and always the same ones; null: all."
    )
    manifest: str | None = Field(
        None,
        description=(
            "CSV or Parquet file with the columns path, label and optionally split and group, in place of class "
            "folders. A path that is not in the input becomes a missing image."
        ),
    )
    inventory: str | None = Field(
        None,
        description=(
            "Names, sizes and versions of the files, which are read from here instead of listing url: manifest.json of "
            "an S3 Inventory of its bucket (CSV, Parquet or ORC, with the optional fields Size and ETag), or a CSV or "
            "Parquet table with the columns path (relative to url, or a URL below it), bytes, and optionally version "
            "or ETag. S3 Inventory gives the same images as listing S3. With a table that has other versions than a "
            "listing (on S3 and Azure: ETags), changing from one to the other computes all images again; without "
            "versions, only another size shows that an image has changed. Deleted files become missing images, and "
            "files newer than the inventory are left out."
        ),
    )
    sample: SampleConfig | None = Field(None, description="Draw a sample data set into url if it does not exist.")

    @field_validator("url")
    @classmethod
    def _check_protocol(cls, url: str) -> str:
        wanted = None
        if match := re.match(r"(?i:dbfs):/+", url):
            wanted = f"/dbfs/{url[match.end() :]}"
        elif match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", url):
            wanted = f"{match[1]}://{url[match.end() :]}"
        if wanted:
            raise ValueError(f"expected a path or a URL, found {url}; write {wanted}")
        return url

    @field_validator("label_from", "split_from", "group_from")
    @classmethod
    def _check_rule(cls, rule: str | None) -> str | None:
        if rule in (None, "parent", "first"):
            return rule
        wanted = "expected parent, first, or a regular expression with one group, such as ^[^/]+/([^/]+)/"
        try:
            n_groups = re.compile(str(rule)).groups
        except re.error as error:
            raise ValueError(f"{wanted}; found {rule}, which is not valid: {error}") from error
        if n_groups != 1:
            raise ValueError(f"{wanted}; found {rule}, which has {n_groups} groups")
        return rule

    @property
    def rules(self) -> dict[str, str]:
        """How label, split and group follow from a path, if configured."""
        rules = {"label": self.label_from, "split": self.split_from, "group": self.group_from}
        return {name: rule for name, rule in rules.items() if rule is not None}

    @field_validator("extensions")
    @classmethod
    def _normalize_extensions(cls, extensions: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return extensions and tuple("." + extension.lower().lstrip(".") for extension in extensions)

    @model_validator(mode="after")
    def _check_labels(self) -> "InputConfig":
        if self.manifest is not None and self.label_from != "parent":
            raise ValueError("label_from and manifest both set the class of an image; remove one of them")
        if self.inventory is not None and "::" in self.url:
            raise ValueError(
                "inventory expects a folder in url, found an archive, which names its files; remove inventory"
            )
        return self


class ModelConfig(Section):
    """Which network turns an image into features."""

    name: str = Field(
        "MobileNetV2", description="Network of keras.applications, or SqueezeNet. Ignored if weights are a whole model."
    )
    weights: str = Field(
        "imagenet",
        description=(
            "imagenet, random, or a path or URL: weights of that network (.weights.h5, .h5), or a whole Keras model "
            "(.keras, or .h5 with preprocessing)."
        ),
    )
    storage_options: dict[str, Any] = Field({}, repr=False, description="Options of the weights' fsspec file system.")
    region: str | None = Field(None, description="Region of remote weights, as input.region.")
    input_px: int | None = Field(
        None,
        ge=32,
        description="Side of the square input, in pixels; null takes the network's. Required for a model of any size.",
    )
    pooling: Literal["avg", "max", "flatten"] = Field("avg", description="How the last feature map becomes one vector.")
    layer: str | None = Field(
        None,
        description=(
            "Layer whose output becomes the features: layer, or network/layer in nested networks; null takes the "
            "input of the classifier, or without a classifier the output. The classifier is the last Dense layer, or "
            "1 x 1 convolution before a global pooling, that is followed by softmax or sigmoid, was trained with a "
            "cross-entropy, or has fewer than 32 units. Required where that is ambiguous."
        ),
    )
    preprocessing: Literal["tf", "caffe", "torch", "none"] | None = Field(
        None,
        description="Scaling of pixel values, as Keras names it; null takes the network's. Required for a whole model.",
    )
    allow_code: bool = Field(
        False,
        description="Run Python code in a .keras or .h5 file, such as that of Lambda layers; only for files you trust.",
    )
    engine: Literal["auto", "tensorflow", "openvino"] = Field(
        "auto",
        description="What runs the network on the workers; auto takes openvino if it is installed and there is no GPU.",
    )
    precision: Literal["float32", "mixed_float16"] = Field(
        "float32",
        description="mixed_float16 is faster on GPUs (TensorFlow only), and changes features by a few percent.",
    )

    @property
    def is_keras_file(self) -> bool:
        """Whether the weights are a whole Keras model, by the name of their file."""
        return self.weights.lower().endswith(".keras")

    @model_validator(mode="after")
    def _check_keras_file(self) -> "ModelConfig":
        if self.is_keras_file and self.preprocessing is None:
            raise ValueError(
                "preprocessing must be given for a .keras file, which does not record how its pixels were scaled: "
                "tf, caffe, torch or none"
            )
        if self.is_keras_file and self.precision != "float32":
            raise ValueError("precision cannot be chosen for a .keras file, which has its own; leave it out")
        return self


class FeaturizeConfig(Section):
    """How images become features."""

    images_per_partition: int | None = Field(
        None,
        ge=1,
        le=_MAX_TOGETHER,
        description="Images per task, Zarr chunk and commit; null chooses by the number of images.",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=_MAX_TOGETHER,
        description="Images per call of the network; null takes 8 on CPUs, where more is not faster, or 32.",
    )
    max_failed_fraction: float = Field(
        0.05, ge=0, le=1, description="The run fails above this fraction of failed images."
    )
    max_pixels: int = Field(
        50_000_000,
        ge=1,
        le=PILLOW_LIMIT_PIXELS,
        description=(
            "Images with more pixels fail. It also limits the pixels that the threads of a worker decode at once, at 4 "
            "to 8 bytes per pixel (WebP: 16). Files of more than 8 bytes per pixel and 64 MiB are not read."
        ),
    )
    decode: Literal["exact", "fast"] = Field(
        "exact",
        description=(
            "fast lets the JPEG decoder shrink images that are at least twice the network's input: decoding takes half "
            "as long, and features have a cosine similarity of 0.9992 to the exact ones (0.992 at worst in 846 images)."
        ),
    )
    fetch_attempts: int = Field(5, ge=1, description="Attempts to read an image, with random exponential backoff.")
    concurrent_reads: int = Field(16, ge=1, description="Files that a worker thread reads at once from a remote input.")


class TsneConfig(Section):
    """A two-dimensional t-SNE map, in addition to the PCA."""

    enabled: bool = Field(False, description="Compute t-SNE.")
    max_rows: int = Field(5_000, ge=10, description="Maximum number of images, drawn at random; time grows with it.")
    perplexity: float = Field(30.0, gt=0, description="Approximate number of neighbours of each image.")
    seed: int = Field(0, ge=0, le=_MAX_SEED, description="Seed of the sample and of the map.")


#: Solvers of principal components, by the names of scikit-learn and dask-ml.
Solver = Literal["covariance_eigh", "full", "tsqr", "randomized"]


def rename_solver(name: Any) -> Any:
    """Rename the solver of outputs that were written before solvers had the names of scikit-learn."""
    return "covariance_eigh" if name == "exact" else name


class ReduceConfig(Section):
    """How features become a few numbers per image."""

    enabled: bool = Field(True, description="Reduce the features by PCA and t-SNE; false only stores them.")
    n_components: int | float = Field(
        2, gt=0, description="Principal components to keep, or the fraction (0 to 1) of the variance to keep."
    )
    solver: Annotated[Solver, BeforeValidator(rename_solver)] = Field(
        "covariance_eigh",
        description=(
            "covariance_eigh is exact and reads the features once; full and tsqr are exact as well, and hold them in "
            "the workers' memory; randomized is an estimate, for over 4096 features and images."
        ),
    )
    seed: int = Field(0, ge=0, le=_MAX_SEED, description="Seed of the randomized solver.")
    refit: Literal["auto", "always", "never"] = Field(
        "auto",
        description=(
            "Whether to fit the PCA again after images were added, changed or removed; auto: if they are more than "
            "a tenth of the images it was fitted to."
        ),
    )
    tsne: TsneConfig = TsneConfig()

    @model_validator(mode="after")
    def _check_n_components(self) -> "ReduceConfig":
        if isinstance(self.n_components, float):
            if not 0 < self.n_components < 1:
                raise ValueError(
                    f"n_components must be an integer, or a fraction between 0 and 1, not {self.n_components}"
                )
            if self.solver == "randomized":
                raise ValueError(
                    "a fraction as n_components needs all components: use solver: covariance_eigh, or an integer"
                )
        return self


class ExploreConfig(Section):
    """What to find out about the images themselves, without a network."""

    enabled: bool = Field(True, description="Explore the images in the same pass that featurizes them.")
    input_px: int | None = Field(None, ge=16, description="Side of compared images, in pixels; null: the network's.")
    scale: Literal["signed", "unit", "bytes"] = Field(
        "signed", description="Scale of pixel values in differences: signed is -1 to 1, unit 0 to 1, bytes 0 to 255."
    )
    near_duplicate_bits: int = Field(
        2, ge=0, le=8, description="Near duplicates differ in at most this many of 64 bits of their perceptual hashes."
    )
    thumbnail_px: int | None = Field(
        None,
        ge=16,
        le=256,
        description="Side of the thumbnails, in pixels; null: 128, or 64 for more than 20,000 images.",
    )
    max_thumbnails: int = Field(2_000, ge=1, description="Maximum number of thumbnails, spread evenly over classes.")

    def choose_thumbnail_px(self, n_images: int) -> int:
        """Choose the side of the thumbnails; while images are explored, the output holds those of all images."""
        return self.thumbnail_px or (128 if n_images <= 20_000 else 64)


class QualityConfig(Section):
    """How well the features separate the classes."""

    enabled: bool = Field(True, description="Compute silhouettes and the agreement of nearest neighbours.")
    n_neighbors: int = Field(5, ge=1, description="Nearest neighbours whose classes are compared with each image's.")
    metric: Literal["euclidean", "cosine"] = Field("euclidean", description="Distance between features.")
    max_rows: int = Field(
        5_000, ge=10, description="Maximum number of images, drawn at random; time grows with its square."
    )
    seed: int = Field(0, ge=0, description="Seed of the sample.")


class CheckConfig(Section):
    """Which photographs a person should look at."""

    enabled: bool = Field(True, description="Write a list of photographs to check.")
    n_neighbors: int = Field(10, ge=1, description="Nearest neighbours that vote on the class of an image.")
    max_rows: int = Field(
        10_000,
        ge=10,
        description="Maximum number of images that may vote, evenly from all classes; time grows with it.",
    )


class PlotsConfig(Section):
    """Figures as PNG files."""

    enabled: bool = Field(True, description="Write the figures.")
    components: tuple[PositiveInt, PositiveInt] = Field(
        (1, 2), description="The two principal components that the maps show, counted from 1."
    )
    dpi: int = Field(150, ge=50, le=600, description="Dots per inch.")

    @field_validator("components")
    @classmethod
    def _check_two(cls, components: tuple[int, int]) -> tuple[int, int]:
        if components[0] == components[1]:
            raise ValueError("expected two different components")
        return components


class ReportConfig(Section):
    """The page of results, for people who never open Python."""

    enabled: bool = Field(True, description="Write report.html.")
    title: str | None = Field(None, description="Title of the page; null takes the input's name.")
    max_points: int = Field(10_000, ge=10, description="Images in the interactive maps, sampled evenly over classes.")
    examples_per_class: int = Field(6, ge=0, description="Thumbnails per class.")


class OutputConfig(Section):
    """Where results go."""

    url: str = Field(min_length=1, description="Folder for the results, outside the input: a path or a URL.")
    storage_options: dict[str, Any] = Field({}, repr=False, description="Options of the fsspec file system.")
    region: str | None = Field(None, description="Region of url, as input.region.")
    attempts: int = Field(
        5,
        ge=1,
        description="Attempts per request to an output on S3 or Azure. If all fail, the run stops, and can be resumed.",
    )
    overwrite: bool = Field(
        False, description="Delete the results of earlier runs there, and no other files, and start again."
    )


class PrivacyConfig(Section):
    """Where data may be, and what the record of processing says (GDPR, articles 30 and 44)."""

    allowed_regions: Literal["eu"] | tuple[str, ...] | None = Field(
        None,
        description="Regions for images, results and machines; eu means all of AWS and Azure in the European Union.",
    )
    require_encryption: bool = Field(False, description="Refuse an output on S3 without encryption at rest.")
    controller: str | None = Field(
        None, description="Who is responsible for the images, for the record of processing; see PRIVACY.md."
    )
    purpose: str | None = Field(None, description="Why the images are processed, for the record.")
    retention_days: int | None = Field(None, ge=1, le=36_525, description="How long results are kept, for the record.")


class LimitsConfig(Section):
    """Limits of a run. It does not start if it would exceed one, and stops if it does."""

    max_cost: PositiveFloat | None = Field(None, description="US dollars for the instances of the cluster.")
    max_hours: PositiveFloat | None = Field(None, description="Hours from start to end.")


class Config(Section):
    """A whole run: input, network, cluster and results."""

    input: InputConfig
    model: ModelConfig = ModelConfig()
    cluster: ClusterConfig = LocalClusterConfig()
    featurize: FeaturizeConfig = FeaturizeConfig()
    reduce: ReduceConfig = ReduceConfig()
    explore: ExploreConfig = ExploreConfig()
    quality: QualityConfig = QualityConfig()
    check: CheckConfig = CheckConfig()
    plots: PlotsConfig = PlotsConfig()
    report: ReportConfig = ReportConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    limits: LimitsConfig = LimitsConfig()
    output: OutputConfig

    @model_validator(mode="after")
    def _check_limits(self) -> "Config":
        if self.cluster.kind == "custom" and self.limits.max_cost is not None:
            raise ValueError("limits.max_cost needs known prices, and those of kind: custom are unknown; remove it")
        return self

    @model_validator(mode="after")
    def _check_components(self) -> "Config":
        n_components, shown = self.reduce.n_components, self.plots.components
        # One component gives no map, and is allowed.
        if isinstance(n_components, int) and 1 < n_components < max(shown):
            raise ValueError(
                f"plots.components names component {max(shown)}, but reduce.n_components is {n_components}"
            )
        return self

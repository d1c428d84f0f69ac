"""The configuration: defaults, then a YAML file, then overrides, merged once into frozen, validated objects."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from fruitdask.errors import ConfigError

#: Pillow refuses an image of more than twice its own ``MAX_IMAGE_PIXELS`` (89,478,485), so no larger limit can be honoured.
PILLOW_LIMIT_PIXELS = 178_956_970

#: Keys that hold a path or a URL; a relative path is resolved against the file (or the working directory) it was written in.
URL_KEYS = (("input", "url"), ("input", "manifest"), ("model", "weights"), ("output", "url"))
_WORDS_FOR_WEIGHTS = ("imagenet", "random")
_ENV_PATTERN = re.compile(r"\$\{(\w+)\}")


class _Section(BaseModel):
    """A frozen part of the configuration that knows its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SampleConfig(_Section):
    """A small drawn data set that stands in for photographs."""

    per_class: int = Field(24, ge=1, description="Images per class.")
    size_px: int = Field(160, ge=16, description="Side of the square images, in pixels.")
    seed: int = Field(0, ge=0, description="Seed of the small differences between images.")


class InputConfig(_Section):
    """Which images to read."""

    url: str = Field(
        min_length=1,
        description="Folder of images: a path or any fsspec URL (s3://bucket/prefix). The class of an image is its folder.",
    )
    storage_options: dict[str, Any] = Field(
        {}, description="Options of the fsspec file system, such as endpoint_url or anon."
    )
    classes: tuple[str, ...] | None = Field(None, min_length=1, description="Classes to keep; null keeps all.")
    extensions: tuple[str, ...] = Field(
        (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"),
        min_length=1,
        description="File name endings of images, in any case.",
    )
    limit: int | None = Field(
        None, ge=1, description="At most so many images, spread evenly over the classes; null takes all."
    )
    manifest: str | None = Field(
        None, description="CSV or Parquet file with the columns path and label, instead of one class per folder."
    )
    sample: SampleConfig | None = Field(
        None, description="Draw a sample data set into url where that folder does not exist."
    )

    @field_validator("extensions")
    @classmethod
    def _normalize_extensions(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("." + extension.lower().lstrip(".") for extension in extensions)


class ModelConfig(_Section):
    """Which network turns an image into features."""

    name: str = Field(
        "MobileNetV2", description="A network of keras.applications, or SqueezeNet. Ignored for a .keras file."
    )
    weights: str = Field(
        "imagenet", description="imagenet, random, or a path or URL of a .weights.h5, .h5 or .keras file."
    )
    input_px: int | None = Field(
        None, ge=32, description="Side of the square input, in pixels; null takes the network's own."
    )
    pooling: Literal["avg", "max", "flatten"] = Field("avg", description="How the last feature map becomes one vector.")
    layer: str | None = Field(
        None, description="Layer whose output are the features; null takes the last before the classifier."
    )
    preprocessing: Literal["tf", "caffe", "torch", "none"] | None = Field(
        None,
        description="How pixel values are scaled, in the words of Keras; null takes the network's own. Must be given for a .keras file.",
    )
    engine: Literal["auto", "tensorflow", "openvino"] = Field(
        "auto",
        description="What runs the network on the workers; auto takes openvino where it is installed and there is no GPU.",
    )

    @model_validator(mode="after")
    def _check_keras_file(self) -> "ModelConfig":
        if self.weights.endswith(".keras") and self.preprocessing is None:
            raise ValueError(
                "preprocessing must be given for a .keras file, which does not say how its pixels were scaled: tf, caffe, torch or none"
            )
        return self


class LocalClusterConfig(_Section):
    """A Dask cluster on this machine."""

    kind: Literal["local"] = "local"
    n_workers: int | None = Field(
        None, ge=1, description="Worker processes; null chooses from the cores and the memory."
    )
    threads_per_worker: int | None = Field(None, ge=1, description="Threads a process; null chooses from the cores.")
    memory_limit: str | int | None = Field(
        None, description="Memory a process, such as 4GiB; null shares the machine's memory."
    )
    dashboard_address: str | None = Field(
        "127.0.0.1:8787", description="Where the dashboard listens; null turns it off."
    )


class AddressClusterConfig(_Section):
    """A Dask cluster that is already running."""

    kind: Literal["address"]
    address: str = Field(description="Address of its scheduler, such as tcp://10.0.0.5:8786.")
    timeout_seconds: float = Field(30, gt=0, description="How long to wait for the scheduler and its first worker.")


ClusterConfig = Annotated[LocalClusterConfig | AddressClusterConfig, Field(discriminator="kind")]


class FeaturizeConfig(_Section):
    """How images become features."""

    images_per_partition: int | None = Field(
        None, ge=1, description="Images a task and a Zarr chunk; null chooses from the number of images."
    )
    batch_size: int = Field(8, ge=1, description="Images a call of the network; a worker's memory grows with it.")
    max_failed_fraction: float = Field(
        0.05, ge=0, le=1, description="The run fails when a larger fraction of the images does."
    )
    max_pixels: int = Field(
        50_000_000, ge=1, le=PILLOW_LIMIT_PIXELS, description="Images with more pixels are not decoded."
    )
    decode: Literal["exact", "fast"] = Field(
        "exact", description="fast lets the JPEG decoder shrink images of at least twice the network's input."
    )
    fetch_attempts: int = Field(3, ge=1, description="How often reading a file is tried.")
    concurrent_reads: int = Field(
        16, ge=1, description="Files in flight at once in each worker thread, from a remote input."
    )


class TsneConfig(_Section):
    """A two-dimensional t-SNE map beside the PCA."""

    enabled: bool = Field(False, description="Compute it.")
    max_rows: int = Field(
        5_000, ge=10, description="At most so many images, sampled at random: time grows with their number."
    )
    perplexity: float = Field(30.0, gt=0, description="About how many neighbours each image has.")
    seed: int = Field(0, ge=0, description="Seed of the sample and of the map.")


class ReduceConfig(_Section):
    """How features become a few numbers an image."""

    n_components: int | float = Field(
        2, gt=0, description="Principal components to keep, or the fraction (0 to 1) of the variance to keep."
    )
    solver: Literal["exact", "randomized"] = Field(
        "exact",
        description="exact equals scikit-learn's full PCA; randomized estimates, for over 4096 features of over 4096 images.",
    )
    seed: int = Field(0, ge=0, description="Seed of the randomized solver.")
    tsne: TsneConfig = TsneConfig()

    @model_validator(mode="after")
    def _check_n_components(self) -> "ReduceConfig":
        if isinstance(self.n_components, float):
            if not 0 < self.n_components < 1:
                raise ValueError(
                    f"n_components must be an integer, or a fraction between 0 and 1, not {self.n_components}"
                )
            if self.solver == "randomized":
                raise ValueError("a fraction as n_components needs all components: use solver: exact, or an integer")
        return self


class ExploreConfig(_Section):
    """What to find out about the images themselves, without a network."""

    enabled: bool = Field(True, description="Explore the images in the same pass that featurizes them.")
    input_px: int | None = Field(
        None, ge=16, description="Side to which images are resized for comparing; null takes the network's input."
    )
    scale: Literal["signed", "unit", "bytes"] = Field(
        "signed", description="Scale of pixel values in differences: signed is -1 to 1, unit 0 to 1, bytes 0 to 255."
    )
    near_duplicate_bits: int = Field(
        2,
        ge=0,
        le=8,
        description="Images whose perceptual hashes differ in at most so many of 64 bits are near duplicates.",
    )
    thumbnail_px: int = Field(64, ge=16, le=256, description="Side of the thumbnails, in pixels.")
    max_thumbnails: int = Field(
        2_000, ge=1, description="Thumbnails that are kept, evenly over the classes: the report grows with them."
    )


class QualityConfig(_Section):
    """How well the features separate the classes, in numbers."""

    enabled: bool = Field(True, description="Compute silhouettes and the agreement of nearest neighbours.")
    n_neighbors: int = Field(5, ge=1, description="Nearest neighbours of each image that are asked for their class.")
    metric: Literal["euclidean", "cosine"] = Field("euclidean", description="Distance between features.")
    max_rows: int = Field(
        5_000, ge=10, description="At most so many images, sampled at random: time grows with their square."
    )
    seed: int = Field(0, ge=0, description="Seed of the sample.")


class PlotsConfig(_Section):
    """Figures as PNG files."""

    enabled: bool = Field(True, description="Write them.")
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


class ReportConfig(_Section):
    """The page that says what was found, for people who never open Python."""

    enabled: bool = Field(True, description="Write report.html.")
    title: str | None = Field(None, description="Its title; null takes the input's name.")
    max_points: int = Field(
        10_000, ge=10, description="At most so many images in the interactive maps, sampled evenly over the classes."
    )
    examples_per_class: int = Field(6, ge=0, description="Thumbnails shown of each class.")


class OutputConfig(_Section):
    """Where results go."""

    url: str = Field(min_length=1, description="Folder for the results: a path or any fsspec URL.")
    storage_options: dict[str, Any] = Field({}, description="Options of the fsspec file system.")
    overwrite: bool = Field(False, description="Delete an earlier run's results there and start again.")


class Config(_Section):
    """A whole run: what to read, with which network, where, and what to keep."""

    input: InputConfig
    model: ModelConfig = ModelConfig()
    cluster: ClusterConfig = LocalClusterConfig()
    featurize: FeaturizeConfig = FeaturizeConfig()
    reduce: ReduceConfig = ReduceConfig()
    explore: ExploreConfig = ExploreConfig()
    quality: QualityConfig = QualityConfig()
    plots: PlotsConfig = PlotsConfig()
    report: ReportConfig = ReportConfig()
    output: OutputConfig

    @model_validator(mode="after")
    def _check_components(self) -> "Config":
        n_components, shown = self.reduce.n_components, self.plots.components
        # With one component there is no map, which is no mistake.
        if isinstance(n_components, int) and 1 < n_components < max(shown):
            raise ValueError(
                f"plots.components names component {max(shown)}, but reduce.n_components is {n_components}"
            )
        return self


#: The sections by their place, a cluster's kind standing for the alternative that pydantic took.
_SECTIONS: dict[tuple[int | str, ...], type[BaseModel]] = {
    (): Config,
    ("input",): InputConfig,
    ("input", "sample"): SampleConfig,
    ("model",): ModelConfig,
    ("cluster", "local"): LocalClusterConfig,
    ("cluster", "address"): AddressClusterConfig,
    ("featurize",): FeaturizeConfig,
    ("reduce",): ReduceConfig,
    ("reduce", "tsne"): TsneConfig,
    ("explore",): ExploreConfig,
    ("quality",): QualityConfig,
    ("plots",): PlotsConfig,
    ("report",): ReportConfig,
    ("output",): OutputConfig,
}


def load_config(source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = ()) -> Config:
    """
    Load a configuration.

    Parameters
    ----------
    source : str, Path or Mapping
        A YAML file, or the sections themselves as nested mappings. Relative paths are relative to the file (for mappings: to the
        working directory), and ``${NAME}`` in a string becomes the environment variable NAME.
    overrides : Sequence[str]
        Settings such as ``"model.pooling=max"`` that win over the file; their relative paths are relative to the working directory.

    Returns
    -------
    Config
        The validated, frozen configuration.

    Raises
    ------
    ConfigError
        If the file is missing, is not YAML, or does not describe a run.

    Examples
    --------
    >>> config = load_config({"input": {"url": "s3://fruits/Test"}, "output": {"url": "s3://fruits/run"}}, overrides=["model.pooling=max"])
    >>> config.model.name, config.model.pooling
    ('MobileNetV2', 'max')
    """
    name, text = ("the configuration", "") if isinstance(source, Mapping) else (str(source), _read_text(Path(source)))
    base = Path.cwd() if isinstance(source, Mapping) else Path(source).resolve().parent
    try:
        tree = dict(source) if isinstance(source, Mapping) else _parse_yaml(text, name)
        tree = _resolve_paths(_expand_env(tree, name), base, name)
        for override in overrides:
            top = _resolve_paths(_expand_env(_parse_override(override), f"--set {override}"), Path.cwd(), "--set")
            tree = _merge(tree, top)
    except RecursionError as error:
        raise ConfigError(
            f"{name}: expected sections of keys and values, found something nested without end"
        ) from error
    if isinstance(tree.get("cluster"), dict):
        tree["cluster"] = {"kind": "address" if "address" in tree["cluster"] else "local"} | tree["cluster"]
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, name, text, overrides)) from error


def build_schema() -> dict[str, Any]:
    """
    Build the JSON schema of a configuration file.

    Returns
    -------
    dict
        The schema; editors use it to complete and check the YAML.
    """
    return Config.model_json_schema()


def _read_text(path: Path) -> str:
    """Read a configuration file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: there is no such configuration file; configs/demo.yaml in the project is one to start from"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a YAML file in UTF-8, but it cannot be read: {error}") from error


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse YAML whose top level is a mapping."""
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML lets the ValueError of a date that does not exist through.
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: expected sections such as input: and output:, found {type(tree).__name__}")
    return tree


def _parse_override(override: str) -> dict[str, Any]:
    """Turn ``a.b=value`` into nested mappings; the value is YAML."""
    key, separator, value = override.partition("=")
    if not separator or "." not in key:
        raise ConfigError(f"--set {override}: expected section.key=value, for example model.pooling=max")
    try:
        tree: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override}: {value!r} is not a YAML value") from error
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return dict(tree)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; the upper one wins."""
    merged = dict(base)
    for key, value in top.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_mappings else value
    return merged


def _expand_env(tree: Any, name: str) -> Any:
    """Replace ``${NAME}`` in every string."""
    if isinstance(tree, Mapping):
        return {key: _expand_env(value, name) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_expand_env(value, name) for value in tree]
    if not isinstance(tree, str):
        return tree

    def replace(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(
                f"{name}: the environment variable {match[1]} of {tree!r} is not set; set it or write the value out"
            )
        return os.environ[match[1]]

    return _ENV_PATTERN.sub(replace, tree)


def _resolve_paths(tree: dict[str, Any], base: Path, name: str) -> dict[str, Any]:
    """Make the paths of a tree absolute; URLs stay as they are."""
    for section, key in URL_KEYS:
        value = tree.get(section, {}).get(key) if isinstance(tree.get(section), dict) else None
        is_word = section == "model" and value in _WORDS_FOR_WEIGHTS
        if isinstance(value, str) and value and "://" not in value and not is_word:
            try:
                path = base / Path(value).expanduser()
            except RuntimeError as error:
                raise ConfigError(
                    f"{name}: {section}.{key}: there is no home folder for {value}; write the path out"
                ) from error
            tree = _merge(tree, {section: {key: os.path.normpath(path)}})
    return tree


def _explain(error: ValidationError, name: str, text: str, overrides: Sequence[str]) -> str:
    """Say the first thing that is wrong, where it stands and what would be right."""
    first = error.errors()[0]
    section, location = _locate(first["loc"])
    key = ".".join(location) or "the file"
    where = _find_override(overrides, location) or f"{name}{_find_line(text, location)}"
    if first["type"] == "extra_forbidden":
        valid = sorted(section.model_fields)
        nearest = difflib.get_close_matches(location[-1], valid, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"valid keys: {', '.join(valid)}"
        return f"{where}: unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"{where}: the key {key} is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "value_error" else f", found {first['input']!r}"
    return f"{where}: {key}: {message[0].lower() + message[1:]}{found}"


def _locate(loc: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str]]:
    """Find the section of an error and its key as the user wrote it; pydantic also names the alternatives that it tried."""
    depth = max(n for n in range(len(loc)) if loc[:n] in _SECTIONS) if loc else 0
    parts = [*loc[: depth + 1], *(part for part in loc[depth + 1 :] if isinstance(part, int))]
    if loc[:1] == ("cluster",) and len(parts) > 1:
        del parts[1]
    return _SECTIONS[loc[:depth]], [str(part) for part in parts]


def _find_override(overrides: Sequence[str], location: Sequence[str]) -> str | None:
    """Find the override that set a key, the last one if there are several."""
    for override in reversed(overrides):
        parts = override.partition("=")[0].split(".")
        n_common = min(len(parts), len(location))
        if n_common and parts[:n_common] == list(location[:n_common]):
            return f"--set {override}"
    return None


def _find_line(text: str, location: Sequence[str]) -> str:
    """Find the line of the deepest key of a location that stands in the text."""
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader) if text else None
    line = None
    for part in location:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = next(((key, value) for key, value in pairs if key.value == part), None)
        if match is None:
            break
        line, node = match[0].start_mark.line + 1, match[1]
    return f", line {line}" if line else ""

"""The configuration: defaults, then a YAML file, then overrides, merged once into frozen, validated objects."""

from fruitdask.core.config.clusters import (
    AdaptiveConfig,
    AddressClusterConfig,
    AzureClusterConfig,
    CloudClusterConfig,
    ClusterConfig,
    CustomClusterConfig,
    EC2ClusterConfig,
    LocalClusterConfig,
)
from fruitdask.core.config.loading import URL_KEYS, build_schema, load_config
from fruitdask.core.config.places import describe_place
from fruitdask.core.config.reference import build_reference
from fruitdask.core.config.sections import (
    PILLOW_LIMIT_PIXELS,
    CheckConfig,
    Config,
    ExploreConfig,
    InputConfig,
    LimitsConfig,
    ModelConfig,
    QualityConfig,
    ReduceConfig,
    Solver,
    rename_solver,
)
from fruitdask.core.config.sources import parse_file

__all__ = [
    "PILLOW_LIMIT_PIXELS",
    "URL_KEYS",
    "AdaptiveConfig",
    "AddressClusterConfig",
    "AzureClusterConfig",
    "CheckConfig",
    "CloudClusterConfig",
    "ClusterConfig",
    "Config",
    "CustomClusterConfig",
    "EC2ClusterConfig",
    "ExploreConfig",
    "InputConfig",
    "LimitsConfig",
    "LocalClusterConfig",
    "ModelConfig",
    "QualityConfig",
    "ReduceConfig",
    "Solver",
    "build_reference",
    "build_schema",
    "describe_place",
    "load_config",
    "parse_file",
    "rename_solver",
]

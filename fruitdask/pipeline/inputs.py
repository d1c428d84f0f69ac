"""The first step of most commands: check input and output, and list the images."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd

from fruitdask import store
from fruitdask.cluster.regions import check_regions, find_regions
from fruitdask.core.config import URL_KEYS, CloudClusterConfig, Config, load_config
from fruitdask.core.fingerprint import DECODING, compare_fingerprints, describe_settings
from fruitdask.core.progress import RunProgress
from fruitdask.core.sample import draw_sample
from fruitdask.core.storage import Location, check_bucket, exists, hide_secrets, pin
from fruitdask.errors import ConfigError, OutputError, StoreMismatchError
from fruitdask.store.catalog import hash_catalog, list_input
from fruitdask.worker.fetch import ImageSource
from fruitdask.worker.models import choose_batch_size, fingerprint_model


@dataclass(frozen=True)
class Inputs:
    """A configuration whose input and output were checked, and its images."""

    config: Config
    #: Where the images are and how to read them.
    source: ImageSource
    output: Location
    catalog: pd.DataFrame
    #: The regions of the input, the output and the cluster, from `fruitdask.cluster.regions`.
    regions: dict[str, str]
    #: Number of files of the input that are left out, by kind.
    left_out: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What determines the pixels: the versions of the images, and how they are decoded."""
        return {
            "catalog": hash_catalog(self.catalog),
            "decoding": describe_settings("featurize", self.config.featurize, DECODING),
        }


def prepare_inputs(config: Config, progress: RunProgress, *, client: Any = None) -> Inputs:
    """Check input and output, draw the sample if one is configured, and list the images."""
    _check_arguments(config, client)
    source, output = Location(config.input.url, config.input.storage_options), open_output(config)
    is_drawn = config.input.sample is not None and source.is_local and not exists(source)
    progress.begin("Drawing sample photographs" if is_drawn else "Listing images")
    _check_places(source, output)
    if isinstance(config.cluster, CloudClusterConfig) and client is None:
        _check_reach(source, output, config.cluster.kind)
    scheduler = client.scheduler.address if client is not None else None
    regions = check_regions(config, scheduler=scheduler) if config.privacy.allowed_regions is not None else None
    if config.input.sample is not None and not source.is_local:
        raise ConfigError(
            f"input.sample: expected input.url to be a local folder, found {source.url}; draw one with: fruitdask "
            "sample FOLDER"
        )
    if config.input.sample is not None and is_drawn:
        sample = config.input.sample
        draw_sample(source.path, per_class=sample.per_class, size_px=sample.size_px, seed=sample.seed)
        progress.begin("Listing images")
    options = config.featurize.model_dump(include={"max_pixels", "decode", "fetch_attempts", "concurrent_reads"})
    options["batch_size"] = config.featurize.batch_size or choose_batch_size(config.model, config.cluster)
    started = time.monotonic()
    listing = list_input(
        config.input, on_listed=lambda n_images: progress.show_listed(n_images, time.monotonic() - started)
    )
    for note in listing.notes:
        progress.say(f"Note: {note}.")
    if output.is_s3 or output.is_azure:
        check_bucket(output)
    if regions is None:
        # Only for the record: problems of the input were reported above.
        regions = find_regions(config, scheduler=scheduler)
    # Reads of images are retried and counted elsewhere; the storage must not retry them too.
    images = ImageSource(replace(pin(source), attempts=1), **options)
    return Inputs(config, images, output, listing.files, regions, listing.left_out)


def resolve_erasure(inputs: Inputs, progress: RunProgress) -> None:
    """Finish an erasure that was interrupted, and warn where erased images may come back."""
    store.finish_erasing(inputs.output)
    manifest = store.read_run(inputs.output)
    if manifest is not None and manifest.erasures and inputs.config.output.overwrite:
        progress.say(
            "Warning: images were erased from the results that are overwritten; those that are still in the input will "
            "be included again unless input.exclude names them."
        )


def open_output(config: Config) -> Location:
    """Return the output folder of a configuration."""
    return Location(config.output.url, config.output.storage_options, config.output.attempts)


def dump_config(config: Config) -> dict[str, Any]:
    """Return a configuration as JSON, without storage options, secrets in URLs and the names of excluded images."""
    options = {"storage_options"}
    # Settings for containers and shells may hold secrets, although they should not.
    cluster = {"env_vars", "docker_args", "extra_bootstrap", "worker_options", "scheduler_options", "options"}
    exclude = {"input": options | {"exclude", "exclude_from"}, "model": options, "output": options, "cluster": cluster}
    dumped: dict[str, Any] = json.loads(config.model_dump_json(exclude=exclude))
    for section, key in URL_KEYS:
        if dumped[section][key] is not None:
            dumped[section][key] = hide_secrets(dumped[section][key])
    return dumped


def restore_config(
    manifest: store.RunManifest, *, overrides: Sequence[str] = (), sections: Mapping[str, dict[str, Any]] | None = None
) -> Config:
    """Restore the configuration of a run from its manifest, with the engine that it used, and replace some sections.

    Storage options are not recorded, so `overrides` must contain those that are needed.
    """
    recorded = manifest.config | dict(sections or {})
    kinds = [str(override).partition("=")[2] for override in overrides if override.startswith("cluster.kind=")]
    if kinds and kinds[-1] != recorded.get("cluster", {}).get("kind"):
        # Another kind of cluster has other settings.
        recorded["cluster"] = {}
    recorded["model"] = recorded.get("model", {}) | {"engine": manifest.model.engine}
    return load_config(recorded, overrides=overrides)


def check_network(output: Location, manifest: store.RunManifest, config: Config) -> None:
    """Refuse a network or a decoding that would give other features than those in the output."""
    ours = {
        "model": fingerprint_model(config.model),
        "decoding": describe_settings("featurize", config.featurize, DECODING),
    }
    differences = "; ".join(compare_fingerprints(manifest.fingerprint, ours))
    if differences:
        raise StoreMismatchError(
            f"{output.url}: expected the network and the decoding of that run, found others: {differences}; "
            "set model.weights to the file that the run used, and leave the other settings as they were"
        )


def _check_arguments(config: Any, client: Any) -> None:
    """Refuse a configuration that was not loaded, and what is no open client."""
    if not isinstance(config, Config):
        raise ConfigError(
            f"config: expected a configuration, found {type(config).__name__}; load it with fruitdask.load_config first"
        )
    if client is not None and getattr(client, "status", "") != "running":
        found = "one that is closed" if hasattr(client, "status") else type(client).__name__
        raise ConfigError(f"client: expected an open distributed.Client, found {found}; open one, or leave it out")


def _check_places(source: Location, output: Location) -> None:
    """Refuse an output inside the input, which would be listed as input next time, or one that cannot be a folder."""
    if output.is_archive:
        raise ConfigError(f"output.url {output.url}: expected a folder, found an archive; choose a folder")
    inner, outer = (os.path.realpath(place.path) if place.is_local else place.path for place in (output, source))
    # Containers of Azure belong to accounts, names of S3 buckets are unique.
    is_same = type(output.fs) is type(source.fs) and _find_account(output) == _find_account(source)
    if f"{inner}/".startswith(f"{outer}/") and is_same:
        raise ConfigError(f"output.url {output.url} lies inside input.url {source.url}; choose a folder outside it")
    if output.is_local:
        _check_writable(output)


def _find_account(place: Location) -> str | None:
    """Find the address of the account in Azure that a place belongs to."""
    return str(place.fs.service_client.url) if place.is_azure else None


def _check_reach(source: Location, output: Location, kind: str) -> None:
    """Refuse local folders if the machines are in a cloud."""
    protocol = {"ec2": "s3://", "azure": "abfs://"}[kind]
    for key, place in (("input.url", source), ("output.url", output)):
        if place.base.is_local:
            raise ConfigError(
                f"{key} {place.url} is on this machine, which the machines of cluster.kind: {kind} cannot read; put it "
                f"on {protocol}"
            )


def _check_writable(output: Location) -> None:
    """Refuse a local folder that cannot be created or written."""
    path = output.path
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise OutputError(f"output.url {output.url}: expected a folder, found the file {path}; choose another place")
    if not os.access(path, os.W_OK | os.X_OK):
        raise OutputError(
            f"output.url {output.url}: no permission to write in {path}; choose another place or change its permissions"
        )

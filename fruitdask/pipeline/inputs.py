"""What every command begins with: places that can be used, and the images that are there."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd

from fruitdask import store
from fruitdask.cluster.regions import check_regions, find_regions
from fruitdask.core.config import URL_KEYS, Config
from fruitdask.core.fingerprint import DECODING, describe_settings
from fruitdask.core.progress import RunProgress
from fruitdask.core.sample import draw_sample
from fruitdask.core.storage import Location, check_bucket, exists, hide_secrets, pin
from fruitdask.errors import ConfigError, OutputError
from fruitdask.store.catalog import hash_catalog, list_input
from fruitdask.worker.fetch import ImageSource
from fruitdask.worker.models import choose_batch_size


@dataclass(frozen=True)
class Inputs:
    """A configuration whose places were checked, and the images that it names."""

    config: Config
    #: Where the images are and how to read them.
    source: ImageSource
    output: Location
    catalog: pd.DataFrame
    #: The regions of the input, the output and the cluster, from `fruitdask.cluster.regions`.
    regions: dict[str, str]
    #: Files of the input that are not taken, by kind.
    left_out: Mapping[str, int] = field(default_factory=dict)
    #: What the user is told about how the images were listed.
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What determines the pixels: the images, and how they are decoded."""
        return {
            "catalog": hash_catalog(self.catalog),
            "decoding": describe_settings("featurize", self.config.featurize, DECODING),
        }


def prepare_inputs(config: Config, *, client: Any = None) -> Inputs:
    """Check the places of a configuration, draw the sample where it asks for one, and list the images."""
    source = Location(config.input.url, config.input.storage_options)
    output = open_output(config)
    _check_places(source, output)
    if config.cluster.kind == "ec2" and client is None:
        _check_reach(source, output)
    scheduler = client.scheduler.address if client is not None else None
    regions = check_regions(config, scheduler=scheduler) if config.privacy.allowed_regions is not None else None
    if config.input.sample is not None and not source.is_local:
        raise ConfigError(
            f"input.sample draws into a local folder, but input.url is {source.url}; draw with: fruitdask sample FOLDER"
        )
    if config.input.sample is not None and not exists(source):
        sample = config.input.sample
        draw_sample(source.path, per_class=sample.per_class, size_px=sample.size_px, seed=sample.seed)
    options = config.featurize.model_dump(include={"max_pixels", "decode", "fetch_attempts", "concurrent_reads"})
    options["batch_size"] = choose_batch_size(config)
    listing = list_input(config.input)
    if output.is_s3:
        check_bucket(output)
    if regions is None:
        # For the record alone, so whatever is wrong with the input was said before.
        regions = find_regions(config, scheduler=scheduler)
    # Reading an image is tried again here and counted; the client must not multiply that.
    images = ImageSource(replace(pin(source), attempts=1), **options)
    return Inputs(config, images, output, listing.files, regions, listing.left_out, listing.notes)


def resolve_erasure(inputs: Inputs, progress: RunProgress) -> None:
    """Finish an erasure that was interrupted, and warn where erased images may come back."""
    store.finish_erasing(inputs.output)
    manifest = store.read_run(inputs.output)
    if manifest is not None and manifest.erasures and inputs.config.output.overwrite:
        progress.say(
            "Warning: images were erased from the results that are overwritten; those that are still in the input come back, "
            "but for what input.exclude names."
        )


def open_output(config: Config) -> Location:
    """Name the output folder of a configuration."""
    return Location(config.output.url, config.output.storage_options, config.output.attempts)


def dump_config(config: Config) -> dict[str, Any]:
    """Write a configuration out without storage options, without what may be secret in URLs, and without the names of
    excluded images.
    """
    options = {"storage_options"}
    # What is handed to containers and shells may hold secrets, against all advice.
    cluster = {"env_vars", "docker_args", "extra_bootstrap", "worker_options", "scheduler_options"}
    exclude = {"input": options | {"exclude"}, "model": options, "output": options, "cluster": cluster}
    dumped: dict[str, Any] = json.loads(config.model_dump_json(exclude=exclude))
    for section, key in URL_KEYS:
        if dumped[section][key] is not None:
            dumped[section][key] = hide_secrets(dumped[section][key])
    return dumped


def _check_places(source: Location, output: Location) -> None:
    """Refuse an output that would be listed as input the next time, or that cannot be a folder."""
    if output.is_archive:
        raise ConfigError(f"output.url {output.url}: expected a folder, found a place in an archive; choose another one")
    inner, outer = (os.path.realpath(place.path) if place.is_local else place.path for place in (output, source))
    if f"{inner}/".startswith(f"{outer}/") and type(output.fs) is type(source.fs):
        raise ConfigError(f"output.url {output.url} lies inside input.url {source.url}; choose a folder outside it")
    if output.is_local:
        _check_writable(output)


def _check_reach(source: Location, output: Location) -> None:
    """Refuse folders of this machine for instances elsewhere."""
    for key, place in (("input.url", source), ("output.url", output)):
        if place.base.is_local:
            raise ConfigError(
                f"{key} {place.url} is on this machine, where instances of cluster.kind: ec2 cannot reach it; put it on s3://"
            )


def _check_writable(output: Location) -> None:
    """Refuse a local folder that cannot be made or written, before anything is."""
    path = output.path
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise OutputError(f"output.url {output.url}: expected a folder, found the file {path}; choose another place")
    if not os.access(path, os.W_OK | os.X_OK):
        raise OutputError(
            f"output.url {output.url}: no permission to write in {path}; choose another place or change its permissions"
        )

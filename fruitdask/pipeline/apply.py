"""Applies a finished run to other images: the same network, decoding and principal components."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fruitdask import store
from fruitdask.core.config import Config
from fruitdask.core.progress import RunProgress
from fruitdask.core.storage import exists, hide_secrets
from fruitdask.errors import ConfigError, OutputError
from fruitdask.pipeline.inputs import check_network, open_output, restore_config
from fruitdask.pipeline.open import open as open_result
from fruitdask.pipeline.results import RunResult
from fruitdask.pipeline.run import carry_out
from fruitdask.pipeline.state import Applied


def apply(
    results: "str | RunResult",
    *,
    input: "str | os.PathLike[str] | Mapping[str, Any]",
    output: "str | os.PathLike[str] | Mapping[str, Any]",
    storage_options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    retry_failed: bool = False,
    client: Any = None,
    progress: RunProgress | bool | None = None,
) -> RunResult:
    """
    Apply a finished run to other images, as a separate run that can be resumed and repeated.

    Parameters
    ----------
    results : str or RunResult
        The finished run, or the folder or URL of its results.
    input : str, PathLike or Mapping
        The other images: a folder or URL, or the section ``input`` of a configuration. They need no labels.
    output : str, PathLike or Mapping
        Where the results go: a folder or URL, or the section ``output`` of a configuration.
    storage_options : Mapping[str, Any], optional
        Options of the fsspec file system of ``results``.
    overrides : Sequence[str]
        Settings such as ``"cluster.kind=local"`` that override those of the finished run.
    retry_failed : bool
        Whether to compute images again that failed in an earlier run.
    client : distributed.Client, optional
        A cluster to use instead of the configured one; it is left open.
    progress : RunProgress or bool, optional
        How to show progress; by default, only on a terminal and in a notebook. False shows none.

    Returns
    -------
    RunResult
        The results of the other images, with the principal components of the finished run.

    Raises
    ------
    StoreMismatchError
        If the network or the decoding is not that of the finished run.
    FruitdaskError
        If something else is wrong; see the subclasses in `fruitdask.errors`.

    Notes
    -----
    The configuration is that of the finished run, except for ``input`` and ``output``. t-SNE, quality and the check,
    which describe all images of a run together, are off unless an override asks for them. Components are copied, and
    never fitted again, not even when images are added. What may hold secrets, such as storage options and the
    environment of workers, is not recorded: give it again by overrides.
    """
    result = results if isinstance(results, RunResult) else open_result(str(results), storage_options)
    config = configure(result, input=input, output=output, overrides=overrides)
    return carry_out(
        config, applied=describe_applied(result), retry_failed=retry_failed, client=client, progress=progress
    )


def configure(
    result: RunResult,
    *,
    input: "str | os.PathLike[str] | Mapping[str, Any]",
    output: "str | os.PathLike[str] | Mapping[str, Any]",
    overrides: Sequence[str] = (),
) -> Config:
    """Configure a run that applies a finished one."""
    manifest, given = store.RunManifest.model_validate(result.manifest), {"input": input, "output": output}
    recorded = manifest.config
    sections = {name: dict(value) if isinstance(value, Mapping) else {"url": value} for name, value in given.items()}
    sections["reduce"] = recorded["reduce"] | {"tsne": recorded["reduce"].get("tsne", {}) | {"enabled": False}}
    sections["quality"] = recorded["quality"] | {"enabled": False}
    # Its images need no labels.
    sections["check"] = {"enabled": False}
    sections["report"] = recorded["report"] | {"title": None}
    config = restore_config(manifest, overrides=overrides, sections=sections)
    target = open_output(config)
    if (type(target.fs), target.path) == (type(result.output.fs), result.output.path):
        raise ConfigError(f"output {target.url}: expected a folder for other results, found the run to apply")
    check_network(result.output, manifest, config)
    return config


def describe_applied(result: RunResult) -> Applied:
    """Describe a finished run whose components are applied."""
    manifest, location = store.RunManifest.model_validate(result.manifest), result.output.child(store.COMPONENTS)
    if manifest.pca is not None and not exists(location):
        raise OutputError(
            f"{location.url}: expected principal components, found none; {store.advise_repair(result.output)}"
        )
    record = store.AppliedRecord(
        output=hide_secrets(result.output.url),
        finished=str(manifest.finished),
        components=manifest.pca and manifest.pca.change(is_kept=True),
        sha256=store.hash_arrays(location) if manifest.pca is not None else None,
    )
    return Applied(record, result.output)

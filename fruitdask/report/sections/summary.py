"""The key figures of a run, in sentences."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from fruitdask.core.config import Config
from fruitdask.core.listing import format_left_out
from fruitdask.report.sections.quality import describe_agreement
from fruitdask.report.sections.texts import View, show_place
from fruitdask.report.tables import Counts
from fruitdask.store.exploration import Exploration


def count_images(
    manifest: Mapping[str, Any] | None, results: pd.DataFrame | None, exploration: Exploration | None
) -> Counts:
    """Count images by class, from the best available source."""
    if by_class := (manifest or {}).get("counts", {}).get("by_class"):
        ok, failed = (Counter({label: each[key] for label, each in by_class.items()}) for key in ("ok", "failed"))
        return Counts(ok_by_class=ok, failed_by_class=failed)
    counts = Counts()
    if results is not None:
        counts.add(results)
    elif exploration is not None:
        classes = exploration.classes
        for label, n_images, n_ok in classes[["n_images", "n_ok"]].itertuples():
            counts.ok_by_class[label] += n_ok
            counts.failed_by_class[label] += n_images - n_ok
    return counts


def describe_summary(
    config: Config,
    *,
    counts: Counts,
    manifest: Mapping[str, Any] | None,
    exploration: Exploration | None,
    quality: Mapping[str, Any] | None,
) -> View:
    """Describe what was run on what, where and when, with the key figures."""
    manifest = manifest or {}
    model, pca = manifest.get("model"), manifest.get("pca")
    is_whole = manifest.get("n_computed") == manifest.get("n_images")
    return {
        "input": show_place(config.input.url),
        "output": show_place(config.output.url),
        "n_images": counts.n_images,
        "n_classes": len(counts.by_class()),
        "n_failed": counts.n_failed,
        "n_vanished": manifest.get("counts", {}).get("vanished", 0),
        "left_out": _say_left_out(config, manifest, exploration),
        "finished": manifest.get("finished") or (exploration.summary.get("finished") if exploration else None),
        "version": manifest.get("fruitdask") or (exploration.summary.get("fruitdask") if exploration else None),
        "model": model,
        "cluster": manifest.get("cluster"),
        "seconds": manifest.get("seconds", {}).get("total") if is_whole else None,
        "quality": describe_agreement(quality) if quality else None,
        "explained": sum(pca["explained_variance_ratio"][:2]) if pca else None,
        "n_fitted": pca["fit"]["n_images"] if pca and pca.get("is_kept") else None,
        "duplicates": exploration.summary.get("duplicates") if exploration else None,
        "near_share": _share_near_duplicates(exploration),
        "metadata": exploration.summary.get("metadata") if exploration else None,
    }


def _say_left_out(config: Config, manifest: Mapping[str, Any], exploration: Exploration | None) -> str:
    """Describe the files of the input that are left out, because they are not images or for other reasons."""
    summary: Mapping[str, Any] = manifest or (exploration.summary if exploration else {})
    return format_left_out(summary.get("left_out", {}), is_default=config.input.extensions is None)


def _share_near_duplicates(exploration: Exploration | None) -> float:
    """Find the share of the images that look nearly the same as another one."""
    found = exploration.summary.get("near_duplicates") if exploration else None
    return found["n_images"] / exploration.summary["n_images"] if exploration and found else 0.0

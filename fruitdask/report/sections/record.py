"""The record of the run: seconds and cost, data protection, and how to reproduce it."""

from collections.abc import Mapping
from datetime import date
from typing import Any

import yaml

from fruitdask.cluster.regions import EU_REGIONS, LOCAL, UNKNOWN
from fruitdask.core.config import Config
from fruitdask.report.formats import format_count, format_time
from fruitdask.report.sections.texts import View, list_facts, map_texts, show_place
from fruitdask.store.exploration import Exploration

_STAGES = {
    "list": "List the images",
    "start": "Start the cluster and build the network",
    "featurize": "Turn images into features",
    "explore": "Compare images",
    "reduce": "PCA, t-SNE and quality",
    "write": "Write the results",
    "check": "Find photographs to check",
    "total": "Total, without drawing",
}
_WORKER_STAGES = {
    "load": "Load the network",
    "fetch": "Read the files",
    "decode": "Decode and resize",
    "explore": "Look at the images",
    "predict": "Run the network",
    "write": "Write features",
}
#: Stages whose time does not grow with the images.
_WITHOUT_RATE = ("start", "load")
_METADATA = {
    "exif": "camera data (EXIF)",
    "gps": "a GPS position",
    "serial": "a serial number of a camera or lens",
    "name": "a name of an owner or author",
}

_PLACES = {
    "input": "Photographs from",
    "manifest": "Their list from",
    "inventory": "Their inventory from",
    "weights": "Network from",
    "output": "Results to",
    "cluster": "Computers",
}
_STATED = {"controller": "who is responsible", "purpose": "the purpose", "keep_until": "how long the results are kept"}
_IN_TRANSIT = {
    "TLS": "encrypted (TLS)",
    "one machine": "data did not leave one machine",
    "none": "not encrypted",
}


def describe_performance(manifest: Mapping[str, Any], *, n_images: int) -> View | None:
    """Describe the seconds of the stages, and their images per second.

    After an interruption, the stages that compute features count only the images of the last attempt.
    """
    seconds, n_computed = manifest.get("seconds", {}), manifest.get("n_computed", n_images)
    of_all = dict.fromkeys(("list", "explore", "reduce", "write", "check"), n_images)
    stages, worker_stages = (
        [
            {
                "name": names.get(key, key),
                "seconds": value,
                "rate": None if key in _WITHOUT_RATE else images.get(key, n_computed) / max(value, 1e-3),
            }
            for key, value in sorted(found.items(), key=lambda item: [*names, item[0]].index(item[0]))
            if isinstance(value, int | float)
        ]
        for names, found, images in ((_STAGES, seconds, of_all), (_WORKER_STAGES, seconds.get("worker", {}), {}))
    )
    if not stages:
        return None
    return {"stages": stages, "worker_stages": worker_stages, "cost": list_facts(manifest.get("cost"))}


def describe_protection(
    config: Config, manifest: Mapping[str, Any] | None, exploration: Exploration | None
) -> View | None:
    """Describe where the data are, and the metadata in the files."""
    summary: Mapping[str, Any] = manifest or (exploration.summary if exploration else {})
    metadata = exploration.summary.get("metadata") if exploration else None
    if "regions" not in summary and metadata is None:
        return None
    n_images = exploration.summary["n_images"] if exploration and metadata else 0
    record = summary.get("processing", {})
    return {
        "input": show_place(config.input.url),
        "output": show_place(config.output.url),
        "record": _list_record(summary, record),
        "unstated": [meaning for key, meaning in _STATED.items() if key in record and not record[key]],
        "metadata": [(what, metadata.get(key, 0)) for key, what in _METADATA.items()] if metadata else [],
        "n_images": n_images,
    }


def _list_record(summary: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the record of processing in words."""
    days = record.get("retention_days")
    rows = {
        "What": record and f"{format_count(summary['n_images'])} {record['data']}",
        "Controller": record.get("controller"),
        "Purpose": record.get("purpose"),
        "When": format_time(summary["finished"]) if "finished" in summary else None,
        "With": f"fruitdask {summary['fruitdask']}" if "fruitdask" in summary else None,
        "Kept until": days and f"{_format_day(record['keep_until'])} ({days} day{'' if days == 1 else 's'})",
        **{_PLACES.get(place, place): _name_region(region) for place, region in summary.get("regions", {}).items()},
        "Results at rest": f"encrypted ({record['at_rest']})" if record.get("at_rest") else None,
        "Between computers": _IN_TRANSIT.get(record.get("in_transit", "")),
        "Metadata of the files": record.get("metadata"),
        "Erased since": "; ".join(
            f"{format_count(erased['n_images'])} images, {format_time(erased['at'])}"
            for erased in summary.get("erasures", [])
        ),
    }
    return [(name, str(text)) for name, text in rows.items() if text]


def _format_day(value: str) -> str:
    """Format a date given in ISO format."""
    day = date.fromisoformat(value)
    return f"{day.day} {day:%B %Y}"


def _name_region(region: str) -> str:
    """Return the location of a region, if known."""
    known = {LOCAL: "the computer on which fruitdask ran", UNKNOWN: "not known to fruitdask"}
    place = EU_REGIONS.get(region)
    return known.get(region) or (f"{region} ({place})" if place else region)


def describe_reproduction(config: Config, manifest: Mapping[str, Any] | None, exploration: Exploration | None) -> View:
    """Describe how to reproduce the run."""
    tree = (manifest or {}).get("config") or config.model_dump(mode="json", fallback=str)
    # Reproducing the run must not delete these results.
    dropped = ("storage_options", "overwrite", "exclude", "exclude_from")
    tree = {name: _drop(section, *dropped) for name, section in tree.items()}
    summary: Mapping[str, Any] = manifest or (exploration.summary if exploration else {})
    versions = {"fruitdask": summary["fruitdask"]} if "fruitdask" in summary else {}
    return {
        "command": f"fruitdask {'run' if manifest else 'explore'} config.yaml",
        "config": yaml.safe_dump(map_texts(show_place, tree), sort_keys=False, allow_unicode=True, width=88),
        "versions": versions | (manifest or {}).get("versions", {}),
        "fingerprint": list_facts(summary.get("fingerprint")),
        "model": list_facts((manifest or {}).get("model")),
    }


def _drop(section: Any, *keys: str) -> Any:
    """Drop keys of a section: storage options may hold secrets."""
    if not isinstance(section, Mapping):
        return section
    return {key: value for key, value in section.items() if key not in keys}

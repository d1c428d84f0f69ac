"""Fingerprints: the settings that determine what is stored, so that a run knows whether results are its own.

They are explicit: a new setting of the configuration is not part of a fingerprint until it is listed here. Fingerprints
then stay the same as long as it has the value in `ADDED_LATER`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

#: Settings of `model`, `featurize` and `explore` that determine features, pixels and findings.
MODEL = ("name", "weights", "input_px", "pooling", "layer", "preprocessing", "precision")
DECODING = ("decode", "max_pixels")
EXPLORATION = ("input_px", "scale", "near_duplicate_bits", "thumbnail_px", "max_thumbnails")
#: Settings that were listed after format 1, and the value that outputs without them have.
ADDED_LATER: Mapping[str, Any] = {}
#: The section of the configuration behind each part of a fingerprint.
_SECTIONS = {"model": "model", "decoding": "featurize", "exploration": "explore"}


def describe_settings(section: str, settings: BaseModel, names: Sequence[str]) -> dict[str, Any]:
    """Return the settings that a part of a fingerprint is made of."""
    values = settings.model_dump(mode="json", include=set(names))
    return {
        name: values[name]
        for name in names
        if f"{section}.{name}" not in ADDED_LATER or values[name] != ADDED_LATER[f"{section}.{name}"]
    }


def compare_fingerprints(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """Yield in words each setting in which two fingerprints differ; parts that only one of them has are not compared.

    >>> list(compare_fingerprints({"model": {"pooling": "avg"}}, {"model": {"pooling": "max"}, "decoding": {}}))
    ['model.pooling was avg, is max']
    """
    for part, section in _SECTIONS.items():
        if part not in theirs or part not in ours:
            continue
        for name in dict.fromkeys((*ours[part], *theirs[part])):
            key = f"{section}.{name}"
            was, now = (values[part].get(name, ADDED_LATER.get(key)) for values in (theirs, ours))
            if was != now:
                yield f"{key} was {_format(was)}, is {_format(now)}"


def _format(value: Any) -> str:
    """Write a value as a configuration file does; hashes are shortened."""
    text = "null" if value is None else str(value)
    return f"{text[:19]}..." if text.startswith("sha256:") else text

"""The base of all sections, and the type of a duration."""

import re
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_SECONDS_OF_UNIT = {"s": 1, "second": 1, "m": 60, "min": 60, "minute": 60}
_SECONDS_OF_UNIT |= {"h": 3600, "hour": 3600, "d": 86400, "day": 86400}
_DURATION = re.compile(r"([0-9.]+)\s*([a-z]*?)s?")


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    # Values may be secrets, and a traceback quotes the error.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _spell_booleans(cls, values: Any) -> Any:
        """Turn booleans in place of numbers into text, so that pydantic refuses them: it would read them as 1 and 0."""
        if not isinstance(values, dict):
            return values
        spelled = {}
        for name, field in cls.model_fields.items():
            parts = (field.annotation, *get_args(field.annotation))
            # The origin of an annotated type, such as that of positive numbers, is the type.
            kinds = {getattr(part, "__origin__", part) for part in parts}
            if isinstance(values.get(name), bool) and kinds & {int, float}:
                spelled[name] = str(values[name]).lower()
        return values | spelled


def _parse_duration(value: Any) -> Any:
    """Turn ``20 minutes`` into seconds; numbers are seconds already."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip().lower())
    unit = (match[2] or "s") if match else ""
    try:
        return float(match[1] if match else "") * _SECONDS_OF_UNIT[unit]
    except (KeyError, ValueError):
        raise ValueError(f"expected a duration such as 90, '20 minutes' or '2 hours', found {value!r}") from None


#: A duration: seconds, or a text such as ``20 minutes``; always seconds in the loaded configuration.
Seconds = Annotated[float, BeforeValidator(_parse_duration, json_schema_input_type=float | str), Field(gt=0)]

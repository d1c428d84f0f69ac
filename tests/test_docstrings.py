"""Docstrings: numpydoc for what users call, a sentence for everything else, and a description of each setting."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

from numpydoc.validate import validate
from pydantic import BaseModel

import fruitdask
from fruitdask import errors
from fruitdask.core import config
from fruitdask.core.config.base import Section

#: Left out on purpose: extended summaries, examples and "see also" everywhere.
IGNORED = {"ES01", "EX01", "SA01", "GL08", "YD01"}


def list_names(value: Any, name: str) -> Iterator[str]:
    """List a function, or a class and its own public methods; fields of pydantic's classes are described elsewhere."""
    if inspect.isclass(value) and issubclass(value, BaseModel):
        return
    yield name
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if inspect.isfunction(member) and not key.startswith("_"):
                yield f"{name}.{key}"


def test_docstrings_of_the_public_api_follow_numpydoc() -> None:
    values = [getattr(fruitdask, name) for name in fruitdask.__all__]
    values += [value for value in vars(errors).values() if inspect.isclass(value)]
    names = {name for value in values for name in list_names(value, f"{value.__module__}.{value.__qualname__}")}
    assert len(names) > 40
    wrong = {name: [error for error in validate(name)["errors"] if error[0] not in IGNORED] for name in names}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_everything_has_a_docstring() -> None:
    bare = []
    for module_info in pkgutil.walk_packages(fruitdask.__path__, "fruitdask."):
        if module_info.name.endswith("__main__"):
            continue
        module = importlib.import_module(module_info.name)
        bare += [] if module.__doc__ else [module.__name__]
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ and (
                inspect.isfunction(value) or inspect.isclass(value)
            ):
                bare += [] if value.__doc__ else [f"{module.__name__}.{name}"]
    assert bare == []


def test_each_setting_is_described() -> None:
    sections = [value for value in vars(config).values() if inspect.isclass(value) and issubclass(value, Section)]
    bare = [section.__name__ for section in sections if not section.__doc__]
    for section in sections:
        for name, field in section.model_fields.items():
            nested = any(inspect.isclass(part) and issubclass(part, Section) for part in _list_parts(field.annotation))
            if not field.description and name != "kind" and not nested:
                bare.append(f"{section.__name__}.{name}")
    assert len(sections) > 10 and bare == []


def _list_parts(annotation: Any) -> tuple[Any, ...]:
    """List the members of a union, or the type itself."""
    return getattr(annotation, "__args__", (annotation,))

"""Public docstrings follow numpydoc, down to every parameter."""

import importlib
import inspect
import pkgutil

import pytest
from numpydoc.validate import validate
from pydantic import BaseModel

import fruitdask
from fruitdask import config
from fruitdask.config.base import Section

#: Left out on purpose: extended summaries, examples and "see also" everywhere.
IGNORED = {"ES01", "EX01", "SA01", "GL08", "YD01"}


def _list_public_names() -> list[str]:
    names = []
    for module_info in pkgutil.walk_packages(fruitdask.__path__, "fruitdask."):
        if module_info.name.endswith("__main__"):
            continue
        module = importlib.import_module(module_info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value) or inspect.isclass(value) and not issubclass(value, BaseModel):
                names.append(f"{module.__name__}.{name}")
            if inspect.isclass(value) and not issubclass(value, BaseModel):
                methods = [
                    key for key, member in vars(value).items() if inspect.isfunction(member) and not key.startswith("_")
                ]
                names += [f"{module.__name__}.{name}.{method}" for method in methods]
    return sorted(names)


@pytest.mark.parametrize("name", _list_public_names())
def test_docstring_follows_numpydoc(name: str) -> None:
    errors = [(code, text) for code, text in validate(name)["errors"] if code not in IGNORED]
    assert errors == []


SECTIONS = [value for value in vars(config).values() if inspect.isclass(value) and issubclass(value, Section)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_config_section_describes_each_key(section: type[BaseModel]) -> None:
    union = type(config.LocalClusterConfig | config.AddressClusterConfig)
    undescribed = [
        name
        for name, field in section.model_fields.items()
        if not field.description
        and name != "kind"
        and not isinstance(field.annotation, union)
        and not (inspect.isclass(field.annotation) and issubclass(field.annotation, Section))
    ]
    assert section.__doc__ and undescribed == []

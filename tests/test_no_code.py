"""Nothing in the package runs code that comes with data: these tests search its source for ways to do so."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fruitdask

FOLDER = Path(fruitdask.__file__).parent
#: Functions that run their argument, or load an object that could run code.
FORBIDDEN = {"eval", "exec", "compile", "__import__", "load_source", "system", "popen", "getoutput", "literal_code"}
#: Modules with such functions; `ALLOWED` has the files that need one of them.
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "subprocess",
    "pty",
    "runpy",
    "code",
}
ALLOWED = {
    # An unpickler that admits only NumPy arrays; tests/test_models.py feeds it others.
    ("worker/models/squeezenet.py", "pickle"),
    ("worker/models/squeezenet.py", "pickle.Unpickler"),
    # The table of public names; and cluster.class, which SECURITY.md describes.
    ("__init__.py", "import_module of a computed name"),
    ("cluster/custom.py", "import_module of a computed name"),
}
#: Keyword arguments that permit code to run.
DOORS = {
    "allow_pickle": True,
    "shell": True,
    "weights_only": False,
    "safe_mode": False,
    "enable_unsafe_deserialization": True,
}
#: Methods that unpickle, or load YAML with tags that run code, by the module they belong to.
LOADERS = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("pd", "read_pickle")}
#: Loaders of YAML that return more than plain values.
UNSAFE_YAML = {"Loader", "UnsafeLoader", "FullLoader", "CLoader"}


def list_findings(source: str) -> Iterator[str]:
    """List what a source does that could run code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES | {"torch"}:
            yield f"from {node.module}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            is_yaml = node.value.id == "yaml" and node.attr in UNSAFE_YAML
            if (node.value.id, node.attr) in LOADERS or node.value.id in MODULES or is_yaml:
                yield name
            elif node.attr in FORBIDDEN and node.value.id in ("os", "builtins", "imp", "commands"):
                yield name
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN:
                yield node.func.id
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if called == "import_module" and not isinstance(node.args[0], ast.Constant):
                yield "import_module of a computed name"
            for keyword in node.keywords:
                if (
                    keyword.arg in DOORS
                    and isinstance(keyword.value, ast.Constant)
                    and keyword.value.value is DOORS[keyword.arg]
                ):
                    yield f"{keyword.arg}={keyword.value.value}"


@pytest.mark.slow
def test_package_runs_no_code_of_others() -> None:
    found = {
        (path.relative_to(FOLDER).as_posix(), finding)
        for path in FOLDER.rglob("*.py")
        for finding in list_findings(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load('x')",
        "np.load('x', allow_pickle=True)",
        "pd.read_pickle('x')",
        "eval('1')",
        "exec('1')",
        "yaml.load(text, Loader=yaml.Loader)",
        "class L(yaml.UnsafeLoader): pass",
        "import subprocess",
        "run(command, shell=True)",
        "os.system('x')",
        "keras.saving.load_model(path, safe_mode=False)",
        "__import__('os')",
        "importlib.import_module(name)",
        "import_module(f'fruitdask.{name}')",
    ],
)
def test_code_that_could_run_data_is_found(source: str) -> None:
    assert list(list_findings(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "np.load('x')",
        "yaml.SafeLoader(text)",
        "re.compile('x')",
        "run(command, shell=False)",
        "import_module('json')",
    ],
)
def test_harmless_code_is_not_reported(source: str) -> None:
    assert list(list_findings(source)) == []

"""Keras as it is shipped, whatever its user has set: features must not depend on a file in a home folder."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fruitdask.errors import EngineError
from fruitdask.worker.models.tensorflow import import_tensorflow

_BACKEND = "tensorflow"
#: What Keras and TensorFlow read from the environment when they are imported. KERAS_HOME is left alone: downloaded weights are there.
_ENVIRONMENT = {"KERAS_BACKEND": _BACKEND, "KERAS_NNX_ENABLED": "false", "TF_USE_LEGACY_KERAS": None}


@contextmanager
def keras_environment() -> Iterator[None]:
    """Give Keras, while it is imported here or in a child that starts, the environment that fruitdask builds networks in.
    """
    saved = {name: os.environ.get(name) for name in _ENVIRONMENT}
    _set_environment(_ENVIRONMENT)
    try:
        yield
    finally:
        _set_environment(saved)


def find_backend() -> str:
    """Say on which backend Keras runs in this process, or would if it were imported."""
    if "keras" in sys.modules:
        import keras

        return str(keras.config.backend())
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    try:
        home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
        return str(json.loads((home / "keras.json").read_text())["backend"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return _BACKEND


def import_keras() -> None:
    """Import TensorFlow, and Keras on top of it."""
    try:
        with keras_environment():
            import_tensorflow(with_keras=True)
            import keras
    except Exception as error:
        # Keras checks the user's keras.json while it is imported.
        raise EngineError(f"Keras cannot be imported: {str(error).strip() or type(error).__name__}") from error
    if keras.config.backend() != _BACKEND:
        raise EngineError(
            f"networks are built by Keras on TensorFlow, but Keras runs on {keras.config.backend()} in this process; "
            'in a script, import Keras under if __name__ == "__main__":'
        )


@contextmanager
def shipped_settings(precision: str) -> Iterator[None]:
    """Let Keras compute as it does out of the box; its settings belong to the whole process, so the user's come back
    afterwards.
    """
    from keras import config

    saved = config.floatx(), config.epsilon(), config.image_data_format(), config.dtype_policy()
    _apply_settings("float32", 1e-7, "channels_last", precision)
    try:
        yield
    finally:
        _apply_settings(*saved)


def _apply_settings(floatx: str, epsilon: float, image_data_format: str, policy: object) -> None:
    """Set all of Keras that changes what a network computes."""
    from keras import config

    config.set_floatx(floatx)
    config.set_epsilon(epsilon)
    config.set_image_data_format(image_data_format)
    config.set_dtype_policy(policy)


def _set_environment(variables: dict[str, str | None]) -> None:
    """Set environment variables; None removes one."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

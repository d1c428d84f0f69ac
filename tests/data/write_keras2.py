"""Write the models of tests/data/keras2 with Keras 2, and the features that it computes of the images in the tests.

    python tests/data/write_keras2.py FOLDER

Needs tf_keras besides what the tests need. `transfer` is made as in TensorFlow's guides: augmentation, a frozen network
and a new head; `teachable` is nested as models of Teachable Machine are; `policy` has mixed precision and a network
that is called twice; `operators` computes with tensors outside of layers.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras as keras

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8).astype(np.float32)
layers = keras.layers


def build_base(name: str) -> Any:
    """Build a small network of the kinds of layers that networks for images have."""
    image = keras.Input((32, 32, 3))
    x = layers.Conv2D(6, 3, strides=2, use_bias=False)(layers.Normalization()(image))
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    y = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x))
    x = layers.SeparableConv2D(8, 3)(layers.Add()([x, y]))
    x = layers.experimental.SyncBatchNormalization()(x)
    return keras.Model(image, x, name=name)


def build_transfer() -> tuple[Any, Any]:
    """Build a classifier on a frozen network, and its features."""
    augment = keras.Sequential([layers.RandomFlip("horizontal", input_shape=(32, 32, 3)), layers.RandomRotation(0.1)])
    base = build_base("base")
    for layer in base.layers[:4]:
        layer.trainable = False
    image = keras.Input((32, 32, 3))
    x = base(layers.Rescaling(1 / 127.5, offset=-1)(augment(image)), training=False)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(1)(layers.Dropout(0.2)(x))), keras.Model(image, x)


def build_teachable() -> tuple[Any, Any]:
    """Build a Sequential of Sequentials, and its features."""
    base = build_base("base")
    base.trainable = False
    front = keras.Sequential([base, layers.GlobalAveragePooling2D()])
    hidden = layers.Dense(40, activation="relu")
    model = keras.Sequential([front, keras.Sequential([hidden, layers.Dense(3, activation="softmax", use_bias=False)])])
    model.build((None, 32, 32, 3))
    image = keras.Input((32, 32, 3))
    return model, keras.Model(image, hidden(front(image)))


def build_policy() -> tuple[Any, Any]:
    """Build a network of mixed precision that contains one twice, and its features."""
    keras.mixed_precision.set_global_policy("mixed_float16")
    base, image = build_base("base"), keras.Input((32, 32, 3))
    calls = [base(layers.Rescaling(scale)(image)) for scale in (1 / 255, 1 / 100)]
    x = layers.Concatenate()([layers.GlobalMaxPooling2D()(each) for each in calls])
    keras.mixed_precision.set_global_policy("float32")
    return keras.Model(image, layers.Dense(5, activation="softmax", dtype="float32")(x)), keras.Model(image, x)


def build_operators() -> tuple[Any, Any]:
    """Build a network with an operation that is no layer, and its features."""
    image = keras.Input((32, 32, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(image / 255.0))
    return keras.Model(image, layers.Dense(5, activation="softmax")(x)), keras.Model(image, x)


def draw_weights(model: Any) -> None:
    """Draw weights whose order matters, as those of a trained network."""
    rng, drawn = np.random.default_rng(3), []
    for weight in model.weights:
        noise = rng.normal(0, 0.3, weight.shape)
        value = np.abs(noise) + 0.5 if "variance" in weight.name else weight.numpy() + noise
        drawn.append(np.asarray(value, weight.dtype.as_numpy_dtype))
    # Unlike assigning them one by one, this makes Normalization use them.
    model.set_weights(drawn)


def main(target: str) -> None:
    """Write the models as .h5, one as .keras, and all features."""
    features = {}
    for build in (build_transfer, build_teachable, build_policy, build_operators):
        name = build.__name__.removeprefix("build_")
        model, reference = build()
        draw_weights(model)
        model.save(Path(target) / f"{name}.h5", include_optimizer=False)
        features[name] = reference.predict(PIXELS, verbose=0).astype(np.float32)
    build_transfer()[0].save(Path(target) / "transfer.keras")
    np.savez(Path(target) / "features.npz", **features)


if __name__ == "__main__":
    main(sys.argv[1])

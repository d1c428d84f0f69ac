"""The layer that computes the features: found in networks as people build them, and compared with plain Keras."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fruitdask.core.config import ModelConfig
from fruitdask.errors import ModelError
from fruitdask.worker.models import build_artifact, load_predictor

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


def build_base(name: str = "base") -> Any:
    """Build a small network that ends in a map of 40 channels."""
    from keras import Input, Model, layers

    inputs = Input((32, 32, 3))
    x = layers.Conv2D(6, 3, strides=4, activation="relu", name=f"{name}_first")(inputs)
    return Model(inputs, layers.Conv2D(40, 3, strides=2, activation="relu", name=f"{name}_last")(x), name=name)


def augment(x: Any) -> Any:
    """Put layers before a network that have an effect only in training."""
    from keras import Sequential, layers

    return Sequential([layers.RandomFlip(), layers.RandomRotation(0.1)], name="augment")(x)


def softmax_in_dense(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    x = features = layers.GlobalAveragePooling2D(name="pool")(build_base()(x))
    return layers.Dense(5, activation="softmax")(layers.Dropout(0.2)(x)), features, "pool"


def softmax_apart(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    features = layers.GlobalAveragePooling2D(name="pool")(build_base()(augment(x), training=False))
    x = layers.Dense(90, name="logits")(layers.Dropout(0.2)(features))
    return layers.Activation("softmax", dtype="float32")(x), features, "pool"


def softmax_after_all_kinds_of_layers(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    features = layers.Dense(50, activation="relu", name="hidden")(layers.Flatten()(build_base()(x)))
    x = layers.SpectralNormalization(layers.Dense(90))(layers.GaussianNoise(0.1)(layers.Dropout(0.2)(features)))
    x = layers.Reshape((9, 10))(layers.Rescaling(0.5)(layers.BatchNormalization()(x)))
    return layers.Softmax()(layers.Dropout(0.1)(x)), features, "hidden"


def softmax_as_an_operation(x: Any) -> tuple[Any, Any, str]:
    import keras

    features = keras.ops.mean(build_base()(x), axis=(1, 2))
    return keras.ops.softmax(keras.layers.Dense(90)(features) / 2.0), features, features._keras_history.operation.name


def few_logits(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    features = layers.GlobalMaxPooling2D(name="pool")(build_base()(x))
    return layers.Dense(5)(features), features, "pool"


def one_sigmoid(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    features = layers.Flatten(name="flat")(build_base()(x))
    return layers.Dense(1, activation="sigmoid")(features), features, "flat"


def many_sigmoids(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    features = layers.Flatten(name="flat")(build_base()(x))
    return layers.Activation("sigmoid")(layers.Dense(80)(features)), features, "flat"


def convolution_as_classifier(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    x = base = build_base()(x)
    x = layers.Conv2D(90, 1, activation="relu")(layers.Dropout(0.5)(x))
    x = layers.Activation("softmax")(layers.GlobalAveragePooling2D()(x))
    return x, layers.GlobalAveragePooling2D()(base), "base"


def convolution_after_pooling(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    x = layers.GlobalAveragePooling2D(keepdims=True)(build_base()(x))
    x = last = layers.Activation("hard_silu", name="last")(layers.Conv2D(48, 1)(x))
    x = layers.Flatten()(layers.Conv2D(90, 1)(layers.Dropout(0.2)(x)))
    return layers.Activation("softmax")(x), layers.Flatten()(last), "last"


def preprocessing_before_a_whole_network(x: Any) -> tuple[Any, Any, str]:
    from keras import Input, Model, layers

    inputs = Input((32, 32, 3))
    features = layers.GlobalAveragePooling2D(name="pool")(build_base()(inputs))
    scores = layers.Dense(5, activation="softmax")(layers.Dropout(0.2)(features))
    whole = Model(inputs, scores, name="whole")
    scaled = layers.Rescaling(1 / 127.5, -1)(augment(x))
    return whole(scaled), Model(inputs, features)(scaled), "whole/pool"


def networks_in_networks(x: Any) -> tuple[Any, Any, str]:
    from keras import Input, Model, Sequential, layers

    inputs = Input((32, 32, 3))
    features = layers.Dense(50, activation="relu", name="hidden")(layers.Flatten()(build_base()(inputs)))
    inner = Model(inputs, layers.Dense(7)(features), name="inner")
    middle = Sequential([layers.Rescaling(1 / 255), inner], name="middle")
    outer = Sequential([layers.RandomFlip(), middle, layers.Softmax()], name="outer")
    scaled = layers.Rescaling(1 / 255)(x)
    return outer(x), Model(inputs, features)(scaled), "outer/middle/inner/hidden"


def network_as_teachable_machine_builds_it(x: Any) -> tuple[Any, Any, str]:
    from keras import Sequential, layers

    body = Sequential([build_base(), layers.GlobalAveragePooling2D()], name="body")
    hidden = layers.Dense(100, activation="relu", name="hidden")
    head = Sequential([hidden, layers.Dense(3, activation="softmax", use_bias=False)], name="head")
    return head(body(x)), hidden(body(x)), "head/hidden"


def head_of_its_own(x: Any) -> tuple[Any, Any, str]:
    from keras import Sequential, layers

    features = layers.GlobalAveragePooling2D(name="pool")(build_base()(x))
    head = Sequential([layers.Dropout(0.5), layers.Dense(5), layers.Softmax()], name="head")
    return head(layers.Dropout(0.5)(features)), features, "pool"


def layers_used_twice(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    relu, dense = layers.ReLU(name="relu"), layers.Dense(40, name="dense")
    features = relu(dense(relu(dense(layers.GlobalAveragePooling2D()(build_base()(x))))))
    return layers.Dense(5, activation="softmax")(features), features, "relu"


def branches_before_the_classifier(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    x = build_base()(x)
    pools = [layers.GlobalAveragePooling2D()(x), layers.GlobalMaxPooling2D()(x)]
    features = layers.Concatenate(name="both")(pools)
    skipped = layers.Add(name="sum")([features, layers.Dense(80, name="late")(layers.Dense(9)(features))])
    return layers.Dense(5, activation="softmax")(skipped), skipped, "sum"


def embedding_that_ends_in_a_normalization(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    x = layers.Dense(8)(layers.GlobalAveragePooling2D()(build_base()(x)))
    features = layers.UnitNormalization(name="unit")(x)
    return features, features, "unit"


def hidden_layer_at_the_end(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    features = layers.ReLU(name="relu")(layers.Dense(64)(layers.Flatten()(build_base()(x))))
    return layers.Dropout(0.1)(features), features, "relu"


def pools_at_the_end(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    x = build_base()(x)
    features = layers.Concatenate(name="both")([layers.GlobalAveragePooling2D()(x), layers.Flatten()(x)])
    return features, features, "both"


def map_at_the_end(x: Any) -> tuple[Any, Any, str]:
    from keras import layers

    x = build_base()(x)
    gate = layers.Conv2D(40, 1, activation="sigmoid")(x)
    last = layers.Multiply(name="gated")([x, gate])
    return last, layers.GlobalAveragePooling2D()(last), "gated"


CLEAR = [
    softmax_in_dense,
    softmax_apart,
    softmax_after_all_kinds_of_layers,
    softmax_as_an_operation,
    few_logits,
    one_sigmoid,
    many_sigmoids,
    convolution_as_classifier,
    convolution_after_pooling,
    preprocessing_before_a_whole_network,
    networks_in_networks,
    network_as_teachable_machine_builds_it,
    head_of_its_own,
    layers_used_twice,
    branches_before_the_classifier,
    embedding_that_ends_in_a_normalization,
    hidden_layer_at_the_end,
    pools_at_the_end,
    map_at_the_end,
]


def save_network(build: Callable[[Any], Any], path: Path) -> tuple[ModelConfig, Any]:
    """Save the network that a function builds on an input; returns the input, then the results of the function."""
    import keras

    keras.utils.set_random_seed(3)
    image = keras.Input((32, 32, 3), name="image")
    output, *rest = build(image)
    keras.Model(image, output, name="whole_network").save(path)
    return ModelConfig(weights=str(path), preprocessing="none", engine="tensorflow"), (image, *rest)


def check_features(config: ModelConfig, reference: Any, layer: str) -> None:
    """Compare features with those of plain Keras."""
    artifact = build_artifact(config)
    expected = reference.predict(PIXELS.astype(np.float32), verbose=0)
    assert artifact.layer == layer
    assert float(np.ptp(expected, axis=0).max()) > 1e-3
    features = load_predictor(artifact, n_threads=1)(PIXELS)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("build", CLEAR, ids=lambda build: build.__name__)
def test_features_flow_into_the_classifier(build: Callable[[Any], Any], tmp_path: Path) -> None:
    import keras

    config, (image, features, layer) = save_network(build, tmp_path / "own.keras")
    reference = keras.Model(image, features)
    check_features(config, reference, layer)
    # The name in the manifest, given as model.layer, is the same place.
    check_features(config.model_copy(update={"layer": layer}), reference, layer)


def test_sequential_without_an_input_layer(tmp_path: Path) -> None:
    import keras

    base, pool = build_base(), keras.layers.GlobalAveragePooling2D(name="pool")
    network = keras.Sequential([base, pool, keras.layers.Dense(5, activation="softmax")])
    network(PIXELS.astype(np.float32))
    network.save(tmp_path / "own.keras")
    config = ModelConfig(weights=str(tmp_path / "own.keras"), preprocessing="none", engine="tensorflow")
    check_features(config, keras.Sequential([base, pool]), "pool")


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_cross_entropy_makes_many_logits_a_classifier(tmp_path: Path, ending: str) -> None:
    import keras

    image = keras.Input((32, 32, 3))
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(build_base()(image))
    network = keras.Model(image, keras.layers.Dense(131)(pooled))
    network.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.save(tmp_path / f"own.{ending}")
    config = ModelConfig(weights=str(tmp_path / f"own.{ending}"), preprocessing="none", engine="tensorflow")
    check_features(config, keras.Model(image, pooled), "pool")


def two_heads(x: Any) -> Any:
    from keras import layers

    x = layers.GlobalAveragePooling2D(name="pool")(build_base()(x))
    kinds = layers.Dense(5, activation="softmax", name="kind")(layers.Dropout(0.2)(x))
    return ([kinds, layers.Dense(2, activation="softmax", name="ripe")(x)],)


def auxiliary_head(x: Any) -> Any:
    from keras import layers

    x = early = layers.Conv2D(6, 3, name="early")(x)
    early = layers.Dense(5, activation="softmax", name="helper")(layers.Flatten(name="flat")(early))
    x = layers.GlobalAveragePooling2D(name="pool")(layers.Conv2D(9, 3)(x))
    return ([layers.Dense(5, activation="softmax", name="main")(x), early],)


def many_outputs(x: Any) -> Any:
    from keras import layers

    return (layers.Dense(128, name="last")(layers.GlobalAveragePooling2D(name="pool")(build_base()(x))),)


def average_of_two_networks(x: Any) -> Any:
    from keras import layers

    scores = []
    for name in ("first", "second"):
        pooled = layers.GlobalAveragePooling2D(name=f"pool_{name}")(build_base(name)(x))
        scores.append(layers.Dense(5, activation="softmax")(pooled))
    return (layers.Average(name="mean")(scores),)


def score_for_each_pixel(x: Any) -> Any:
    from keras import layers

    return (layers.Conv2D(5, 1, activation="softmax", name="segments")(build_base()(x)),)


def many_convolution_outputs(x: Any) -> Any:
    from keras import layers

    return (layers.GlobalAveragePooling2D()(layers.Conv2D(128, 1, name="last")(build_base()(x))),)


def stacked_scores(x: Any) -> Any:
    from keras import layers, ops

    x = layers.GlobalAveragePooling2D(name="pool")(build_base()(x))
    scores = [layers.Dense(50, activation="softmax")(x) for _ in range(2)]
    return (ops.mean(ops.stack(scores), axis=0),)


def chosen_classes(x: Any) -> Any:
    from keras import layers

    x = layers.GlobalAveragePooling2D(name="pool")(build_base()(x))
    return (layers.Dense(50, activation="softmax", name="scores")(x)[:, :40],)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (stacked_scores, r"is computed from the softmax of .*; set model\.layer .*, such as pool or mean"),
        (chosen_classes, r"is computed from the softmax of scores; set model\.layer .*, such as pool or get_item"),
        (two_heads, r"2 outputs, kind and ripe; set model\.layer to .*, such as pool$"),
        (auxiliary_head, r"2 outputs, main and helper; set model\.layer to .*, such as pool or flat$"),
        (
            many_outputs,
            r"last has 128 outputs without softmax or sigmoid: a classifier or an embedding; .*, such as pool or last$",
        ),
        (average_of_two_networks, r"mean merges 2 branches; set model\.layer .*, such as pool_first or pool_second$"),
        (score_for_each_pixel, r"segments outputs a map of scores.*; set model\.layer .*, such as base$"),
        (many_convolution_outputs, r"last has 128 outputs .*, such as base or last$"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_ambiguous_layer_must_be_configured(build: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    config, _ = save_network(build, tmp_path / "own.keras")
    with pytest.raises(ModelError, match=rf"^whole_network.*{message}"):
        build_artifact(config)


@pytest.mark.slow
def test_layer_may_be_named_within_nested_networks(tmp_path: Path) -> None:
    import keras

    bases = [build_base("first"), build_base("second")]
    for base in bases:
        base.get_layer(f"{base.name}_last").name = "last"

    def build(x: Any) -> tuple[Any, Any]:
        both = [keras.layers.GlobalAveragePooling2D()(base(keras.layers.Rescaling(1 / 255)(x))) for base in bases]
        return keras.layers.Dense(5, name="scores")(keras.layers.Concatenate(name="both")(both)), both[1]

    config, (image, second) = save_network(build, tmp_path / "own.keras")
    reference = keras.Model(image, second)
    for layer in ("second/last", "second"):
        check_features(config.model_copy(update={"layer": layer}), reference, layer)
    early = build_artifact(config.model_copy(update={"layer": "first_first"}))
    assert (early.layer, early.n_features) == ("first/first_first", 6)
    with pytest.raises(ModelError, match=r"has 2 layers 'last'; write first/last or second/last$"):
        build_artifact(config.model_copy(update={"layer": "last"}))
    with pytest.raises(ModelError, match="no layer 'lost' in whole_network; .* are .*, both, scores$"):
        build_artifact(config.model_copy(update={"layer": "lost"}))


def test_layers_may_have_names_that_tensorflow_refuses(tmp_path: Path) -> None:
    import keras

    def build(x: Any) -> tuple[Any, Any]:
        base = build_base("base")
        base.name, base.get_layer("base_last").name = "Größe 2", "last (1)"
        features = keras.layers.GlobalAveragePooling2D(name="my pool")(base(x))
        return keras.layers.Dense(5, activation="softmax", name="(scores)")(features), features

    config, (image, features) = save_network(build, tmp_path / "own.keras")
    # Without a graph, TensorFlow takes any name.
    expected = np.asarray(keras.Model(image, features)(PIXELS.astype(np.float32)))
    for settings, layer in ({}, "my pool"), ({"layer": "last (1)"}, "Größe 2/last (1)"):
        artifact = build_artifact(config.model_copy(update=settings))
        assert (artifact.layer, artifact.name) == (layer, "whole_network")
        np.testing.assert_allclose(load_predictor(artifact, n_threads=1)(PIXELS), expected, rtol=1e-4)


def test_layer_that_is_used_side_by_side_cannot_be_named(tmp_path: Path) -> None:
    import keras

    def build(x: Any) -> tuple[Any]:
        base = build_base()
        both = [base(x), base(keras.ops.flip(x, axis=2))]
        pooled = keras.layers.GlobalAveragePooling2D(name="pool")(keras.layers.Add(name="sum")(both))
        return (keras.layers.Dense(5, activation="softmax")(pooled),)

    config, _ = save_network(build, tmp_path / "own.keras")
    assert build_artifact(config).layer == "pool"
    with pytest.raises(ModelError, match="layer 'base' 2 times in parallel; name a layer that comes"):
        build_artifact(config.model_copy(update={"layer": "base"}))


@pytest.mark.slow
def test_network_by_name_states_its_last_layer() -> None:
    artifact = build_artifact(ModelConfig(name="SqueezeNet", input_px=64, engine="tensorflow"))
    assert artifact.layer == "fire9_concat"
    early = ModelConfig(name="SqueezeNet", input_px=64, engine="tensorflow", layer="fire2_concat")
    assert (build_artifact(early).layer, build_artifact(early).n_features) == ("fire2_concat", 128)

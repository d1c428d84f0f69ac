"""Files of networks and weights, identified by content, since extensions are often wrong."""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fruitdask.core.config import ModelConfig
from fruitdask.core.storage import Location, explained
from fruitdask.errors import ModelError
from fruitdask.worker.models.keras2 import modernize

#: Bytes per request to a remote file, of which only the few kilobytes that describe the network are read.
_BLOCK_BYTES = 1 << 16
_HEAD_BYTES = 256
_ENDINGS = (".keras", ".h5", ".hdf5")
_RESAVE = "load it with the software that made it, and save it with model.save('model.keras')"
_NOT_KERAS = "fruitdask runs Keras networks; select the same network with model.name, or use a Keras version of it"
#: First bytes of other files, what they are, and what to do.
_MAGIC = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", "run git lfs pull"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x80", "a Python pickle, perhaps of PyTorch", _NOT_KERAS),
    (b"{", "a JSON file, which holds no weights", _RESAVE),
    (b"<", "a web page or XML", "download the file itself"),
)
#: The same by extension.
_BY_ENDING = {
    ".onnx": ("an ONNX network", _NOT_KERAS),
    ".tflite": ("a TensorFlow Lite network", f"{_NOT_KERAS}, such as the .keras or .h5 file it was converted from"),
    ".pb": ("a TensorFlow graph, perhaps of a SavedModel", f"if Keras wrote it, {_RESAVE}"),
    **dict.fromkeys((".pt", ".pth"), ("a PyTorch file", _NOT_KERAS)),
    ".safetensors": ("weights as safetensors", _NOT_KERAS),
    **dict.fromkeys((".ckpt", ".index"), ("a TensorFlow checkpoint", f"if Keras wrote it, {_RESAVE}")),
}
_DAMAGED = "copy or download it again"
#: Layers that carry code or load it from elsewhere, the same as in Keras's safe mode.
_CODE_LAYERS = ("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")


@dataclass(frozen=True)
class ModelFile:
    """The content of a file."""

    #: ``keras`` or ``h5`` for a whole network, ``weights`` or ``legacy weights`` for a file of weights only.
    kind: str
    #: Keras's description of the network's layers; empty for a file of weights only.
    description: Mapping[str, Any] = field(default_factory=dict)
    #: Keras's description of the training, if the file has one.
    training: Any = None
    #: The version of Keras that wrote the network.
    version: str = ""

    @property
    def ending(self) -> str:
        """The extension by which Keras chooses the right reader."""
        return {"keras": ".keras", "weights": ".weights.h5"}.get(self.kind, ".h5")

    @property
    def is_classifier(self) -> bool:
        """Whether the network was trained with a cross-entropy."""
        loss = self.training.get("loss") if isinstance(self.training, Mapping) else None
        return "crossentropy" in json.dumps(loss).lower().replace("_", "")

    def is_own_network(self, config: ModelConfig) -> bool:
        """Whether to use the network in the file, not that of ``model.name``."""
        return self.kind == "keras" or (self.kind == "h5" and config.preprocessing is not None)

    def list_foreign(self) -> list[tuple[str, str]]:
        """List the classes and names of layers that are not Keras's."""
        layers = [(layer["class_name"], _name_layer(layer)) for layer in _walk(self.description) if _is_foreign(layer)]
        return list(dict.fromkeys(layers))

    def list_code(self) -> list[str]:
        """List layers that carry Python code or would load it."""
        found = []
        for layer in _walk(self.description):
            carries = layer["class_name"] in _CODE_LAYERS or _is_lambda(layer)
            found += [f"the layer {_name_layer(layer)} ({layer['class_name']})"] if carries else []
        return found or (["a Python lambda"] if "__lambda__" in json.dumps(self.description) else [])


def describe_expected_model(config: ModelConfig) -> str:
    """Describe the models that a configuration allows."""
    return f"expected a Keras model{'' if config.allow_code else ' without Python code'}"


def locate_weights(config: ModelConfig) -> Location:
    """Locate the file of the weights."""
    return Location(config.weights, config.storage_options if "://" in config.weights else {})


def examine_file(config: ModelConfig) -> ModelFile:
    """Identify the content of the weights file from the few kilobytes that describe it."""
    location = locate_weights(config)
    has_ending = config.weights.lower().endswith(_ENDINGS)
    with explained(location, "read"):
        if not has_ending and not location.fs.exists(location.path):
            raise _refuse(config)
        # In a bucket, listing may be forbidden while reading is allowed.
        if location.is_local and location.fs.isdir(location.path):
            raise _refuse(config, *_describe_folder(location))
    with explained(location, "read"), location.fs.open(location.path, "rb", block_size=_BLOCK_BYTES) as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        if head.startswith(b"\x89HDF\r\n\x1a\n"):
            found = _examine_hdf5(config, file)
        elif head.startswith(b"PK"):
            found = _examine_zip(config, file)
        else:
            raise _refuse(config, *_describe_other(config.weights.lower(), head))
    if not has_ending:
        raise _refuse(config, "a Keras file", f"rename it to end in {found.ending}")
    if found.kind == "keras" and config.preprocessing is None:
        raise ModelError(
            f"{config.weights}: this is a whole Keras model, which does not store how to scale pixels; "
            "set model.preprocessing to tf, caffe, torch or none"
        )
    return found


@contextmanager
def fetch_file(config: ModelConfig, found: ModelFile) -> Iterator[str]:
    """Yield a local path of the file with the extension that Keras expects."""
    location = locate_weights(config)
    ending = next((ending for ending in (".weights.h5", ".keras", ".h5") if location.path.endswith(ending)), None)
    description = _modernize(config, found)
    if location.is_local and ending == found.ending and description == found.description:
        yield location.path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / f"network{found.ending}")
        if location.is_local:
            shutil.copyfile(location.path, path)
        else:
            with explained(location, "read"):
                location.fs.get_file(location.path, path)
        if description != found.description:
            _describe_anew(path, description)
        yield path


def _modernize(config: ModelConfig, found: ModelFile) -> Mapping[str, Any]:
    """Describe the network as Keras 3 does."""
    if found.kind != "h5" or found.version.startswith("3."):
        return found.description
    try:
        return modernize(found.description)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _refuse(config, "a network that is not described as Keras does", _RESAVE) from error


def _describe_anew(path: str, description: Mapping[str, Any]) -> None:
    """Replace the description of the network in an HDF5 file."""
    import h5py

    with h5py.File(path, "r+") as hdf5:
        hdf5.attrs["model_config"] = json.dumps(description)


def _refuse(config: ModelConfig, what: str = "", advice: str = "") -> ModelError:
    """Make the error for a file that Keras cannot read: what the file is, and what to do."""
    name = config.weights.lower()
    if name.endswith(".keras"):
        where = f"{config.weights}: {describe_expected_model(config)}, found "
    elif name.endswith(_ENDINGS):
        where = f"{config.weights}: expected Keras weights or a Keras model, found "
    else:
        expected = "expected imagenet, random, or a file ending in .weights.h5, .h5 or .keras"
        where = f"model.weights: {expected}, found {config.weights!r}" + (", " if what else "")
    return ModelError(f"{where}{what}{f'; {advice}' if advice else ''}")


def _describe_other(name: str, head: bytes) -> tuple[str, str]:
    """Describe a file that Keras did not write, and what to do."""
    if not head:
        return "an empty file", _DAMAGED
    if head[4:8] == b"TFL3":
        return _BY_ENDING[".tflite"]
    by_ending = [what for ending, what in _BY_ENDING.items() if name.endswith(ending)]
    by_content = [(what, advice) for magic, what, advice in _MAGIC if head.lstrip().startswith(magic)]
    return [*by_ending, *by_content, ("something else or a damaged file", "")][0]


def _describe_folder(location: Location) -> tuple[str, str]:
    """Describe a folder, and what to do."""
    names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in location.fs.ls(location.path, detail=False)}
    if "saved_model.pb" in names:
        return "a folder with a TensorFlow SavedModel", _RESAVE
    if "config.json" in names:
        return "an unpacked .keras file", "zip the content of the folder, or save the model again"
    return "a folder", "set model.weights to a file in it"


def _examine_zip(config: ModelConfig, file: Any) -> ModelFile:
    """Identify a .keras file, or refuse any other ZIP archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if {"config.json", "metadata.json"} <= set(names):
                description, metadata = (json.loads(archive.read(name)) for name in ("config.json", "metadata.json"))
                version = str(metadata.get("keras_version", ""))
                return ModelFile("keras", description, description.get("compile_config"), version)
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:
        raise _refuse(config, "a truncated or damaged .keras file or ZIP archive", _DAMAGED) from error
    files = {name.rsplit("/", 1)[-1] for name in names}
    if "keras_model.h5" in files:
        raise _refuse(
            config,
            "a ZIP archive with keras_model.h5, an export of Teachable Machine",
            "unpack it and set model.weights to keras_model.h5, with model.preprocessing: tf",
        )
    if "data.pkl" in files:
        raise _refuse(config, *_BY_ENDING[".pt"])
    if "saved_model.pb" in files:
        raise _refuse(config, "a ZIP archive with a TensorFlow SavedModel", _RESAVE)
    raise _refuse(config, "a ZIP archive without a Keras model", "unpack it and set model.weights to the model in it")


def _examine_hdf5(config: ModelConfig, file: Any) -> ModelFile:
    """Identify a whole network, Keras 3 weights or Keras 2 weights, or refuse any other HDF5 file."""
    import h5py

    try:
        with h5py.File(file, "r") as hdf5:
            description, training = (
                json.loads(hdf5.attrs[name]) if name in hdf5.attrs else None
                for name in ("model_config", "training_config")
            )
            if description is not None:
                return ModelFile("h5", description, training, str(hdf5.attrs.get("keras_version", "")))
            is_legacy = "layer_names" in hdf5.attrs or "model_weights" in hdf5
            is_keras = is_legacy or any(name in hdf5 for name in ("layers", "vars", "_layer_checkpoint_dependencies"))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _refuse(config, "a truncated or damaged HDF5 file", _DAMAGED) from error
    if not is_keras:
        raise _refuse(config, "an HDF5 file that Keras did not write", "use a file from model.save or save_weights")
    return ModelFile("legacy weights" if is_legacy else "weights")


def _walk(tree: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the networks and layers of a description, outermost first."""
    config = tree.get("config") if isinstance(tree, Mapping) else None
    if not isinstance(tree.get("class_name") if isinstance(tree, Mapping) else None, str):
        return
    yield tree
    # In Keras 2.0 the config of a Sequential is its list of layers.
    layers = config if isinstance(config, list) else config.get("layers") if isinstance(config, Mapping) else None
    for layer in layers if isinstance(layers, list) else []:
        yield from _walk(layer)
    # Wrappers such as TimeDistributed have one layer.
    if isinstance(config, Mapping) and isinstance(config.get("layer"), Mapping):
        yield from _walk(config["layer"])


def _name_layer(layer: Mapping[str, Any]) -> str:
    """Find the name of a layer."""
    config = layer.get("config")
    name = layer.get("name") or (config.get("name") if isinstance(config, Mapping) else None)
    return str(name or layer["class_name"])


def _is_foreign(layer: Mapping[str, Any]) -> bool:
    """Whether the class of a layer is not Keras's; imports Keras."""
    if "module" in layer:
        return not str(layer["module"]).startswith("keras")
    import keras

    names = ("Functional", "Model", "Sequential")
    return layer["class_name"] not in names and not hasattr(keras.layers, layer["class_name"])


def _is_lambda(layer: Mapping[str, Any]) -> bool:
    """Whether a layer is a Lambda that contains its function, not just a name."""
    if layer["class_name"] != "Lambda" or not isinstance(layer.get("config"), Mapping):
        return False
    function = layer["config"].get("function")
    return not isinstance(function, str) and (
        not isinstance(function, Mapping) or function.get("class_name") != "function"
    )


def read_input_shapes(tree: Mapping[str, Any]) -> list[tuple[int | None, ...]] | None:
    """Read the shapes of the inputs of a network or layer from its description."""
    config = tree.get("config")
    own = config if isinstance(config, Mapping) else {}
    layers = config if isinstance(config, list) else own.get("layers")
    if isinstance(own.get("input_layers"), list) and isinstance(layers, list):
        # The names of input layers are in nested lists.
        names = json.dumps(own["input_layers"])
        found = [read_input_shapes(layer) for layer in layers if json.dumps(_name_layer(layer)) in names]
        return [shape for shapes in found for shape in shapes or ()] if found and None not in found else None
    build = tree.get("build_config") or {}
    named = (own.get(name) for name in ("batch_shape", "batch_input_shape", "build_input_shape"))
    shape = next((shape for shape in (*named, build.get("input_shape")) if isinstance(shape, list)), None)
    if shape is not None:
        return [tuple(shape)]
    return read_input_shapes(layers[0]) if isinstance(layers, list) and layers else None

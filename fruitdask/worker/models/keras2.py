"""Descriptions of networks that Keras 2 has saved as .h5, in the form that Keras 3 reads."""

from collections.abc import Mapping
from typing import Any, TypeGuard

#: Arguments that Keras 3 has removed, and that do not change features.
_REMOVED = {
    "DepthwiseConv2D": ("groups",),
    "SeparableConv2D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
}
#: The same of layers that augment images, which begin with Random.
_RANDOM = ("rng_type", "batch_input_shape")
_RENAMED = {"SyncBatchNormalization": "BatchNormalization"}
_FUNCTIONAL = ("Functional", "Model")


def modernize(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite the description of a network or layer."""
    name = _RENAMED.get(tree["class_name"], tree["class_name"])
    found, config = {**tree, "class_name": name}, tree.get("config")
    module = str(tree.get("module"))
    if ".engine." in module:
        # Keras 3 has the classes of networks in another module, and finds them by their names.
        del found["module"]
    elif module.startswith("keras.layers.experimental"):
        found["module"] = "keras.layers"
    if not isinstance(config, Mapping):
        return found
    removed = _RANDOM if name.startswith("Random") else _REMOVED.get(name, ())
    config = {key: value for key, value in config.items() if key not in removed}
    if name == "BatchNormalization" and isinstance(config.get("axis"), list):
        (config["axis"],) = config["axis"]
    policy = config.get("dtype")
    if isinstance(policy, Mapping) and policy.get("class_name") == "Policy":
        config["dtype"] = policy["config"]["name"]
    if isinstance(config.get("layers"), list):
        config |= _modernize_graph(config)
    return found | {"config": config}


def _modernize_graph(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite the layers of a network, the connections between them, and its only output as one without a list."""
    layers = [modernize(layer) for layer in config["layers"]]
    kinds = {str(layer.get("name")): str(layer["class_name"]) for layer in layers}
    for layer in layers:
        if isinstance(layer.get("inbound_nodes"), list):
            layer["inbound_nodes"] = [
                [_renumber(each, kinds, (*_FUNCTIONAL, "Sequential")) for each in node] if _is_call(node) else node
                for node in layer["inbound_nodes"]
            ]
    outputs = config.get("output_layers")
    if not _is_call(outputs):
        return {"layers": layers}
    # Keras 3 counts the calls of a network that is an output like Keras 2, unless it is a Sequential.
    ends = [_renumber(each, kinds, ("Sequential",)) for each in outputs]
    return {"layers": layers, "output_layers": ends[0] if len(ends) == 1 else ends}


def _is_call(node: Any) -> TypeGuard[list[list[Any]]]:
    """Whether the inputs of a layer are in the form of Keras 2."""
    return isinstance(node, list) and all(isinstance(each, list) for each in node)


def _renumber(reference: list[Any], kinds: Mapping[str, str], networks: tuple[str, ...]) -> list[Any]:
    """Count the calls of a nested network from 0, as those of a layer; Keras 2 counts its own graph as the first."""
    layer, call, *rest = reference
    return [layer, call - (kinds.get(layer) in networks), *rest]

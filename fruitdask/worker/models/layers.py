"""The layer whose output are the features, found in the graph of a network and of the networks nested in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fruitdask.errors import ModelError
from fruitdask.worker.models.files import ModelFile

#: A last Dense of fewer units counts as a classifier even without softmax or sigmoid: embeddings have more.
_MAX_SCORES = 32
_LAST_LAYERS = 5
#: Pixels from 0 to 255 are divided by 127.5 or 255.
_PIXEL_SCALE = 0.01
# Layers and operations of Keras, by their role between a classifier and the output.
_DROPOUTS = frozenset(
    "Dropout SpatialDropout1D SpatialDropout2D AlphaDropout GaussianDropout GaussianNoise ActivityRegularization"
    " Identity".split()
)
_SHAPES = frozenset("Flatten Reshape Squeeze ExpandDims Permute Rescaling Cast StopGradient".split())
_POOLS = frozenset(
    "GlobalAveragePooling1D GlobalAveragePooling2D GlobalMaxPooling1D GlobalMaxPooling2D AveragePooling2D MaxPooling2D"
    " Mean Max".split()
)
_NORMALIZATIONS = frozenset(
    "UnitNormalization LayerNormalization BatchNormalization GroupNormalization RMSNormalization Normalization"
    " Normalize Lambda".split()
)
_SCORES = frozenset("Softmax LogSoftmax Sigmoid HardSigmoid LogSigmoid Sparsemax".split())
_HIDDEN = frozenset(
    "ReLU LeakyReLU PReLU ELU Relu Relu6 LeakyRelu Elu Gelu Selu Silu HardSilu Celu Mish Softplus".split()
)
#: With a constant, arithmetic scales scores; with another branch, it merges.
_ARITHMETIC = frozenset("Add Subtract Multiply Divide TrueDivide".split())
_MERGES = frozenset("Add Subtract Average Maximum Minimum Concatenate".split())
_ADVICE = "set model.layer to the layer whose output are the features"


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor in the graph of a network that may be nested."""

    tensor: Any
    #: The calls of the enclosing networks, outermost first.
    calls: tuple[Any, ...] = ()

    @property
    def node(self) -> Any:
        """The call of the layer that outputs the tensor."""
        history = self.tensor._keras_history
        return history.operation._inbound_nodes[history.node_index]

    @property
    def name(self) -> str:
        """The name of that layer after those of its enclosing networks, separated by slashes."""
        return "/".join(node.operation.name for node in (*self.calls, self.node))

    def list_inputs(self) -> "list[Place]":
        """List the inputs of the layer that outputs the tensor."""
        return [replace(self, tensor=tensor)._leave() for tensor in self.node.input_tensors]

    def enter(self) -> "Place":
        """Find the place in the innermost network that outputs the tensor."""
        place = self
        while (inside := place.enter_once()) is not None:
            place = inside
        return place

    def enter_once(self) -> "Place | None":
        """Find the place in the nested network that outputs the tensor, if a network does."""
        operation = self.node.operation
        if not _has_graph(operation):
            return None
        tensor = operation.outputs[self.tensor._keras_history.tensor_index]
        return Place(tensor, (*self.calls, self.node))._leave()

    def _leave(self) -> "Place":
        """If the tensor is an input of a nested network, find the tensor that is passed to it."""
        if not (self.calls and self.node.is_input):
            return self
        call = self.calls[-1]
        index = [id(tensor) for tensor in call.operation.inputs].index(id(self.tensor))
        return Place(call.input_tensors[index], self.calls[:-1])._leave()


@dataclass(frozen=True)
class _Finding:
    """The result of a search: the input of a classifier, or why the user must choose a layer, or neither."""

    features: Place | None = None
    reason: str = ""
    candidates: tuple[Place, ...] = ()


@dataclass(frozen=True)
class _Trail:
    """The layers between a layer and the output."""

    is_classifier: bool
    is_pooled: bool = False
    is_hidden: bool = False


def find_features(network: Any, file: ModelFile | None) -> Place:
    """Find the input of the classifier of a network, or the output of a network without one.

    The search walks back from the output past activations, dropout, normalizations, reshaping and pooling to the first
    layer that could be a classifier: a Dense, or a 1 x 1 convolution before a global pooling. It is a classifier if a
    softmax or sigmoid follows, if the network was trained with a cross-entropy, or if it has fewer than 32 units. If a
    normalization follows instead, or there is no such layer, the features are the output itself, unless a softmax
    precedes it: then the output may be computed from scores.
    """
    places = [Place(tensor) for tensor in _list_outputs(network)]
    if file is None:
        # The pooling that model.pooling added comes last; the layer before it makes the map.
        is_pool = _name_kinds(places[0].node.operation) & _POOLS and len(places[0].tensor.shape) == 2
        return places[0].list_inputs()[0] if is_pool else places[0]
    findings = [_search(place, _Trail(is_classifier=file.is_classifier)) for place in places]
    if len(places) > 1:
        candidates = [found.features or place for found, place in zip(findings, places, strict=True)]
        raise ModelError(
            f"{network.name} has {len(places)} outputs, {_join(places, 'and')}; "
            f"{_ADVICE}, such as {_join(candidates, 'or')}"
        )
    found = findings[0]
    if not (found.features or found.reason):
        found = _doubt_output(places[0])
    if found.reason:
        raise ModelError(
            f"{network.name}: cannot tell which layer outputs the features: {found.reason}; "
            f"{_ADVICE}, such as {_join(found.candidates, 'or')}"
        )
    return _skip_dropouts(found.features or places[0])


def find_layer(network: Any, name: str) -> Place:
    """Find a layer by its name, in a network or in one nested in it."""
    places = list(_list_places([Place(tensor) for tensor in _list_outputs(network)]))
    found = [place for place in places if place.name == name]
    found = found or [place for place in places if place.name.endswith(f"/{name}")]
    names = list(dict.fromkeys(place.name for place in found))
    if not found:
        last = [place.name for place in places if not place.node.is_input][-_LAST_LAYERS:]
        raise ModelError(f"model.layer: found no layer {name!r} in {network.name}; its last ones are {', '.join(last)}")
    if len(names) > 1:
        raise ModelError(
            f"model.layer: {network.name} has {len(names)} layers {name!r}; write {' or '.join(names[:_LAST_LAYERS])}"
        )
    upstream = {id(place.node) for place in _list_places([found[-1]])}
    if any(id(place.node) not in upstream for place in found):
        raise ModelError(
            f"model.layer: {network.name} calls the layer {name!r} {len(found)} times in parallel; "
            "name a layer that comes after it"
        )
    return found[-1]


def find_scaling(place: Place) -> Place | None:
    """Find the layer that scales pixels from 0 to 255, of what leads to a place."""
    for each in _list_places([place]):
        layer = each.node.operation
        if "Rescaling" in _name_kinds(layer) and each.tensor.shape[-1] == 3 and np.max(layer.scale) < _PIXEL_SCALE:
            return each
    return None


def cut_network(network: Any, place: Place) -> Any:
    """End a network at a place."""
    import keras

    tensor = place.tensor
    for call in reversed(place.calls):
        nested = call.operation
        n_inputs = len(nested.inputs)
        own, inputs = (
            tensors[0] if n_inputs == 1 else tensors[:n_inputs] for tensors in (nested.inputs, call.input_tensors)
        )
        inner = keras.Model(own, tensor, name=f"{nested.name}_until_{place.node.operation.name}")
        # The call may lose training=True: the whole network is called for inference.
        tensor = inner(inputs)
    return keras.Model(network.inputs, tensor, name=network.name)


def has_foreign_layers(network: Any) -> bool:
    """Whether a network may contain code other than Keras's and fruitdask's."""
    import keras

    places = _list_places([Place(tensor) for tensor in _list_outputs(network)])
    packages = {type(_unwrap(place.node.operation)).__module__.split(".")[0] for place in places}
    return bool(packages - {"keras", "fruitdask"} or keras.saving.get_custom_objects())


def _list_outputs(network: Any) -> list[Any]:
    """List the outputs of a network, or refuse one that is not a graph of layers."""
    if not _has_graph(network):
        raise ModelError(
            f"{network.name}: expected a graph of layers, found the class {type(network).__name__}, which defines its "
            "layers in code; build it with keras.Sequential or keras.Model(inputs, outputs) and save that"
        )
    return list(network.outputs)


def _has_graph(operation: Any) -> bool:
    """Whether a layer is a network with a graph of layers."""
    import keras

    return isinstance(operation, keras.Model) and bool(getattr(operation, "outputs", None))


def _list_places(ends: Sequence[Place]) -> Iterator[Place]:
    """List the outputs of all layers up to some places, also in nested networks, each after its inputs."""
    seen: set[tuple[int, ...]] = set()
    # A stack, as networks are deeper than Python's recursion limit.
    waiting = [(place, False) for place in reversed(ends)]
    while waiting:
        place, is_ready = waiting.pop()
        key = (*map(id, place.calls), id(place.node))
        if is_ready:
            yield place
        elif key not in seen:
            seen.add(key)
            waiting.append((place, True))
            inside = place.enter_once()
            waiting += [(each, False) for each in ([inside] if inside else reversed(place.list_inputs()))]


def _skip_dropouts(place: Place) -> Place:
    """Walk back past dropout."""
    while _name_kinds(place.node.operation) & _DROPOUTS and place.list_inputs():
        place = place.list_inputs()[0]
    return place


def _search(place: Place, trail: _Trail) -> _Finding:
    """Walk back from a place to the classifier, if any."""
    while True:
        place = place.enter()
        operation, inputs = place.node.operation, place.list_inputs()
        kinds = _name_kinds(operation)
        if not inputs:
            return _Finding()
        if len(inputs) > 1:
            return _search_branches(place, inputs, kinds, trail)
        if kinds & {"Dense", "Conv1D", "Conv2D", "EinsumDense"}:
            return _judge(place, inputs[0], kinds, trail)
        if kinds & _NORMALIZATIONS and not trail.is_classifier:
            return _Finding()
        if kinds & _POOLS:
            trail = replace(trail, is_pooled=True)
        elif kinds & (_SCORES | _HIDDEN | {"Activation"}):
            function = _name_activation(operation) if "Activation" in kinds else ""
            is_classifier = trail.is_classifier or bool(kinds & _SCORES) or _is_scoring(function)
            is_hidden = trail.is_hidden or bool(kinds & _HIDDEN) or _is_hidden(function)
            trail = replace(trail, is_classifier=is_classifier, is_hidden=is_hidden)
        elif not kinds & (_DROPOUTS | _SHAPES | _ARITHMETIC | _NORMALIZATIONS):
            return _judge_unknown(place, inputs[0], trail)
        place = inputs[0]


def _judge(place: Place, features: Place, kinds: frozenset[str], trail: _Trail) -> _Finding:
    """Decide whether a layer with weights is a classifier."""
    layer = _unwrap(place.node.operation)
    function = _name_activation(layer)
    scores = trail.is_classifier or _is_scoring(function)
    is_map = len(place.tensor.shape) > 2 and any(size != 1 for size in place.tensor.shape[1:-1])
    if is_map and not trail.is_pooled:
        if not scores:
            return _Finding()
        return _Finding(None, f"{place.name} outputs a map of scores, not scores per image", (features,))
    if scores:
        return _Finding(features)
    if is_map and any(size != 1 for size in getattr(layer, "kernel_size", ())):
        return _Finding()
    n_units = place.tensor.shape[-1]
    if n_units < _MAX_SCORES:
        return _Finding(features)
    if not is_map and (trail.is_hidden or _is_hidden(function)):
        return _Finding()
    reason = f"{place.name} has {n_units} outputs without softmax or sigmoid: a classifier or an embedding"
    return _Finding(None, reason, (features, place))


def _judge_unknown(place: Place, features: Place, trail: _Trail) -> _Finding:
    """Decide about a layer of a class that classifiers do not use."""
    operation = place.node.operation
    is_own = type(operation).__module__.startswith("keras.")
    matrices = [weight for weight in getattr(operation, "weights", []) if len(weight.shape) > 1]
    if trail.is_classifier or (len(place.tensor.shape) == 2 and matrices and not is_own):
        reason = f"{place.name} ({type(operation).__name__}) could be a classifier or output the features"
        return _Finding(None, reason, (features, place))
    return _Finding()


def _doubt_output(output: Place) -> _Finding:
    """Doubt an output computed from probabilities, such as an average over networks or a choice of classes."""
    scored = [place for place in _list_places([output]) if _makes_probabilities(place.node.operation)]
    if not scored:
        return _Finding()
    candidates = [_search(place, _Trail(is_classifier=True)).features or place for place in scored[-_LAST_LAYERS:]]
    reason = f"{output.name} is computed from the softmax of {scored[-1].name}"
    return _Finding(None, reason, (*candidates, output))


def _makes_probabilities(operation: Any) -> bool:
    """Whether a layer has a softmax, also in a wrapper such as TimeDistributed; a sigmoid may be a gate's."""
    inner = getattr(operation, "layer", operation)
    layers = getattr(inner, "layers", [inner])
    kinds = {"Softmax", "LogSoftmax"}
    return any(_name_kinds(layer) & kinds or "softmax" in _name_activation(layer) for layer in layers)


def _search_branches(place: Place, inputs: list[Place], kinds: frozenset[str], trail: _Trail) -> _Finding:
    """Search the branches that a layer merges."""
    is_vector = len(place.tensor.shape) == 2 and bool(kinds & _MERGES)
    findings = [_search(branch, trail) for branch in inputs] if is_vector else []
    if not trail.is_classifier and not any(found.features or found.reason for found in findings):
        return _Finding()
    candidates = tuple(found.features for found in findings if found.features) or (*inputs, place)
    return _Finding(None, f"{place.name} merges {len(inputs)} branches", candidates)


def _unwrap(layer: Any) -> Any:
    """Return the layer inside a wrapper that changes only its weights."""
    return layer.layer if type(layer).__name__ == "SpectralNormalization" else layer


def _name_kinds(operation: Any) -> frozenset[str]:
    """Name the Keras classes of a layer or operation."""
    layer = _unwrap(operation)
    return frozenset(kind.__name__ for kind in type(layer).__mro__ if kind.__module__.startswith("keras."))


def _name_activation(layer: Any) -> str:
    """Name the activation function of a layer."""
    function = getattr(layer, "activation", None)
    return str(getattr(function, "__name__", type(function).__name__)).lower()


def _is_scoring(function: str) -> bool:
    """Whether an activation function outputs probabilities."""
    return any(word in function for word in ("softmax", "sigmoid", "sparsemax"))


def _is_hidden(function: str) -> bool:
    """Whether an activation function belongs to a hidden layer."""
    return function not in ("linear", "nonetype", "tanh", "") and not _is_scoring(function)


def _join(places: Sequence[Place], word: str) -> str:
    """Join the distinct names of places."""
    names = list(dict.fromkeys(_skip_dropouts(place).name for place in places))
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

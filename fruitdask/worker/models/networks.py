"""Networks with a name: all of keras.applications, and SqueezeNet."""

import difflib
from collections.abc import Callable
from typing import Any

from fruitdask.core.config import ModelConfig
from fruitdask.errors import ModelError
from fruitdask.worker.models import squeezenet

#: Input size of each network in pixels (Keras's ``default_size``, which it does not expose), by the module of
#: keras.applications that holds its preprocessing.
_APPLICATIONS = {
    "convnext": {f"ConvNeXt{size}": 224 for size in ("Tiny", "Small", "Base", "Large", "XLarge")},
    "densenet": dict.fromkeys(("DenseNet121", "DenseNet169", "DenseNet201"), 224),
    "efficientnet": {f"EfficientNetB{n}": px for n, px in enumerate((224, 240, 260, 300, 380, 456, 528, 600))},
    "efficientnet_v2": {f"EfficientNetV2B{n}": px for n, px in enumerate((224, 240, 260, 300))}
    | {"EfficientNetV2S": 384, "EfficientNetV2M": 480, "EfficientNetV2L": 480},
    "inception_resnet_v2": {"InceptionResNetV2": 299},
    "inception_v3": {"InceptionV3": 299},
    "mobilenet": {"MobileNet": 224},
    "mobilenet_v2": {"MobileNetV2": 224},
    "mobilenet_v3": {"MobileNetV3Small": 224, "MobileNetV3Large": 224},
    "nasnet": {"NASNetMobile": 224, "NASNetLarge": 331},
    "resnet": dict.fromkeys(("ResNet50", "ResNet101", "ResNet152"), 224),
    "resnet_v2": dict.fromkeys(("ResNet50V2", "ResNet101V2", "ResNet152V2"), 224),
    "vgg16": {"VGG16": 224},
    "vgg19": {"VGG19": 224},
    "xception": {"Xception": 299},
}
_SQUEEZENET = "SqueezeNet"
_MAX_HINTS = 3
#: Input size in pixels of every network with a name.
INPUT_PX = {name: px for networks in _APPLICATIONS.values() for name, px in networks.items()}
INPUT_PX[_SQUEEZENET] = squeezenet.INPUT_PX


def check_name(config: ModelConfig) -> None:
    """Refuse an unknown network, without importing TensorFlow."""
    if config.name in INPUT_PX or config.is_keras_file:
        return
    by_lower, found = {name.lower(): name for name in INPUT_PX}, config.name.lower()
    nearest = [name for name in by_lower if name.startswith(found)] if found else []
    nearest = (nearest or difflib.get_close_matches(found, by_lower))[:_MAX_HINTS]
    hint = (
        f"did you mean {' or '.join(by_lower[name] for name in nearest)}?"
        if nearest
        else "see https://keras.io/api/applications for the names"
    )
    raise ModelError(
        f"model.name: expected SqueezeNet or a network of keras.applications, found {config.name!r}; {hint}"
    )


def build_network(name: str, *, input_px: int, weights: str, pooling: str) -> Any:
    """Build a network by its name, without its classifier."""
    import keras

    if name == _SQUEEZENET:
        return squeezenet.build_squeezenet(input_px=input_px, weights=weights)
    return getattr(keras.applications, name)(
        include_top=False,
        weights=None if weights == "random" else weights,
        input_shape=(input_px, input_px, 3),
        pooling=None if pooling == "flatten" else pooling,
    )


def find_preprocessing(name: str) -> Callable[[Any], Any]:
    """Find the function with which a network's authors scaled pixels."""
    import keras

    if name == _SQUEEZENET:
        return squeezenet.preprocess
    module = next(module for module, networks in _APPLICATIONS.items() if name in networks)
    preprocess: Callable[[Any], Any] = getattr(keras.applications, module).preprocess_input
    return preprocess

"""The model artifact: a network as bytes, ready to be scattered to workers."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

#: From images, uint8 of shape (n, input_px, input_px, 3), to features, float32 of shape (n, n_features).
Predictor = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class ModelArtifact:
    """A network that the client built and packed for the workers."""

    #: What the engine loads: a graph that includes the weights and the preprocessing.
    payload: bytes = field(repr=False)
    engine: str
    name: str
    #: How the graph scales pixels: ``tf``, ``caffe``, ``torch``, ``none``, or ``own`` for the network's own.
    preprocessing: str
    #: Side of the square input.
    input_px: int
    n_features: int
    #: The layer whose output are the features, after the names of its enclosing networks and slashes.
    layer: str = ""
    #: Whether layers may come from other code than Keras's and fruitdask's.
    has_foreign_code: bool = False

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the payload in hexadecimal digits."""
        return hashlib.sha256(self.payload).hexdigest()

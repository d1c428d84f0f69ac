"""The model artifact: a network as bytes, ready to be scattered to workers."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class ModelArtifact:
    """
    A network that was built once, on the client, packed for the workers.

    Parameters
    ----------
    payload : bytes
        What the engine loads; for TensorFlow a serialized graph with the weights and the preprocessing inside.
    engine : str
        What runs it: ``tensorflow``.
    name : str
        The network's name.
    preprocessing : str
        How the graph scales pixels: ``tf``, ``caffe``, ``torch``, ``none``, or ``own`` for the network's own.
    input_px : int
        Side of the square input, in pixels.
    n_features : int
        Features an image.
    """

    payload: bytes = field(repr=False)
    engine: str
    name: str
    preprocessing: str
    input_px: int
    n_features: int

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the payload in hexadecimal digits."""
        return hashlib.sha256(self.payload).hexdigest()

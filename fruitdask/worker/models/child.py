"""Build networks in a child process, so that the client never imports TensorFlow."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from fruitdask.core.config import ModelConfig
from fruitdask.core.guard import check_exit_code, forget_missing_script, leave_imported_script
from fruitdask.core.storage import hide_secrets
from fruitdask.errors import EngineError, FruitdaskError
from fruitdask.worker.models.artifact import ModelArtifact
from fruitdask.worker.models.build import build_here
from fruitdask.worker.models.cache import find_artifact, keep_artifact
from fruitdask.worker.models.engines import choose_engine
from fruitdask.worker.models.settings import find_backend, keras_environment

#: How long to wait for the exit code of a process that has closed its pipe.
_EXIT_SECONDS = 10


def build_artifact(config: ModelConfig) -> ModelArtifact:
    """
    Build a network and pack it for the workers.

    Builds in this process, or in a child process if Keras runs on another backend than TensorFlow.

    Parameters
    ----------
    config : ModelConfig
        The network, weights, input size, pooling, preprocessing and engine.

    Returns
    -------
    ModelArtifact
        The network from uint8 RGB images to float32 features, including preprocessing.

    Raises
    ------
    ModelError
        If the network or layer does not exist, the weights do not fit, or the engine is missing or cannot run it.
    WeightsUnavailableError
        If the ImageNet weights cannot be downloaded.
    EngineError
        If the child process ends early.
    """
    if find_backend() == "tensorflow":
        return build_here(config)
    with _started_child(config) as wait_for_artifact:
        return wait_for_artifact()


@contextmanager
def start_building(config: ModelConfig) -> Iterator[Callable[[], ModelArtifact]]:
    """Build an artifact in a child process that ends with the context, or take it from the cache."""
    config = config.model_copy(update={"engine": choose_engine(config)})
    cached = find_artifact(config)
    if cached is not None:
        yield lambda: cached
        return
    with _started_child(config) as receive:

        def wait_for_artifact() -> ModelArtifact:
            artifact = receive()
            keep_artifact(config, artifact)
            return artifact

        yield wait_for_artifact


@contextmanager
def _started_child(config: ModelConfig) -> Iterator[Callable[[], ModelArtifact]]:
    """Start a child that builds an artifact, yield a function that waits for it, and end the child."""
    leave_imported_script()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_build_and_send, args=(config, sender), daemon=True)
    forget_missing_script()
    # The child runs the user's script again, which may be the first to import Keras.
    with keras_environment():
        process.start()
    sender.close()
    try:
        yield lambda: _receive(receiver, process)
    finally:
        process.kill()
        process.join()


def _build_and_send(config: ModelConfig, sender: Connection) -> None:
    """Build an artifact and send it, or an error."""
    # Ctrl-C reaches the whole process group, but the parent ends this process. GPUs belong to the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # The client logs the same messages, also for a network from the cache.
    logging.disable(logging.WARNING)
    try:
        sender.send(build_here(config))
    except FruitdaskError as error:
        sender.send(error)
    except Exception as error:
        # Other exceptions may not survive pickling.
        problem = f"model {config.name} with weights {config.weights} cannot be built: {type(error).__name__}: {error}"
        sender.send(EngineError(hide_secrets(problem)))


def _receive(receiver: Connection, process: SpawnProcess) -> ModelArtifact:
    """Receive what the child sends, or explain why it died."""
    try:
        received: ModelArtifact | FruitdaskError = receiver.recv()
    except EOFError as error:
        process.join(_EXIT_SECONDS)
        check_exit_code(process.exitcode)
        raise EngineError(
            "the process that builds the network ended early; free some memory and run again, "
            'and in a script of your own call run under if __name__ == "__main__":'
        ) from error
    if isinstance(received, FruitdaskError):
        raise received
    return received

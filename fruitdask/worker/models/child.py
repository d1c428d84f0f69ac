"""Building in a process of its own, so that the client never imports TensorFlow."""

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
_SECONDS_TO_END = 10


def build_artifact(config: ModelConfig) -> ModelArtifact:
    """
    Build a network and pack it for the workers.

    It is built in this process, or in a child where Keras runs on another backend than TensorFlow.

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
    EngineError
        If the child ends before it is done.
    """
    if find_backend() == "tensorflow":
        return build_here(config)
    with _started_child(config) as wait_for_artifact:
        return wait_for_artifact()


@contextmanager
def start_building(config: ModelConfig) -> Iterator[Callable[[], ModelArtifact]]:
    """Start to build an artifact in a child process, or take it from the cache.

    The client keeps its memory, its GPU and its time for other things. The child ends with the context.
    """
    # Chosen once, for the cache and for the child.
    config = config.model_copy(update={"engine": choose_engine(config)})
    cached = find_artifact(config)
    if cached is not None:
        yield lambda: cached
        return
    with _started_child(config) as receive:

        def wait_for_artifact() -> ModelArtifact:
            artifact = receive()
            # Kept by this process, where the file's name is known.
            keep_artifact(config, artifact)
            return artifact

        yield wait_for_artifact


@contextmanager
def _started_child(config: ModelConfig) -> Iterator[Callable[[], ModelArtifact]]:
    """Start a child that builds, give what waits for its artifact, and end the child."""
    leave_imported_script()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_build_and_send, args=(config, sender), daemon=True)
    forget_missing_script()
    # The child runs the user's script again, which may import Keras before anything else does.
    with keras_environment():
        process.start()
    sender.close()
    try:
        yield lambda: _receive(receiver, process)
    finally:
        process.kill()
        process.join()


def _build_and_send(config: ModelConfig, sender: Connection) -> None:
    """Build an artifact and send it, or the error that says why there is none."""
    # Ctrl-C reaches the whole process group; the parent ends this process. GPUs belong to the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # The pipeline says what there is to say, whether a network is built or kept from before.
    logging.disable(logging.WARNING)
    try:
        sender.send(build_here(config))
    except FruitdaskError as error:
        sender.send(error)
    except Exception as error:
        # Other exceptions may not survive pickling.
        sender.send(
            EngineError(
                hide_secrets(
                    f"model {config.name} with weights {config.weights} cannot be built: {type(error).__name__}: {error}"
                )
            )
        )


def _receive(receiver: Connection, process: SpawnProcess) -> ModelArtifact:
    """Receive what the child sends; a child that dies sends nothing."""
    try:
        received: ModelArtifact | FruitdaskError = receiver.recv()
    except EOFError as error:
        process.join(_SECONDS_TO_END)
        check_exit_code(process.exitcode)
        raise EngineError(
            "the process that builds the network ended before it was done; free some memory and run again, "
            'and in a script of your own call run under if __name__ == "__main__":'
        ) from error

    if isinstance(received, FruitdaskError):
        raise received
    return received

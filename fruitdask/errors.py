"""Exceptions that fruitdask raises: each has one complete sentence for the user.

A message says what was expected, what was found, where, and what to do. Exceptions cross processes by pickle, so every
constructor takes only that message.
"""


class FruitdaskError(Exception):
    """Base of every error that fruitdask raises on purpose."""


class ConfigError(FruitdaskError, ValueError):
    """The configuration, or an argument that stands for it, is wrong."""


class SettingsError(ConfigError):
    """Settings of a configuration are wrong; its message has a line for each."""


class StorageError(FruitdaskError, OSError):
    """A URL cannot be read or written."""


class OutageError(StorageError):
    """A URL can no longer be read or written, while a command works in an output folder."""


class DamageError(StorageError):
    """Stored data are not what was written."""


class CatalogError(FruitdaskError, FileNotFoundError):
    """The input has no images, or not the requested ones."""


class ImageError(FruitdaskError, ValueError):
    """A file is not an image that can be decoded."""


class ImageTooLargeError(ImageError):
    """An image has more pixels than allowed."""


class ModelError(FruitdaskError, ValueError):
    """A network cannot be built as configured."""


class EngineError(FruitdaskError, RuntimeError):
    """A network crashed its process, or its library could not build it."""


class WeightsUnavailableError(FruitdaskError, ConnectionError):
    """Pretrained weights cannot be fetched."""


class OutputError(FruitdaskError, FileExistsError):
    """A place for results cannot be used, or would overwrite something."""


class FormatError(OutputError):
    """An output folder has a format that this version does not know: a later version wrote it."""


class StoreMismatchError(FruitdaskError, ValueError):
    """A store holds the results of another run."""


class ClusterStartError(FruitdaskError, RuntimeError):
    """A Dask cluster did not start or cannot be reached."""


class ScriptError(SystemExit, FruitdaskError):
    """
    A script lacks the guard ``if __name__ == "__main__":``, so that no process can be started for it.

    Uncaught, it ends the script with only its message and exit code 1, without a traceback.
    """


class ResidencyError(FruitdaskError, PermissionError):
    """Data or machines are in a region that is not allowed, or their region is unknown."""


class LimitError(FruitdaskError, RuntimeError):
    """A run would cost more, or has cost more, than its configuration allows."""


class PartitionError(FruitdaskError, RuntimeError):
    """A partition could not be processed, or its results could not be stored."""


class TooManyFailuresError(FruitdaskError, RuntimeError):
    """More images failed than the configuration allows."""


class ReduceError(FruitdaskError, ValueError):
    """The features cannot be reduced as configured."""


class TrainingError(FruitdaskError, ValueError):
    """No classifier can be trained on these images, or it could not be evaluated."""


class NoVarianceError(ReduceError):
    """All images have the same features, so that there are no principal components."""

"""Computes the features of a few photographs in this process, with the network of a finished run."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fruitdask import store
from fruitdask.core.config import Config, LocalClusterConfig
from fruitdask.core.guard import leave_imported_script
from fruitdask.core.storage import Location
from fruitdask.errors import ConfigError, ImageError, StoreMismatchError
from fruitdask.pipeline.inputs import check_network, restore_config
from fruitdask.worker.fetch import ImageSource, Photograph
from fruitdask.worker.models import choose_batch_size, start_building

if TYPE_CHECKING:
    from PIL import Image

#: Modes of Pillow that PNG stores as they are, and those of more than 8 bits that it does not store.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_DEEP_MODES = ("F", "I", "I;16B", "I;16L", "I;16N")
#: The fastest level of zlib that compresses.
_COMPRESS_LEVEL = 1


def embed_photographs(
    output: Location,
    manifest: store.RunManifest,
    photographs: Sequence[Any],
    *,
    storage_options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[npt.NDArray[np.float32], pd.DataFrame]:
    """Compute the features of photographs in the same way as a finished run.

    Returns features (n, n_features), float32, NaN if there are none, and a table of path, status and error.
    """
    leave_imported_script()
    config = restore_config(manifest, overrides=overrides)
    check_network(output, manifest, config)
    named = [locate_photograph(each, number, storage_options) for number, each in enumerate(photographs, start=1)]
    with start_building(config.model) as wait_for_artifact:
        artifact = wait_for_artifact()
    if artifact.n_features != manifest.model.n_features:
        raise StoreMismatchError(
            f"{output.url}: expected a network of {manifest.model.n_features:,} features, found one of "
            f"{artifact.n_features:,}; use the version of Keras that the manifest names"
        )
    from fruitdask.worker.featurize import featurize_photographs

    return featurize_photographs(named, artifact, describe_source(config))


def list_photographs(photographs: Any) -> list[Any]:
    """List one photograph or many; an array is one."""
    is_one = isinstance(photographs, str | bytes | bytearray | memoryview | os.PathLike | np.ndarray)
    # Images of Pillow, and open files.
    is_one = is_one or hasattr(photographs, "getbands") or hasattr(photographs, "read")
    return list(photographs) if isinstance(photographs, Iterable) and not is_one else [photographs]


def describe_source(config: Config) -> ImageSource:
    """Describe how to read photographs one by one; remote file systems retry by themselves."""
    return ImageSource(
        Location(os.curdir),
        batch_size=config.featurize.batch_size or choose_batch_size(config.model, LocalClusterConfig()),
        max_pixels=config.featurize.max_pixels,
        fetch_attempts=1,
        concurrent_reads=config.featurize.concurrent_reads,
        decode=config.featurize.decode,
    )


def locate_photograph(
    photograph: Any, number: int, storage_options: Mapping[str, Any] | None = None
) -> tuple[str, Photograph]:
    """Return the name of a photograph, and its file, the content of a file, or why it cannot be used."""
    from PIL import Image

    if isinstance(photograph, str | os.PathLike):
        path = os.fspath(photograph)
        return path, Location(path, storage_options or {})
    if isinstance(photograph, bytes):
        return f"image {number}", photograph
    if isinstance(photograph, np.ndarray):
        return f"image {number}", _pack_array(photograph)
    if isinstance(photograph, Image.Image):
        # Images that Pillow opened from a file have a name.
        return getattr(photograph, "filename", "") or f"image {number}", _pack_image(photograph)
    raise ConfigError(
        f"image {number}: expected a path, a URL, bytes, a Pillow image or a NumPy array, found "
        f"{type(photograph).__name__}"
    )


def _pack_array(pixels: npt.NDArray[Any]) -> bytes | ImageError:
    """Pack pixels into the content of a file."""
    from PIL import Image

    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,), (4,)):
        return ImageError(
            "expected an array of uint8 of shape (height, width) or (height, width, 3 or 4), found one of "
            f"{pixels.dtype} of shape {pixels.shape}"
        )
    return _pack_image(Image.fromarray(pixels))


def _pack_image(image: "Image.Image") -> bytes | ImageError:
    """Pack a Pillow image into the content of a file, so that it is decoded like one: nothing is lost, and it is
    upright.
    """
    from PIL import ImageOps

    if image.mode in _DEEP_MODES:
        # Pillow would clip them at 255.
        return ImageError(
            f"expected pixels of 8 bits, found an image of Pillow's mode {image.mode}; give its file, or its pixels as "
            "an array of uint8"
        )
    file = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(image)
        stored = upright if upright.mode in _PNG_MODES else upright.convert("RGB")
        stored.save(file, "PNG", compress_level=_COMPRESS_LEVEL)
    except Exception as error:
        # Pillow reads pixels only now, and decoders raise anything.
        return ImageError(f"it cannot be read: {error}")
    return file.getvalue()

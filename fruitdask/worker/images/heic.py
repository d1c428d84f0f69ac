"""HEIC: photographs of iPhones, read by pillow-heif where the extra `heic` is installed."""

import io

from PIL import Image

from fruitdask.core.listing import can_read_heic
from fruitdask.errors import ImageError
from fruitdask.worker.images.boxes import list_brands, read_items

#: Brands of ISO/IEC 23008-12: still images and sequences, coded by HEVC or by what their items say.
_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1"))
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
#: A picture of HEVC, and those that are put together of such.
_KINDS = frozenset((b"hvc1", b"grid", b"iden", b"iovl", b"tmap"))


def is_avif(data: bytes) -> bool:
    """Tell whether a file says that it is an AVIF image."""
    return not _AVIF_BRANDS.isdisjoint(list_brands(data))


def is_heic(data: bytes) -> bool:
    """Tell whether a file says that it is a HEIF image of another coding than AVIF's, nearly always HEIC."""
    brands = list_brands(data)
    # A video may list mif1 among its compatible brands; only the major brand says what the file is.
    return bool(brands) and brands[0] in _BRANDS and _AVIF_BRANDS.isdisjoint(brands)


def open_heic(data: bytes) -> Image.Image:
    """Open a HEIC image; pillow-heif is asked alone, so that Pillow does not change for others."""
    if not can_read_heic():
        raise ImageError(
            "expected an image that can be read here, found HEIC; install fruitdask[heic] where images are decoded, or convert it to JPEG"
        )
    kind = read_items(data).primary_kind
    if not kind:
        raise ImageError("the image is broken: found HEIC without a picture; the file may be cut off, download it again")
    if kind not in _KINDS:
        raise ImageError(f"expected a HEIF image that is coded as HEVC, found {kind.decode('latin-1')!r}; convert it to JPEG")
    import pillow_heif

    # Workers decode in several threads of their own; with 0 libheif starts no further ones.
    pillow_heif.options.DECODE_THREADS = 0
    return pillow_heif.HeifImageFile(io.BytesIO(data))

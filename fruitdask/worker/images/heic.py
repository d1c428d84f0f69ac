"""HEIC: photographs of iPhones, read by pillow-heif if the extra `heic` is installed."""

import io

from PIL import Image

from fruitdask.core.listing import can_read_heic
from fruitdask.errors import ImageError
from fruitdask.worker.images.boxes import list_brands, read_items

#: Brands of ISO/IEC 23008-12: still images and sequences, with HEVC or a coding that each item states.
_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1"))
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
#: A picture in HEVC, and pictures derived from such.
_KINDS = frozenset((b"hvc1", b"grid", b"iden", b"iovl", b"tmap"))


def is_avif(data: bytes) -> bool:
    """Whether a file has a brand of AVIF."""
    return not _AVIF_BRANDS.isdisjoint(list_brands(data))


def is_heic(data: bytes) -> bool:
    """Whether a file is a HEIF image other than AVIF, nearly always HEIC."""
    brands = list_brands(data)
    # A video may list mif1 among its compatible brands; only the major brand says what the file is.
    return bool(brands) and brands[0] in _BRANDS and _AVIF_BRANDS.isdisjoint(brands)


def open_heic(data: bytes) -> Image.Image:
    """Open a HEIC image with pillow-heif directly; registering its plugin would change Pillow for the whole process."""
    if not can_read_heic():
        raise ImageError(
            "expected an image that this installation can read, found HEIC; install fruitdask[heic] on every worker, "
            "or convert the image to JPEG"
        )
    items = read_items(data)
    if items.primary not in items.by_number:
        raise ImageError("the image is broken: HEIC without a picture; the file may be truncated, download it again")
    kind = items.by_number[items.primary].kind
    if kind not in _KINDS:
        raise ImageError(f"expected a HEIF image coded as HEVC, found {kind.decode('latin-1')!r}; convert it to JPEG")
    import pillow_heif

    # Workers decode in several threads already; with 0 libheif starts no more.
    pillow_heif.options.DECODE_THREADS = 0
    return pillow_heif.HeifImageFile(io.BytesIO(data))

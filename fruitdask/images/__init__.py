"""Images: from the bytes of a file to pixels, and nothing but pixels."""

from fruitdask.images.decode import decode_image, decode_images, read_header
from fruitdask.images.heic import can_read_heic

__all__ = ["can_read_heic", "decode_image", "decode_images", "read_header"]

"""Images: from the bytes of a file to pixels, and nothing but pixels."""

from fruitdask.worker.images.decode import decode_image, decode_images, read_header

__all__ = ["decode_image", "decode_images", "read_header"]

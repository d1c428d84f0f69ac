"""Tests of the sentence that says what a file is if not an image, and of raw photographs that look like a TIFF."""

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from chaos.hostile_images import build_tiff
from PIL import Image

from fruitdask.errors import ImageError
from fruitdask.worker.images import decode_image


def save(kind: str, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "orange").save(buffer, kind)
    return buffer.getvalue()


def zip_up() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", save("JPEG"))
    return buffer.getvalue()


def tar_up() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    return buffer.getvalue()


def save_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((8, 8)))
    return buffer.getvalue()


def build_media(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"isommp42" + bytes(500)


ERROR_PAGE = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
)
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "html": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "html with a mark and a comment": (lambda: b"\xef\xbb\xbf\n <!-- x -->\n<HTML lang='de'>", "an HTML page"),
    "html in utf-16": (lambda: "<html><body>Ä</body></html>".encode("utf-16"), "an HTML page"),
    "xhtml": (lambda: b"<?xml version='1.0'?><!DOCTYPE html PUBLIC ''><html/>", "an HTML page"),
    "git lfs": (POINTER.encode, "a Git LFS pointer .*run git lfs pull"),
    "appledouble": (lambda: b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4000), "a macOS AppleDouble file"),
    "ds_store": (lambda: b"\0\0\0\1Bud1" + bytes(4000), "a macOS .DS_Store file"),
    "icloud": (lambda: b"bplist00\xd1\1\2", "a macOS property list"),
    "pdf": (lambda: save("PDF"), "a PDF document"),
    "mp4": (lambda: build_media(b"isom"), r"a video \(MP4\)"),
    "mov": (lambda: build_media(b"qt  "), r"a QuickTime video \(MOV\)"),
    "old mov": (lambda: struct.pack(">I", 500) + b"moov" + bytes(500), r"a QuickTime video \(MOV\)"),
    "zip": (zip_up, "a ZIP archive"),
    "tar": (tar_up, "a tar archive"),
    "gzip": (lambda: gzip.compress(save("JPEG")), "a file compressed with gzip"),
    "svg": (
        lambda: b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "an SVG drawing",
    ),
    "psd": (lambda: b"8BPS\0\1" + bytes(6) + bytes(500), r"a Photoshop document \(PSD\)"),
    "cr3": (lambda: build_media(b"crx "), r"a camera's raw file \(Canon CR3\)"),
    "raf": (lambda: b"FUJIFILMCCD-RAW 0201FF389501X-T3" + bytes(500), r"a camera's raw file \(Fujifilm RAF\)"),
    "orf": (lambda: b"IIRO\x08\0\0\0" + bytes(500), r"a camera's raw file \(Olympus ORF\)"),
    "rw2": (lambda: b"IIU\0\x18\0\0\0" + bytes(500), r"a camera's raw file \(Panasonic RW2\)"),
    "jpeg xl": (lambda: b"\xff\x0a" + bytes(range(200)), "a JPEG XL image"),
    "jpeg xl in boxes": (lambda: b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200), "a JPEG XL image"),
    "ico": (lambda: save("ICO"), r"a Windows icon \(ICO\)"),
    "ppm": (lambda: save("PPM"), "a portable pixmap"),
    "fits": (lambda: b"SIMPLE  =                    T" + b" " * 2850, "an astronomical FITS file"),
    "dicom": (lambda: bytes(128) + b"DICM" + bytes(range(200)), "a medical DICOM file"),
    "s3 error": (ERROR_PAGE.encode, r"an object store's error .*\(AccessDenied\)"),
    "xml": (lambda: b"<?xml version='1.0'?><note/>", "an XML document"),
    "json": (lambda: json.dumps({"error": "not found"}).encode(), "JSON"),
    "json list": (lambda: b'[{"a": 1}]', "JSON"),
    "text": (lambda: "Ceci n'est pas une image — vraiment.\n".encode() * 200, "plain text"),
    "zeros": (lambda: bytes(5_000), r"nothing but zeros \(5,000 bytes\)"),
    "numpy": (save_array, "a NumPy array"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "webm": (lambda: b"\x1a\x45\xdf\xa3" + bytes(99), "a Matroska or WebM video"),
    "avi": (lambda: b"RIFF\x10\0\0\0AVI LIST", r"a video \(AVI\)"),
    "eps": (lambda: save("EPS"), "a PostScript file"),
    "bytes": (
        lambda: b"\x17\xee\x01\x02<b>\n\x1b[31m" * 99,
        "an unknown format that begins with 17 ee 01 02 3c 62 3e 0a$",
    ),
    "text that begins like a bmp": (lambda: b"BMW and other cars\n" * 9, "plain text"),
}


@pytest.mark.parametrize("name", FILES)
def test_sentence_names_what_was_found(name: str) -> None:
    build, message = FILES[name]
    with pytest.raises(ImageError, match=f"^expected a JPEG, PNG, .* or HEIC image, found {message}") as caught:
        decode_image(build(), size_px=16, max_pixels=1_000_000)
    assert str(caught.value).isprintable()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000"])
def test_start_of_a_file_in_a_supported_format_is_called_broken(kind: str) -> None:
    with pytest.raises(ImageError, match="^the image is broken: "):
        decode_image(save(kind)[:16], size_px=16, max_pixels=1_000_000)


LONG = 4


def test_raw_photograph_does_not_become_its_thumbnail() -> None:
    # As in NEF, ARW and DNG: the first page says that it is a smaller copy, and the others are its children.
    thumbnail = build_tiff((0x00FE, LONG, 1, 1), (0x014A, LONG, 1, 8), side=160, data=bytes(160 * 160))
    with pytest.raises(ImageError, match="found a TIFF of several pages whose first is a thumbnail"):
        decode_image(thumbnail, size_px=16, max_pixels=1_000_000)
    paged = build_tiff((0x00FE, LONG, 1, 1), side=160, data=bytes(160 * 160), following=8)
    with pytest.raises(ImageError, match="found a TIFF of several pages whose first is a thumbnail"):
        decode_image(paged, size_px=16, max_pixels=1_000_000)


def test_canon_raw_photograph_is_named() -> None:
    whole = build_tiff(side=16, data=bytes(256))
    raw = b"II*\0\x10\0\0\0CR\2\0" + bytes(4) + whole[8:]
    with pytest.raises(ImageError, match=r"found a camera's raw file \(Canon CR2\); develop it"):
        decode_image(raw, size_px=16, max_pixels=1_000_000)

"""Names: one sentence about a file that cannot be read as an image."""

import io
import re
import struct
from collections.abc import Mapping
from typing import Any

from PIL import TiffImagePlugin

from fruitdask.worker.images.boxes import list_brands
from fruitdask.worker.images.heic import is_avif, is_heic
from fruitdask.worker.images.jpeg2000 import CODESTREAM, FILE
from fruitdask.worker.images.tiff import TIFF_HEADS, describe_tiff, explain_tiff

_EXPECTED = "expected a JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000 or HEIC image"
_RAW = "a camera's raw file ({}); develop it to JPEG or TIFF"
#: First bytes of the formats that fruitdask reads.
_OWN = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    CODESTREAM: "JPEG 2000",
    FILE: "JPEG 2000",
    **dict.fromkeys(TIFF_HEADS, "TIFF"),
}
#: First bytes of other formats, longer ones first.
_BEGINNINGS = {
    b"FUJIFILMCCD-RAW": _RAW.format("Fujifilm RAF"),
    **dict.fromkeys((b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a"), "a JPEG XL image; convert it to JPEG or PNG"),
    b"SQLite format 3\0": "an SQLite database",
    b"gimp xcf": "a GIMP picture (XCF); export it as PNG",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a Windows OLE file (an old Office document, or Thumbs.db)",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"SIMPLE  =": "an astronomical FITS file; convert it to PNG",
    b"\0\0\0\1Bud1": "a macOS .DS_Store file",
    b"bplist00": "a macOS property list (iCloud's placeholder for a file); download the file itself",
    b"\0\5\x16\7": "a macOS AppleDouble file (._ before its name), which holds no picture",
    b"\0\5\x16\0": "a macOS AppleSingle file",
    **dict.fromkeys((b"#?RADIANCE", b"#?RGBE"), "a Radiance picture (HDR); convert it to PNG or TIFF"),
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; extract it",
    b"\xfd7zXZ\0": "a file compressed with xz; decompress it",
    b"\x93NUMPY": "a NumPy array",
    b"Rar!": "a RAR archive; extract it",
    b"PK\3\4": "a ZIP archive or an Office document; extract its pictures",
    b"PK\5\6": "an empty ZIP archive",
    b"\x28\xb5\x2f\xfd": "a file compressed with Zstandard; decompress it",
    b"%PDF": "a PDF document; extract its pictures",
    **dict.fromkeys((b"%!PS", b"\xc5\xd0\xd3\xc6"), "a PostScript file (EPS); export it as PNG"),
    b"8BPS": "a Photoshop document (PSD); export it as PNG or TIFF",
    b"AT&T": "a DjVu document",
    b"\x76\x2f\x31\x01": "an OpenEXR picture; convert it to PNG or TIFF",
    b"DDS ": "a texture (DDS); convert it to PNG",
    b"qoif": "a QOI picture; convert it to PNG",
    b"BPG\xfb": "a BPG picture; convert it to PNG",
    b"DICM": "a medical DICOM file; convert it to PNG",
    **dict.fromkeys((b"IIRO", b"IIRS", b"MMOR"), _RAW.format("Olympus ORF")),
    b"IIU\0": _RAW.format("Panasonic RW2"),
    b"II\xbc": "a JPEG XR picture; convert it to JPEG or PNG",
    b"FOVb": _RAW.format("Sigma X3F"),
    b"\0MRM": _RAW.format("Minolta MRW"),
    b"\0\0\1\0": "a Windows icon (ICO); convert it to PNG",
    b"\0\0\2\0": "a Windows cursor (CUR)",
    b"icns": "macOS icons (ICNS); convert them to PNG",
    b"\x8aMNG": "an MNG animation",
    b"\x1a\x45\xdf\xa3": "a Matroska or WebM video; extract pictures from it",
    b"OggS": "an Ogg sound or video file",
    b"fLaC": "a sound file (FLAC)",
    b"ID3": "a sound file (MP3)",
    b"PAR1": "a Parquet table",
    **dict.fromkeys((b"\x7fELF", b"MZ"), "a program"),
    b"\x1f\x8b": "a file compressed with gzip; decompress it",
    b"BZh": "a file compressed with bzip2; decompress it",
    **dict.fromkeys((b"PF\n", b"Pf\n"), "a PFM picture of floating-point numbers; convert it to 8 or 16 bits"),
}
#: Other ISO base media files by their major brand.
_BRANDS = {
    b"crx ": _RAW.format("Canon CR3"),
    b"qt  ": "a QuickTime video (MOV); extract pictures from it",
    **dict.fromkeys((b"M4A", b"M4B"), "a sound file (M4A)"),
}
_VIDEO = "a video (MP4); extract pictures from it"
_PORTABLE = re.compile(rb"P[1-7][\s#]")
_BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)
_S3_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
#: Blanks, comments and declarations at the start of a text.
_LEAD = re.compile(r"(?:\s|<!--.*?-->|<\?xml.*?\?>|<!DOCTYPE svg.*?>)+", re.DOTALL | re.IGNORECASE)
_MARKER = re.compile(rb"\xff([\xc0-\xcf])..(.)....(.)", re.DOTALL)
_N_TEXT_BYTES = 4_096


def explain(data: bytes, error: Exception | None) -> str:
    """Explain why bytes are not a picture: what they are instead, or a decoder's error."""
    if not data:
        return "expected an image, found an empty file"
    own = _name_own(data)
    if own and error is not None:
        return f"the image is broken: {' '.join(str(error).split()) or type(error).__name__}"
    return _explain_own(data, own) if own else f"{_EXPECTED}, found {_name_content(data)}"


def name_raw(data: bytes) -> str | None:
    """Describe a raw file that is also a valid TIFF, which has only a thumbnail."""
    if data[:4] in TIFF_HEADS and data[8:10] == b"CR":
        return f"{_EXPECTED}, found {_RAW.format('Canon CR2')}"
    return None


def _name_content(data: bytes) -> str:
    """Name the format of bytes."""
    if not data.strip(b"\0"):
        return f"nothing but zeros ({len(data):,} bytes), as after an interrupted copy; copy the file again"
    if data[128:132] == b"DICM":
        return _BEGINNINGS[b"DICM"]
    if data[257:262] == b"ustar":
        return "a tar archive; extract it"
    if brands := list_brands(data):
        return next((name for brand, name in _BRANDS.items() if brands[0].startswith(brand)), _VIDEO)
    if data[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return _BRANDS[b"qt  "]
    if data.startswith(b"RIFF"):
        kind = {b"AVI ": "a video (AVI)", b"WAVE": "a sound file (WAV)"}.get(data[8:12])
        return kind or "a RIFF file other than WebP"
    if _PORTABLE.match(data):
        return "a portable pixmap (PPM, PGM, PBM or PAM); convert it to PNG"
    for begin, name in _BEGINNINGS.items():
        if data.startswith(begin):
            return name
    return _name_text(data) or f"an unknown format that begins with {data[:8].hex(' ')}"


def _name_own(data: bytes) -> str | None:
    """Name the format of a file that begins like an image fruitdask reads."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if is_avif(data):
        return "AVIF"
    if is_heic(data):
        return "HEIC"
    name = next((name for begin, name in _OWN.items() if data.startswith(begin)), None)
    # A text may begin like a BMP, but without a BMP header.
    is_text = name == "BMP" and len(data) >= 18 and struct.unpack_from("<I", data, 14)[0] not in _BMP_HEADER_BYTES
    return None if is_text else name


def _explain_own(data: bytes, name: str) -> str:
    """Explain why a file in a format that fruitdask reads cannot be opened."""
    if name == "TIFF" and (tags := _read_tags(data)):
        return f"expected pixels with defined colours, found {explain_tiff(tags) or describe_tiff(tags)}"
    if name == "JPEG" and (match := _MARKER.search(data)) and match[1] not in b"\xc4\xc8\xcc":
        bits, n_channels = match[2][0], match[3][0]
        if bits != 8 or n_channels not in (1, 3, 4) or match[1] not in b"\xc0\xc1\xc2\xc9\xca":
            kind = "lossless " if match[1] in b"\xc3\xc7\xcb\xcf" else ""
            found = f"a {kind}JPEG with {n_channels} of {bits} bits"
            return f"expected a JPEG with 1, 3 or 4 channels of 8 bits, found {found}; convert it to PNG"
    return f"the image is broken: its {name} header cannot be read; the file may be truncated, download it again"


def _read_tags(data: bytes) -> Mapping[int, Any] | None:
    """Read the first directory of a TIFF; None if it is broken."""
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:4] in (b"+\0", b"\0+") else 8])
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        return dict(directory) if 0x0100 in directory else None
    except Exception:
        # Broken bytes raise anything.
        return None


def _name_text(data: bytes) -> str | None:
    """Name the format of a text; None if the bytes are not text."""
    encoding = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}.get(data[:2], "utf-8-sig")
    text = data[:_N_TEXT_BYTES].decode(encoding, "replace")
    # The end may fall within a character.
    if any(not char.isprintable() and char not in "\t\r\n\f" or char == "\ufffd" for char in text[:-2]):
        return None
    lead = _LEAD.match(text)
    start = text[lead.end() if lead else 0 :][:200].lower()
    if text.startswith("version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer in place of the file; run git lfs pull"
    if start.startswith(("<!doctype html", "<html", "<head", "<body")):
        return "an HTML page in place of the file, perhaps a server's error; download it again"
    if start.startswith("<svg"):
        return "an SVG drawing; export it as PNG"
    if start.startswith("<error"):
        code = _S3_CODE.search(text)
        return f"an object store's error in place of the file{f' ({code[1]})' if code else ''}; download it again"
    if start.startswith("<"):
        return "an XML document"
    if re.match(r'\{\s*("|\}|$)|\[\s*["\[{\d\]]', start):
        return "JSON"
    return "plain text"

"""TIFF 6.0: a reader of directories that accepts any bytes, and a check of the colours that a header defines."""

import math
import struct
from collections.abc import Iterator, Mapping
from numbers import Rational
from typing import Any, Literal

from fruitdask.errors import ImageError

#: TIFF and BigTIFF in both byte orders.
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: Bytes per number of each type (TIFF 6.0, BigTIFF); the types left out take one.
_WIDTHS = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_BIG_TIFF = 43

_ADVICE = "convert it to 8 or 16 bits per channel, in grey or RGB"
_UNCOMPRESSED, _OLD_JPEG = 1, 6
_RGB, _PALETTE, _CMYK, _YCBCR = 2, 3, 5, 6
_FORMATS = {3: "floating-point numbers", 4: "undefined numbers", 5: "complex numbers", 6: "complex numbers"}
#: Photometric interpretations that are never displayed as they are.
_PHOTOMETRICS = {
    4: "transparency masks",
    9: "ICC L*a*b* colours",
    10: "ITU L*a*b* colours",
    32803: "a camera's raw samples",
    32844: "luminances without a limit",
    32845: "luminances without a limit",
    34892: "a camera's raw samples",
    51177: "depths",
}
#: JPEG's weights of red, green and blue in luminance, and its black and white level of each channel.
_COEFFICIENTS = (0.299, 0.587, 0.114)
_REFERENCES = (0, 255, 128, 255, 128, 255)


class TiffReader:
    """Reads TIFF and BigTIFF directories from any bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
        is_big = _BIG_TIFF in data[2:4]
        # BigTIFF has wider entry counts, entries and offsets.
        self._count_bytes, self._offset_bytes, layout = (8, 8, "HHQ8s") if is_big else (2, 4, "HHI4s")
        self._entry = struct.Struct(("<" if self._order == "little" else ">") + layout)
        #: Offset of the first directory.
        self.first = int.from_bytes(data[8:16] if is_big else data[4:8], self._order)

    def list_entries(self, offset: int, most: int | None = None) -> Iterator[tuple[int, tuple[int, int, bytes]]]:
        """List the tags of a directory, each with its type, its number of values, and the value or its offset."""
        start = offset + self._count_bytes
        count = self._count_entries(offset)
        packed = self._data[start : start + (count if most is None else min(count, most)) * self._entry.size]
        for tag, *entry in self._entry.iter_unpack(packed[: len(packed) // self._entry.size * self._entry.size]):
            yield tag, (entry[0], entry[1], entry[2])

    def find_next(self, offset: int) -> int:
        """Find the offset of the directory that follows a directory."""
        end = offset + self._count_bytes + self._count_entries(offset) * self._entry.size
        return int.from_bytes(self._data[end : end + self._offset_bytes], self._order)

    def read_value(self, kind: int, count: int, field: bytes, *, most: int) -> bytes:
        """Read up to `most` bytes of an entry's value, which is in the entry if it fits, else at an offset."""
        size = count * _WIDTHS.get(kind, 1)
        if size <= len(field):
            return field[:size]
        at = int.from_bytes(field, self._order)
        return self._data[at : at + min(size, most)]

    def read_integers(self, value: bytes, kind: int) -> list[int]:
        """Read a value as integers."""
        width = _WIDTHS.get(kind, 1)
        return [int.from_bytes(value[at : at + width], self._order) for at in range(0, len(value), width)]

    def _count_entries(self, offset: int) -> int:
        """Read how many entries a directory announces."""
        return int.from_bytes(self._data[offset : offset + self._count_bytes], self._order)


def explain_tiff(tags: Mapping[int, Any]) -> str | None:
    """Describe why the pixels of a TIFF are not an ordinary picture and what to do; None if they are one."""
    problem = _find_thumbnail(tags) or _find_numbers(tags) or _find_colours(tags) or _find_layout(tags)
    return problem and f"a TIFF of {problem}"


def describe_tiff(tags: Mapping[int, Any]) -> str:
    """Describe the channels of a TIFF that Pillow cannot read."""
    bits, n_channels = _read_bits(tags)
    depth = " and ".join(f"{value:g}" for value in sorted(set(bits))[:4])
    compression, photometric = (read_numbers(tags, tag, default)[0] for tag, default in ((0x0103, 1), (0x0106, -1)))
    return (
        f"a TIFF of {n_channels:g} channel{'' if n_channels == 1 else 's'} of {depth} bits "
        f"(compression {compression:g}, photometric interpretation {photometric:g}), which cannot be read; "
        "save it as an ordinary TIFF, PNG or JPEG in grey or RGB"
    )


def read_numbers(tags: Mapping[int, Any], tag: int, *default: float) -> tuple[float, ...]:
    """Read the numbers of a tag; a broken file may hold anything there."""
    value = tags.get(tag, default)
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(number, (int, float, Rational)) and math.isfinite(number) for number in numbers):
        raise ImageError(f"the image is broken: expected numbers in tag {tag} of its TIFF header, found something else")
    return tuple(float(number) for number in numbers) or default


def _read_bits(tags: Mapping[int, Any]) -> tuple[tuple[float, ...], float]:
    """Read the bits of each channel, and the number of channels."""
    bits = read_numbers(tags, 0x0102, 1)
    return bits, read_numbers(tags, 0x0115, len(bits))[0]


def _find_thumbnail(tags: Mapping[int, Any]) -> str | None:
    """Detect a first page that is a reduced copy of another; raw files of cameras begin with one."""
    is_smaller = int(read_numbers(tags, 0x00FE, 0)[0]) & 1 or read_numbers(tags, 0x00FF, 0)[0] == 2
    if 0xC612 in tags:
        return "a camera's raw file (DNG); develop it to JPEG or TIFF"
    if is_smaller and (0x014A in tags or getattr(tags, "next", 0)):
        return "several pages whose first is a thumbnail, as in a camera's raw file; develop it to JPEG or one page"
    return None


def _find_numbers(tags: Mapping[int, Any]) -> str | None:
    """Detect samples whose range or sign has no defined meaning."""
    bits, n_channels = _read_bits(tags)
    formats = set(read_numbers(tags, 0x0153, 1))
    if kind := next((_FORMATS.get(int(code), "undefined numbers") for code in sorted(formats - {1, 2})), None):
        return f"{kind} of {max(bits):g} bits: the file does not say which number is white; {_ADVICE}"
    if max(bits) > 16:
        return f"integers of {max(bits):g} bits: the file does not say which number is white; {_ADVICE}"
    if 2 in formats and (len(formats) > 1 or n_channels > 1):
        return f"{n_channels:g} channels of signed numbers: the file does not say which number is black; {_ADVICE}"
    if len(set(bits)) > 1:
        return f"channels of different depths ({', '.join(f'{value:g}' for value in bits[:8])} bits); {_ADVICE}"
    return None


def _find_colours(tags: Mapping[int, Any]) -> str | None:
    """Detect colours for which Pillow has no mode."""
    photometric = int(read_numbers(tags, 0x0106, -1)[0])
    if photometric == -1 and read_numbers(tags, 0x0103, _UNCOMPRESSED)[0] != _OLD_JPEG:
        return f"samples without a photometric interpretation (is zero black or white?); {_ADVICE}"
    if photometric in _PHOTOMETRICS:
        return f"{_PHOTOMETRICS[photometric]}; {_ADVICE}"
    if photometric == _CMYK:
        largest = 2 ** _read_bits(tags)[0][0] - 1
        dots = read_numbers(tags, 0x0150, 0, largest)
        if read_numbers(tags, 0x014C, 1)[0] != 1 or dots[:2] != (0, largest):
            return f"inks other than cyan, magenta, yellow and black over their full range; {_ADVICE}"
    # Some writers put 8 bits where the standard wants 16.
    if photometric == _PALETTE and 0 < max(read_numbers(tags, 0x0140, 0)) < 256:
        return f"palette colours that are all but black (below 256 of 65,535); {_ADVICE}"
    return None


def _find_layout(tags: Mapping[int, Any]) -> str | None:
    """Detect layouts of samples that Pillow 13 decodes wrongly."""
    bits, n_channels = _read_bits(tags)
    photometric, is_planar = read_numbers(tags, 0x0106, -1)[0], read_numbers(tags, 0x011C, 1)[0] == 2
    if read_numbers(tags, 0x0103, _UNCOMPRESSED)[0] != _UNCOMPRESSED:
        if is_planar and n_channels == 4 and photometric == _RGB and not tags.get(0x0152):
            return f"compressed planes: the file does not say what the fourth means; {_ADVICE}"
        return None
    if is_planar and n_channels > 1 and (max(bits) != 8 or photometric not in (_RGB, _CMYK)):
        return f"uncompressed planes of {max(bits):g} bits; {_ADVICE}, with interleaved channels or compressed"
    if photometric == _YCBCR and n_channels == 3:
        coefficients = [round(value, 3) for value in read_numbers(tags, 0x0211, *_COEFFICIENTS)]
        references = read_numbers(tags, 0x0214, *_REFERENCES)
        if read_numbers(tags, 0x0212, 2, 2) != (1, 1) or coefficients != [*_COEFFICIENTS] or references != _REFERENCES:
            return f"uncompressed YCbCr with subsampled channels or a range other than JPEG's; {_ADVICE}"
    return None

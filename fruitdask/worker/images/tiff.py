"""TIFF: which pixels its header gives colours to, and which pages are but thumbnails (TIFF 6.0 and its supplements)."""

import math
from collections.abc import Mapping
from numbers import Rational
from typing import Any

from fruitdask.errors import ImageError

_ADVICE = "convert it to 8 or 16 bits a channel, in grey or RGB"
_UNCOMPRESSED, _OLD_JPEG = 1, 6
_RGB, _PALETTE, _CMYK, _YCBCR = 2, 3, 5, 6
#: Sample formats and photometric interpretations that are never colours of a range.
_FORMATS = {3: "floating-point numbers", 4: "undefined numbers", 5: "complex numbers", 6: "complex numbers"}
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
#: What else tells kinds of TIFFs apart: their names, tags and defaults.
_KINDS = (("compression", 0x0103, 1), ("photometric interpretation", 0x0106, -1))
#: What JPEG has: the shares of red, green and blue in luminance, and black and white of each channel.
_COEFFICIENTS = (0.299, 0.587, 0.114)
_REFERENCES = (0, 255, 128, 255, 128, 255)


def explain_tiff(tags: Mapping[int, Any]) -> str | None:
    """Say what keeps the pixels of a TIFF from being a picture, and what to do; None where they are one."""
    problem = _find_thumbnail(tags) or _find_numbers(tags) or _find_colours(tags) or _find_layout(tags)
    return problem and f"a TIFF of {problem}"


def describe_tiff(tags: Mapping[int, Any]) -> str:
    """Say what channels a TIFF has that Pillow cannot read."""
    bits, n_channels = _read_bits(tags)
    depth = " and ".join(f"{value:g}" for value in sorted(set(bits))[:4])
    kind = ", ".join(f"{name} {read_numbers(tags, tag, default)[0]:g}" for name, tag, default in _KINDS)
    return (
        f"a TIFF of {n_channels:g} channel{'' if n_channels == 1 else 's'} of {depth} bits ({kind}), which cannot be read; "
        "save it as an ordinary TIFF, PNG or JPEG in grey or RGB"
    )


def read_numbers(tags: Mapping[int, Any], tag: int, *default: float) -> tuple[float, ...]:
    """Read the numbers of a tag; a broken file may have anything there."""
    value = tags.get(tag, default)
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(number, (int, float, Rational)) and math.isfinite(number) for number in numbers):
        raise ImageError(f"the image is broken: expected numbers in tag {tag} of its TIFF, found something else")
    return tuple(float(number) for number in numbers) or default


def _read_bits(tags: Mapping[int, Any]) -> tuple[tuple[float, ...], float]:
    """Read the bits of each channel, and how many channels there are."""
    bits = read_numbers(tags, 0x0102, 1)
    return bits, read_numbers(tags, 0x0115, len(bits))[0]


def _find_thumbnail(tags: Mapping[int, Any]) -> str | None:
    """Find a first page that says that it is a smaller copy of another: cameras' raw files begin so."""
    is_smaller = int(read_numbers(tags, 0x00FE, 0)[0]) & 1 or read_numbers(tags, 0x00FF, 0)[0] == 2
    if 0xC612 in tags:
        return "a camera's raw file (DNG): develop it to JPEG or TIFF"
    if is_smaller and (0x014A in tags or getattr(tags, "next", 0)):
        return "a thumbnail before the picture proper, as cameras' raw files have it: develop it to JPEG or a TIFF of one page"
    return None


def _find_numbers(tags: Mapping[int, Any]) -> str | None:
    """Find samples whose range or order is not defined."""
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
    """Find colours that are not those of Pillow's modes."""
    photometric = int(read_numbers(tags, 0x0106, -1)[0])
    if photometric == -1 and read_numbers(tags, 0x0103, _UNCOMPRESSED)[0] != _OLD_JPEG:
        return f"samples of which the file does not say whether zero is black or white; {_ADVICE}"
    if photometric in _PHOTOMETRICS:
        return f"{_PHOTOMETRICS[photometric]}; {_ADVICE}"
    if photometric == _CMYK:
        largest = 2 ** _read_bits(tags)[0][0] - 1
        dots = read_numbers(tags, 0x0150, 0, largest)
        if read_numbers(tags, 0x014C, 1)[0] != 1 or dots[:2] != (0, largest):
            return f"inks that are not the whole range of cyan, magenta, yellow and black; {_ADVICE}"
    # Some writers put 8 bits where the standard wants 16.
    if photometric == _PALETTE and 0 < max(read_numbers(tags, 0x0140, 0)) < 256:
        return f"a palette that is all but black: its colours are below 256 of 65,535; {_ADVICE}"
    return None


def _find_layout(tags: Mapping[int, Any]) -> str | None:
    """Find samples that Pillow 13 puts together wrongly."""
    bits, n_channels = _read_bits(tags)
    photometric, is_planar = read_numbers(tags, 0x0106, -1)[0], read_numbers(tags, 0x011C, 1)[0] == 2
    if read_numbers(tags, 0x0103, _UNCOMPRESSED)[0] != _UNCOMPRESSED:
        if is_planar and n_channels == 4 and photometric == _RGB and not tags.get(0x0152):
            return f"compressed planes of which the file does not say what the fourth means; {_ADVICE}"
        return None
    if is_planar and n_channels > 1 and (max(bits) != 8 or photometric not in (_RGB, _CMYK)):
        return f"uncompressed planes of {max(bits):g} bits; {_ADVICE}, with interleaved channels or compressed"
    if photometric == _YCBCR and n_channels == 3:
        coefficients = [round(value, 3) for value in read_numbers(tags, 0x0211, *_COEFFICIENTS)]
        references = read_numbers(tags, 0x0214, *_REFERENCES)
        if read_numbers(tags, 0x0212, 2, 2) != (1, 1) or coefficients != [*_COEFFICIENTS] or references != _REFERENCES:
            return f"uncompressed YCbCr in coarser channels or of another range than JPEG's; {_ADVICE}"
    return None

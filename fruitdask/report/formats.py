"""Formats numbers, sizes and times for people."""

from datetime import UTC, datetime

_NARROW_SPACE = "\u202f"


def format_count(value: float) -> str:
    """Format a count.

    >>> format_count(12345)
    '12,345'
    """
    return f"{value:,.0f}"


def format_share(value: float | None) -> str:
    """Format a share in [0, 1] as a percentage.

    >>> [format_share(value).replace(" ", " ") for value in (0.98765, 0.9, 1, 0.99999, 0.00001, None)]
    ['98.8 %', '90 %', '100 %', '99.9 %', '0.1 %', '–']
    """
    if value is None:
        return "–"
    percentage = 100 * value
    # A share below 1 is never rounded to 100 %, nor one above 0 to 0 %.
    rounded = percentage if percentage in (0, 100) else min(max(percentage, 0.1), 99.9)
    return f"{rounded:.1f}".removesuffix(".0") + f"{_NARROW_SPACE}%"


def format_bytes(value: float | None) -> str:
    """Format a number of bytes.

    >>> [format_bytes(value).replace(" ", " ") for value in (12, 8_123, 25_600_000, None)]
    ['12 bytes', '8.1 kB', '26 MB', '–']
    """
    if value is None:
        return "–"
    if value < 1000:
        return f"{value:.0f}{_NARROW_SPACE}bytes"
    units = iter(("kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    value /= 1000
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.{0 if value >= 9.95 else 1}f}{_NARROW_SPACE}{unit}"


def format_seconds(value: float) -> str:
    """Format a duration.

    >>> [format_seconds(value).replace(" ", " ") for value in (0.04, 3.21, 59.7, 754, 7400)]
    ['0.04 s', '3.2 s', '60 s', '12 min 34 s', '2 h 3 min']
    """
    if value < 100:
        digits = 2 if value < 0.095 else 1 if value < 9.95 else 0
        return f"{value:.{digits}f}{_NARROW_SPACE}s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{_NARROW_SPACE}min {seconds}{_NARROW_SPACE}s"
    return f"{minutes // 60}{_NARROW_SPACE}h {minutes % 60}{_NARROW_SPACE}min"


def format_number(value: float | None) -> str:
    """Format a measure to three digits.

    >>> format_number(0.123456), format_number(12345.6), format_number(None)
    ('0.123', '12,346', '–')
    """
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_time(value: str) -> str:
    """Format a point in time.

    >>> format_time("2026-11-23T08:01:30+01:00")
    '23 November 2026, 07:01 UTC'
    """
    time = datetime.fromisoformat(value).astimezone(UTC)
    return f"{time.day} {time:%B %Y, %H:%M} UTC"

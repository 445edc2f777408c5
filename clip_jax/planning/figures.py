"""Formats bytes, seconds, flops and shares with a unit, and with enough digits that a small value is not shown as 0."""

import math
from collections.abc import Sequence

_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_FLOPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
_SPANS = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def format_number(value: float, decimals: int = 0) -> str:
    """With thousands separators and ``decimals`` decimals, or more if fewer than two significant digits are left."""
    if value and abs(value) < 10 ** (1 - decimals):
        decimals = max(decimals, 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _in_units(value: float, units: Sequence[tuple[float, str]], least: float, decimals: int) -> str:
    """In the first unit in which the value is at least ``least``, or in the last."""
    size, unit = next((one for one in units if abs(value) >= least * one[0]), units[-1])
    return f"{format_number(value / size, decimals)} {unit}" if value else f"0 {units[0][1]}"


def format_bytes(value: float) -> str:
    """``12.46 GiB``, ``18.41 MiB``, ``96 B``."""
    return _in_units(value, _BYTES, 0.1, 2) if value >= 2**10 else f"{value:,.0f} B"


def format_seconds(value: float) -> str:
    """``0.914 s``, ``14.86 ms``, ``3.20 us``."""
    return _in_units(value, _SECONDS, 0.1, 3 if abs(value) >= 0.1 else 2)


def format_span(value: float) -> str:
    """The time of a whole run, from seconds: ``4.13 days``, ``3.10 seconds``."""
    return _in_units(value, _SPANS, 1, 2)


def format_flops(value: float) -> str:
    """``64.789 T``, ``310.250 M``."""
    return _in_units(value, _FLOPS, 1, 3)


def format_share(part: float, whole: float) -> str:
    """In percent: ``36.0%``, ``0.028%``; ``-`` if ``whole`` is 0."""
    return f"{format_number(100 * part / whole, 1)}%" if whole else "-"

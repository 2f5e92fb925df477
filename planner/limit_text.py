"""Bounds of the unified planner in words; values that would do are told as they are typed, rounded up so that they do."""

from __future__ import annotations

import math

from attnspan.planner.cost import format_bytes

__all__ = ["OPTION", "enough", "more", "name", "show"]

OPTION = {
    "gpu_kv": "--gpu-kv", "cpu_kv": "--cpu-kv", "kv": "--kv", "read": "--read", "milliseconds": "--ms-per-token",
}  # fmt: skip


def name(kind: str, n: int) -> str:
    """What is bounded."""
    words = {
        "gpu_kv": "bytes on the GPU", "cpu_kv": "bytes on the CPU", "kv": "bytes", "read": "share of dense bytes read",
        "milliseconds": "milliseconds",
    }  # fmt: skip
    return f"{words[kind]} at {n} tokens"


def show(kind: str, value: float) -> str:
    """A bound, rounded to the nearest."""
    if kind == "read":
        return f"{value:.2%}"
    return f"{value:.4g} ms" if kind == "milliseconds" else format_bytes(round(value))


def enough(kind: str, value: float) -> str:
    """A value of the bound's option that is at least this."""
    if kind == "read":
        return f"{_up(100 * value, 2)}%"
    if kind == "milliseconds":
        return _up(value, 0 if value <= 0 else max(0, 3 - math.floor(math.log10(value))))
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return _up(value, 0 if unit == "B" or value >= 100 else 1 if value >= 10 else 2) + unit


def more(least: float, bound: float) -> str:
    """By how much a bound would have to rise."""
    return f"{_up(100 * (least / bound - 1), 1)}% more" if bound > 0 else "more than nothing"


def _up(value: float, digits: int) -> str:
    # A product that rounding lifts above a whole number must not cost a digit; bounds have more slack than this.
    return f"{math.ceil(value * 10**digits * (1 - 1e-12)) / 10**digits:.{digits}f}"

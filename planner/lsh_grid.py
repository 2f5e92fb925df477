"""The ways of sampling that a planner may give to a head."""

from __future__ import annotations

from collections.abc import Iterable

from attnspan.planner.errors import UserError
from attnspan.planner.rules import LSH_INDEXES, LshParams

__all__ = ["FRACTIONS", "INDEXES", "WINDOWS", "dense_below", "lsh_grid"]

FRACTIONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Of sketches."""
HAMMING = {64: (18, 21, 24), 128: (44, 48, 52), 256: (95, 101)}
"""Thresholds by bits of a signature: on a real model's keys the last draws some 5 to 10 % of them."""
TABLES = {"bits": 10, "tables": 150, "min_collisions": 2}
"""MagicPIG's own."""
WINDOWS = (64, 256)
"""Recent tokens that are exact."""
INDEXES = ("sketch", "signature", "tables")
DENSE_BELOW = {"sketch": 2048, "signature": 2048, "tables": 4096}
"""Tokens below which LshAttention attends to everything, as `dense_below` -1 says."""


def lsh_grid(
    indexes: Iterable[str] = INDEXES, fractions: Iterable[float] = FRACTIONS, windows: Iterable[int] = WINDOWS
) -> tuple[LshParams, ...]:
    """Parameters to try: sketches of these fractions, signatures, tables, each with these windows. UserError on unknown kinds."""
    indexes, fractions, windows = tuple(indexes), tuple(fractions), tuple(windows)
    wrong = [name for name in indexes if name not in INDEXES]
    if wrong:
        known = ", ".join(name for name in LSH_INDEXES if name in INDEXES)
        raise UserError(f"lsh index is {wrong[0]!r}: must be one of {known}; change --index")
    out: list[LshParams] = []
    for window in windows:
        if "sketch" in indexes:
            out += [LshParams("sketch", window, fraction=fraction) for fraction in fractions]
        if "signature" in indexes:
            pairs = [(bits, most) for bits, all_ in HAMMING.items() for most in all_]
            out += [LshParams("signature", window, signature_bits=bits, max_hamming=most) for bits, most in pairs]
        if "tables" in indexes:
            out.append(LshParams("tables", window, **TABLES))
    return tuple(out)


def dense_below(params: LshParams) -> int:
    """Length in tokens below which a step is exact, whatever is sampled."""
    return DENSE_BELOW.get(params.index, 0)

"""Rules of one KV head: how many tokens it keeps as a function of the sequence length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError

SINK = 64
"""First tokens of a sequence that every head always keeps, in tokens; part of the span."""
BLOCK = 64
"""Spans are rounded up to a multiple of this many tokens."""
MIN_SPAN = 128
"""Smallest span of any rule, in tokens, sinks included."""
MODES = ("span", "dense", "lsh")
LSH_INDEXES = ("sketch", "signature", "tables", "exact")
SIGNATURE_BITS = (64, 128, 256)
FRACTION = 0.02
"""Share of the indexed tokens that index `sketch` draws, unless the plan says another."""
MAX_FRACTION = 0.5
SKETCH_ROUNDS = 4
"""Times that a key is turned before it is cut to levels, each with signs of its own."""


def span_tokens(alpha: npt.ArrayLike, beta: npt.ArrayLike, n: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Span in force at sequence length n: S(n) = max(128, 64 * ceil(min(alpha + beta*n, n) / 64)).

    alpha in tokens, beta and n without a unit and in tokens; the three broadcast, the result has the
    broadcast shape. Sinks are inside the span. S exceeds n by up to 63 tokens (up to 128 below 128 tokens).
    Source: MoA (arXiv 2406.14909), equation 2 with the rounding of its run time.
    """
    length = np.asarray(n, dtype=np.float64)
    wanted = np.minimum(np.asarray(alpha, np.float64) + np.asarray(beta, np.float64) * length, length)
    return np.asarray(np.maximum(MIN_SPAN, BLOCK * np.ceil(wanted / BLOCK)), dtype=np.int32)


def check_int(name: str, value: object, low: int, high: int, fix: str = "") -> int:
    """Return value when it is an integer (bool is none) in [low, high]; UserError naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise UserError(f"{name} is {value!r}: must be an integer from {low} to {high}{fix}")
    return int(value)


def check_number(name: str, value: object, low: float, high: float, fix: str = "") -> float:
    """Return value as a float when it is a finite number in [low, high]; UserError naming it otherwise."""
    good = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not good or not low <= value <= high or not math.isfinite(value):  # type: ignore[operator,arg-type]
        raise UserError(f"{name} is {value!r}: must be a number from {low:g} to {high:g}{fix}")
    return float(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LshParams:
    """Index of a sampled head: sinks and the last `window` tokens exact, the rest drawn at random.

    index `sketch`: keys are turned at random and kept as two bits a dimension; a key is drawn with a probability that
    grows with the score which these promise, so that about `fraction` of them is drawn. index `tables`: `bits` per
    hash and `tables` hash tables, a key is drawn when it collides in at least `min_collisions` of them (MagicPIG,
    arXiv 2410.16179). index `signature`: a key is drawn when its packed SimHash of `signature_bits` is within
    `max_hamming` of the query's. index `exact`: everything (an oracle). `seed` decides the rotation, or the random
    matrix that hashes are signs of products with. A drawn key weighs as the inverse of its probability;
    `min_inclusion` is the least probability that hashes use for that (0: the unbiased estimator). `guard`: where the
    standard error of the sum of weights, estimated from the draw, is above this share of it, the step is exact (0: never).
    """

    index: str
    window: int
    bits: int | None = None
    tables: int | None = None
    min_collisions: int | None = None
    signature_bits: int | None = None
    max_hamming: int | None = None
    seed: int = 0
    min_inclusion: float = 0.0
    fraction: float | None = None
    guard: float = 0.0

    def __post_init__(self) -> None:
        if self.index not in LSH_INDEXES:
            raise UserError(f"lsh index is {self.index!r}: must be one of {', '.join(LSH_INDEXES)}; change --index")
        check_int("lsh window", self.window, 1, 2**30, "; change --window")
        check_int("lsh seed", self.seed, 0, 2**63 - 1, "; change --seed")
        least = check_number("lsh min_inclusion", self.min_inclusion, 0.0, 1.0, "; change --min-inclusion")
        object.__setattr__(self, "min_inclusion", least)
        object.__setattr__(self, "guard", check_number("lsh guard", self.guard, 0.0, 1.0, "; change --guard"))
        self._check_sketch()
        if self.index == "exact":
            for name in ("min_inclusion", "guard"):
                if getattr(self, name) > 0:
                    raise self._not_taken(name)
        wanted: dict[str, tuple[int, int]] = {}
        if self.index == "tables":
            tables = check_int("lsh tables", self.tables, 1, 1024, "; change --tables")
            wanted = {"bits": (1, 15), "tables": (1, 1024), "min_collisions": (1, min(4, tables))}
        elif self.index == "signature":
            if isinstance(self.signature_bits, bool) or self.signature_bits not in SIGNATURE_BITS:
                raise UserError(f"lsh signature_bits is {self.signature_bits!r}: must be 64, 128 or 256; change --signature-bits")
            wanted = {"signature_bits": (64, 256), "max_hamming": (0, self.signature_bits)}
        for name in ("bits", "tables", "min_collisions", "signature_bits", "max_hamming"):
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if name in wanted:
                check_int(f"lsh {name}", value, *wanted[name], f"; change {option}")
            elif value is not None:
                raise self._not_taken(name)

    def _check_sketch(self) -> None:
        """`fraction` belongs to index `sketch`, min_inclusion to the others."""
        if self.index != "sketch":
            if self.fraction is not None:
                raise self._not_taken("fraction")
            return
        if self.min_inclusion > 0:
            raise self._not_taken("min_inclusion")
        share = FRACTION if self.fraction is None else self.fraction
        share = check_number("lsh fraction", share, 0.0, MAX_FRACTION, "; change --fraction")
        if not np.float32(share) > 0:  # models hold it in fp32
            raise UserError(f"lsh fraction is {share!r}: must be above 0 and at most {MAX_FRACTION:g}; change --fraction")
        object.__setattr__(self, "fraction", share)

    def _not_taken(self, name: str) -> UserError:
        return UserError(
            f"lsh {name} is {getattr(self, name)!r}: index {self.index!r} does not take it; "
            f"remove --{name.replace('_', '-')}, or change --index"
        )

    @property
    def columns(self) -> int:
        """Columns of the input `projection`: bits that a key is hashed to, or rounds of signs of a sketch."""
        widths = {"tables": (self.bits or 0) * (self.tables or 0), "signature": self.signature_bits or 0}
        return (widths | {"sketch": SKETCH_ROUNDS}).get(self.index, 0)


@dataclass(frozen=True)
class HeadRule:
    """What one KV head keeps: `span` (alpha in tokens, beta in [0, 1]), `dense`, or `lsh` with its index.

    dense and lsh heads keep every token: alpha 0, beta 1. UserError on any other value.
    """

    mode: str = "span"
    alpha: float = 0.0
    beta: float = 1.0
    lsh: LshParams | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode is {self.mode!r}: must be one of {', '.join(MODES)}")
        # 2^30 tokens bounds every length, so that spans fit int32.
        object.__setattr__(self, "alpha", check_number("alpha", self.alpha, -(2.0**30), 2.0**30))
        object.__setattr__(self, "beta", check_number("beta", self.beta, 0.0, 1.0))
        if self.mode != "span" and (self.alpha, self.beta) != (0.0, 1.0):
            raise UserError(f"alpha {self.alpha:g}, beta {self.beta:g}: a head of mode {self.mode!r} has alpha 0, beta 1")
        if (self.lsh is None) == (self.mode == "lsh"):
            raise UserError(f"lsh is {self.lsh!r}: must be given for mode 'lsh' only; mode is {self.mode!r}")

    def span(self, n: int) -> int:
        """Tokens this head keeps of a sequence of n tokens."""
        return int(span_tokens(self.alpha, self.beta, n))

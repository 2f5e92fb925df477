"""Rule grids: the rules that the optimiser may give to a head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from attnspan.planner.errors import UserError
from attnspan.planner.plan import MAX_TOKENS
from attnspan.planner.rules import BLOCK, MIN_SPAN, HeadRule, check_int, check_number, span_tokens

FULL = HeadRule("span", 0.0, 1.0)
"""The rule that keeps every token; in every grid. Its mode is `span`, so that it shares a node with the rest of its layer."""


def rule_grid(alphas: Iterable[float], betas: Iterable[float], lengths: Iterable[int]) -> tuple[HeadRule, ...]:
    """All rules of alpha (tokens) and beta in [0, 1] that are of use at the given lengths, and the full span.

    A pair is kept if alpha + beta*N is above 0 at the shortest length and at most N at the two longest, where a larger value
    would only be cut to N. Of rules whose spans agree at all lengths the one with the smallest |alpha| stays: it scales best
    beyond them. Give the profiled lengths and n_max. Sorted by span at the longest length. Source: the filter of MoA's search.
    """
    ordered = check_lengths(lengths)
    longest = ordered[-2:]
    alphas = [check_number("alpha", a, -MAX_TOKENS, MAX_TOKENS) for a in alphas]
    betas = [check_number("beta", b, 0.0, 1.0) for b in betas]
    pairs = [
        (alpha, beta)
        for alpha in alphas
        for beta in betas
        if alpha + beta * ordered[0] > 0 and all(alpha + beta * n <= n for n in longest)
    ]
    best: dict[tuple[int, ...], tuple[float, float]] = {}
    for alpha, beta in [(FULL.alpha, FULL.beta), *sorted(pairs, key=lambda pair: (abs(pair[0]), pair))]:
        spans = tuple(np.minimum(span_tokens(alpha, beta, ordered), ordered).tolist())
        best.setdefault(spans, (alpha, beta))
    return tuple(HeadRule("span", *best[spans]) for spans in sorted(best, key=lambda spans: spans[::-1]))


def reference_grid() -> tuple[HeadRule, ...]:
    """The 48 rules of the MoA reference code: alphas every 1024 tokens, betas every 1/8, filtered at 2k, 8k and 16k."""
    alphas = range(-2048, 8192 + 1, 1024)
    return rule_grid(alphas, [k / 8 for k in range(9)], (2048, 8192, 16384))


def fine_grid(lengths: Iterable[int]) -> tuple[HeadRule, ...]:
    """Rules for contexts too short for the reference's steps of 1024 tokens: alphas double from 128, betas every 1/16.

    Also 0 and minus half the shortest length for alpha: rules that are near-sighted in short texts and wide in long ones.
    Holds the smallest span (alpha 128, beta 0) and the full one; 94 rules for 2k, 4k and 8k.
    """
    ordered = check_lengths(lengths)
    alphas = [0.0, -float(ordered[0] // 2)]
    alphas += [float(MIN_SPAN * 2**k) for k in range(24) if MIN_SPAN * 2**k <= ordered[-1]]
    return rule_grid(alphas, [k / 16 for k in range(17)], ordered)


def check_lengths(lengths: Iterable[int]) -> Sequence[int]:
    """The lengths, sorted and without repeats; UserError unless each is a number of tokens from 128 on."""
    ordered = sorted({check_int("length", n, MIN_SPAN, MAX_TOKENS) for n in lengths})
    if not ordered:
        raise UserError("no length is given: a grid and its losses need at least one; change --lengths")
    return ordered


def check_profiled(n: object) -> int:
    """Return n when it is a length that can be profiled: a multiple of 64 from 128 on; UserError otherwise."""
    length = check_int("profiled length", n, MIN_SPAN, MAX_TOKENS, "; change --lengths")
    if length % BLOCK:
        raise UserError(f"profiled length is {length}: must be a multiple of {BLOCK}; change --lengths")
    return length

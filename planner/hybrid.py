"""Caches of target `hybrid`: what sampled heads see exactly lies in rings of its own, beside the caches that hold every token.

The rings can be on a GPU, with an attention of their own; the whole caches and their indexes are in host memory.
"""

from __future__ import annotations

import dataclasses

from attnspan.planner.parts import Part, plan_parts
from attnspan.planner.plan import Plan
from attnspan.planner.rules import SINK, span_tokens

__all__ = ["hybrid_parts", "near_part"]


def near_part(part: Part, n_max: int) -> Part:
    """The sinks and the window of a sampled part, as an op with rings: a span of that many tokens, rounded as all spans are."""
    assert part.lsh is not None
    slots = int(span_tokens(SINK + part.lsh.window, 0.0, n_max))
    return dataclasses.replace(
        part, name=f"{part.name}.near", capacity=(slots,) * len(part.heads), lsh=None, max_hamming=None
    )  # fmt: skip


def hybrid_parts(plan: Plan) -> list[Part]:
    """The parts of all layers; a sampled one follows the near one that belongs to it."""
    found = []
    for part in plan_parts(plan):
        if part.lsh is not None:
            found.append(near_part(part, plan.n_max))
        found.append(part)
    return found

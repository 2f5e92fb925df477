"""Caches of target `portable`: one ring for all heads of a layer that share a rule, with room for a chunk of new tokens.

A chunk is written first and attends then, so its first token must still find its whole window after its last one is written:
a ring of that many slots more. It is written in one piece, so that no chunk may cross the ring's end: rings are as long as a
whole number of chunks, and whoever calls the model cuts texts where the ring may end (`chunks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnspan.planner.parts import Part, refuse_sampled
from attnspan.planner.plan import Plan
from attnspan.planner.rules import check_int

__all__ = ["DEFAULT_CHUNK", "RingPart", "chunks", "portable_parts"]

DEFAULT_CHUNK = 256
"""Most tokens of a chunk: fewer cost speed in prefill, more cost slots."""
MAX_CHUNK = 2**20


@dataclass(frozen=True)
class RingPart(Part):
    """KV heads of one layer with one rule, in caches of their own, [batch, heads, slots of a head, head_dim].

    capacity: slots of each head, all the same: those of the rule, and room for a chunk.
    """

    @property
    def op(self) -> str:
        """Name of the standard op."""
        return "Attention"

    def cache_shape(self, head_dim: int) -> tuple[int, ...]:
        """Shape of the key or value cache of one row."""
        return (len(self.heads), self.capacity[0], head_dim)

    def describe(self, head_dim: int) -> dict[str, Any]:
        """The part as attnspan.json has it."""
        return super().describe(head_dim) | {"cache_shape": list(self.cache_shape(head_dim))}


def portable_parts(plan: Plan, chunk: int) -> list[RingPart]:
    """The parts of all layers, those of a layer in the order of their first heads; `chunk`: most tokens of a call.

    UserError for heads that sample, or a chunk out of range.
    """
    refuse_sampled(
        plan,
        "target 'portable' takes 'span' and 'dense', as standard ONNX cannot sample; change --plan, or export with --target cpu",
    )
    chunk = check_int("chunk", chunk, 1, MAX_CHUNK, "; change --chunk")
    parts = []
    capacity = plan.capacities()
    for i, rules in enumerate(plan.rules):
        groups: dict[tuple[float, float], list[int]] = {}
        for head, rule in enumerate(rules):
            groups.setdefault((rule.alpha, rule.beta), []).append(head)
        for number, heads in enumerate(groups.values()):
            slots = _slots(plan, int(capacity[i, heads[0]]) - plan.sinks[i], chunk)
            name = f"{i}.{number}" if number else f"{i}"
            parts.append(RingPart(i, name, tuple(heads), (slots,) * len(heads), sink=plan.sinks[i]))
    return parts


def chunks(length: int, total: int, most: int, ring: int, sink: int) -> list[tuple[int, int]]:
    """Where the chunks of `total` new tokens of a row begin and end, when the row holds `length` tokens.

    most: tokens of a chunk; ring: the artefact's chunk, at whose multiples (from the sinks on) rings may end, and which no
    chunk exceeds.
    """
    found = []
    start = 0
    while start < total:
        past_sinks = length + start - sink
        to_ring_end = ring - (past_sinks % ring if past_sinks > 0 else past_sinks)
        end = min(total, start + min(most, ring, to_ring_end))
        found.append((start, end))
        start = end
    return found


def _slots(plan: Plan, window: int, chunk: int) -> int:
    """Slots of a head: sinks and a ring of whole chunks, or the longest text where that is less and nothing is overwritten.

    A layer that keeps no sinks has their slots all the same: all rings of a model end at the same positions.
    """
    return min(plan.n_max, plan.sink + chunk * -(-(window + chunk - 1) // chunk))

"""How the KV heads of a layer are grouped into attention ops: what the exporter writes and the runtimes bind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnspan.planner.errors import UserError
from attnspan.planner.lsh import state_bytes
from attnspan.planner.plan import Plan
from attnspan.planner.rules import SINK, LshParams
from attnspan.planner.shape import ModelShape

__all__ = ["Part", "identity", "layer_parts", "plan_parts", "refuse_sampled"]


@dataclass(frozen=True)
class Part:
    """KV heads of one layer that one op serves, with caches and, for `LshAttention`, a state of their own.

    heads: KV heads of the model, ascending. capacity: their slots, in tokens. name: the layer's number, for the second and
    later parts of a layer followed by what tells them apart; the tensors are `key.{name}` and `value.{name}`, or `kv.{name}`
    and `state.{name}`. lsh: parameters that the heads share; max_hamming: of each head, for index `signature`. sink: first
    tokens that are always kept; 0 in a layer with a window.
    """

    layer: int
    name: str
    heads: tuple[int, ...]
    capacity: tuple[int, ...]
    lsh: LshParams | None = None
    max_hamming: tuple[int, ...] | None = None
    sink: int = SINK

    @property
    def op(self) -> str:
        """Name of the op in domain `attnspan`."""
        return "SpanAttention" if self.lsh is None else "LshAttention"

    @property
    def slots(self) -> int:
        """Cache slots of a row: all capacities."""
        return sum(self.capacity)

    @property
    def caches(self) -> tuple[str, ...]:
        """Kinds of caches: keys and values, of sampled heads each value behind its key."""
        return ("key", "value") if self.lsh is None else ("kv",)

    def cache_shape(self, head_dim: int) -> tuple[int, ...]:
        """Shape of each of the `caches` of one row: the heads one after another."""
        return (self.slots, head_dim * 2 // len(self.caches))

    def state_bytes(self, head_dim: int) -> int:
        """Bytes of the index of one row; 0 for an op without one."""
        return 0 if self.lsh is None else state_bytes(self.lsh, len(self.heads), head_dim, self.capacity[0])

    def describe(self, head_dim: int) -> dict[str, Any]:
        """The part as attnspan.json has it; past_ and present_ stand before `key`, `value`, `kv` and `state` in the graph."""
        entry = {
            "layer": self.layer,
            "op": self.op,
            "kv_heads": list(self.heads),
            "capacity": list(self.capacity),
        } | {kind: f"{kind}.{self.name}" for kind in self.caches}
        if self.sink != SINK:
            entry["sink"] = self.sink
        if self.lsh is not None:
            entry |= {"state": f"state.{self.name}", "state_bytes": self.state_bytes(head_dim)}
        return entry


def layer_parts(plan: Plan, layer: int) -> list[Part]:
    """The parts of a layer: span and dense heads, then sampled heads, those with equal parameters but max_hamming together."""
    capacity = plan.capacities()[layer].tolist()
    groups: dict[LshParams | None, list[int]] = {None: []}
    for head, rule in enumerate(plan.rules[layer]):
        # Heads of one op may differ in max_hamming: 0 stands for any.
        shared = rule.lsh and (dataclasses.replace(rule.lsh, max_hamming=0) if rule.lsh.index == "signature" else rule.lsh)
        groups.setdefault(shared, []).append(head)
    parts: list[Part] = []
    for number, (shared, heads) in enumerate(groups.items()):
        if not heads:
            continue
        # The names end in .lsh, .lsh2, ...; whichever part comes first has the layer's number alone.
        name = f"{layer}.lsh{number if number > 1 else ''}" if parts else f"{layer}"
        signature = shared is not None and shared.index == "signature"
        bounds = tuple(_bound(plan, layer, head) for head in heads) if signature else None
        parts.append(Part(layer, name, tuple(heads), tuple(capacity[head] for head in heads), shared, bounds, plan.sinks[layer]))
    return parts


def plan_parts(plan: Plan) -> list[Part]:
    """The parts of all layers, in order."""
    return [part for layer in range(plan.model.layers) for part in layer_parts(plan, layer)]


def _bound(plan: Plan, layer: int, head: int) -> int:
    lsh = plan.rules[layer][head].lsh
    assert lsh is not None
    assert lsh.max_hamming is not None
    return lsh.max_hamming


def identity(part: Part, shape: ModelShape, n_max: int) -> int:
    """63 bits that differ between indexes that must not be taken for each other: of another model, layer, heads or hash.

    What may change under an index (window, fraction, max_hamming, min_collisions, min_inclusion) does not enter.
    """
    assert part.lsh is not None
    kept = ("index", "bits", "tables", "signature_bits", "seed")
    content: Mapping[str, Any] = {
        "model": [shape.id, shape.config_hash],
        "layer": part.layer,
        "heads": part.heads,
        "n_max": n_max,
        "lsh": {name: getattr(part.lsh, name) for name in kept},
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def refuse_sampled(plan: Plan, reason: str) -> None:
    """UserError that names the first sampled head, if there is one; `reason`: why not, and the option to change."""
    for i, layer in enumerate(plan.rules):
        for head, rule in enumerate(layer):
            if rule.lsh is not None:
                raise UserError(f"KV head {head} of layer {i} has mode 'lsh': {reason}")

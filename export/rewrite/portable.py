"""Target `portable`: standard ONNX (opset 24) only; the heads of a layer that share a rule are one TensorScatter and Attention.

Inputs and outputs as of `Rewriter`, with `past_key.{name}`, `past_value.{name}` [batch, heads, slots, head_dim] for each part
(`planner/portable.py`). A chunk is written to the rings, then attends to them under a mask that the graph computes from `length`
and `span`; the span of a part is that of its first head. Right for chunks that `planner.portable.chunks` cuts: of at most `chunk`
tokens, none of which crosses the end of a ring.

TensorRT takes the graph without a plugin: it wants an Attention of one output, an explicit mask, caches that are an input and an
output of the graph, and a linear write.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from attnspan.export.graph import value
from attnspan.export.rewrite.rewriter import INT32, INT64, Rewriter
from attnspan.planner.plan import Plan
from attnspan.planner.portable import RingPart, portable_parts

NEVER = np.array(2**30, np.int32)
"""A position that no token has (planner.plan.MAX_TOKENS)."""


def rewrite_portable(model: ir.Model, plan: Plan, cache_dtype: ir.DataType, chunk: int) -> None:
    """Turn a normal form into the `portable` form, in place; `chunk`: most tokens of a call.

    ValueError when the graph is not a normal form with one attention per layer of the plan. UserError for heads that sample.
    """
    _Portable(plan, cache_dtype, chunk).rewrite(model)


def _int32(x: npt.ArrayLike) -> npt.NDArray[np.int32]:
    return np.asarray(x, np.int32)


class _Portable(Rewriter):
    """Records the attentions of a model; what depends on the length of rings alone, once for each length."""

    def __init__(self, plan: Plan, cache_dtype: ir.DataType, chunk: int) -> None:
        super().__init__(plan, cache_dtype, "portable")
        self.parts: dict[int, list[RingPart]] = {}
        for part in portable_parts(plan, chunk):
            self.parts.setdefault(part.layer, []).append(part)
        self.writes: dict[int, ir.Value] = {}
        self.rings: dict[tuple[int, int], tuple[ir.Value, ir.Value]] = {}

    def prepare(self, position: ir.Value) -> None:
        """What all layers use: positions of queries and the first one that each head sees beside the sinks."""
        rows = self.op("Cast", position, to=INT32)
        self.query = self.op("Unsqueeze", rows, [1, 3])  # [batch, 1, tokens, 1]
        self.last = self.op("ReduceMax", rows, [1], keepdims=1)  # [batch, 1]
        # A span over the capacity would see what the slack for chunks happens to hold.
        span = self.op("Min", self.span, _int32(self.plan.capacities())[:, None])
        sinks = _int32(self.plan.sinks)[:, None, None]
        window = self.op("Max", self.op("Sub", span, sinks), _int32(1))
        by_head = self.op("Reshape", self.op("Transpose", window, perm=[0, 2, 1]), [self.plan.model.layers * self.heads, -1])
        # [layers * kv_heads, batch, 1, tokens, 1]: the last position that is out of sight.
        self.unseen = self.op("Sub", self.query, self.op("Unsqueeze", by_head, [2, 3, 4]))

    @property
    def heads(self) -> int:
        """KV heads of a layer."""
        return self.plan.model.kv_heads

    def layer(self, i: int, old: ir.Node) -> ir.Value:
        """The output of layer i, of parts that take query, key and value from the attention `old`."""
        parts, group, dim = self.parts[i], self.plan.model.group, old.inputs[4].shape[-1]
        counts = (self.plan.model.heads, self.heads, self.heads)
        by_head = [self.op("Reshape", x, [0, 0, heads, dim]) for x, heads in zip(old.inputs[:3], counts, strict=True)]
        split = [self.op("Transpose", x, perm=[0, 2, 1, 3]) for x in by_head]
        outputs, order = [], []
        for part in parts:
            queries = [head * group + j for head in part.heads for j in range(group)]
            some = split
            if len(parts) > 1:
                chosen = (queries, list(part.heads), list(part.heads))
                some = [self.op("Gather", x, heads, axis=1) for x, heads in zip(split, chosen, strict=True)]
            outputs.append(self.part(part, old, some))
            order += queries
        joined = self.op("Concat", *outputs, axis=1) if len(parts) > 1 else outputs[0]
        if order != sorted(order):
            joined = self.op("Gather", joined, np.argsort(order).tolist(), axis=1)
        whole = value(old.outputs[0].name, old.outputs[0].dtype, old.outputs[0].shape)
        flat = [0, 0, self.plan.model.heads * dim]
        return self.op("Reshape", self.op("Transpose", joined, perm=[0, 2, 1, 3]), flat, output=whole)

    def part(self, part: RingPart, old: ir.Node, inputs: Sequence[ir.Value]) -> ir.Value:
        """Attention of one part, [batch, query heads, tokens, dim], from query, key and value of that form."""
        dim = old.inputs[4].shape[-1]
        names = [f"{kind}.{part.name}" for kind in ("key", "value")]
        pasts, presents = self.caches({name: (self.cache_dtype, ["batch", *part.cache_shape(dim)]) for name in names})
        slots = part.capacity[0]
        widen = self.cache_dtype != old.inputs[0].dtype
        seen = []
        for new, past, present in zip(inputs[1:], pasts, presents, strict=True):
            stored = self.op("Cast", new, to=self.cache_dtype) if widen else new
            self.op("TensorScatter", past, stored, self.write_index(slots), output=present, axis=2, mode="linear")
            seen.append(self.op("Cast", present, to=old.inputs[0].dtype) if widen else present)
        given = {name: old.attributes[name].as_float() for name in ("scale", "softcap") if name in old.attributes}
        name = f"layers.{part.name}.attention"
        return self.node("Attention", [inputs[0], *seen, self.mask(part, slots)], [ir.Value()], given, name=name).outputs[0]

    def mask(self, part: RingPart, slots: int) -> ir.Value:
        """Which slots the queries of a part see, bool [batch, 1, tokens, slots]."""
        causal, near = self.ring(slots, part.sink)
        unseen = self.op("Gather", self.unseen, np.array(part.layer * self.heads + part.heads[0]), axis=0)
        return self.op("And", causal, self.op("Greater", near, unseen))

    def ring(self, slots: int, sink: int) -> tuple[ir.Value, ir.Value]:
        """Of a ring: which slots hold something that a query may see, bool [batch, 1, tokens, slots], and their positions.

        Positions are int32, [batch, 1, 1, slots] or [slots]; those of sinks are `NEVER`, later than any window begins.
        """
        if (slots, sink) in self.rings:
            return self.rings[slots, sink]
        index, front = np.arange(slots, dtype=np.int32), self.plan.sink
        kept = index < sink
        if slots == self.plan.n_max:  # never wraps
            at: ir.Value | np.ndarray = index
            near = self.constant(np.where(kept, NEVER, index))
        else:
            # The last position that falls into each slot; not written yet when it is before the ring's first.
            ring = slots - front
            turns = ring * -(-slots // ring)  # keeps the dividend positive, whichever way a runtime rounds
            back = self.op("Mod", self.op("Add", self.last, turns - index), _int32(ring))
            held = self.op("Sub", self.last, back)
            written = self.op("GreaterOrEqual", held, _int32(front))
            known = self.op("Where", index < front, index, self.op("Where", written, held, NEVER))
            at = self.op("Unsqueeze", known, [1, 2])
            near = self.op("Unsqueeze", self.op("Where", kept, NEVER, known), [1, 2])
        self.rings[slots, sink] = self.op("LessOrEqual", at, self.query), near
        return self.rings[slots, sink]

    def write_index(self, slots: int) -> ir.Value:
        """The slot of each row's first new token, int64 [batch]."""
        if slots not in self.writes:
            sink, ring = self.plan.sink, slots - self.plan.sink
            index = self.length
            if slots != self.plan.n_max:
                turns = ring * -(-sink // ring)
                past_sinks = self.op("Mod", self.op("Add", self.length, _int32(turns - sink)), _int32(ring))
                in_ring = self.op("Add", past_sinks, _int32(sink))
                index = self.op("Where", self.op("Less", self.length, _int32(sink)), self.length, in_ring)
            self.writes[slots] = self.op("Cast", index, to=INT64)
        return self.writes[slots]

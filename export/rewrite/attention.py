"""The attentions of a normal form as ops of ours: SpanAttention over ring caches, LshAttention over whole ones, or both.

What the targets with these ops share. Inputs and outputs as of `Rewriter`, with, for each part of a layer (see
`planner/parts.py`; its name is the layer's number where a layer has one part), `past_key.{name}`, `past_value.{name}` [batch,
slots of the part, head_dim] in the cache's type, or for sampled heads `past_kv.{name}` [batch, slots, 2 * head_dim] and
`past_state.{name}` [batch, bytes] uint8.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from attnspan.export.graph import value
from attnspan.export.ops import DOMAIN, VERSION
from attnspan.export.rewrite.heads import join, pick
from attnspan.export.rewrite.rewriter import Rewriter
from attnspan.planner.lsh import projection_of
from attnspan.planner.parts import Part, identity, layer_parts
from attnspan.planner.plan import Plan
from attnspan.planner.shape import ModelShape


def replace_attentions(model: ir.Model, plan: Plan, cache_dtype: ir.DataType, shape: ModelShape | None, name: str) -> None:
    """Rewrite the attentions, in place, and call the graph `name`.

    shape: the model, as indexes remember it (default: the plan's).
    ValueError when the graph is not a normal form with one attention per layer of the plan.
    """
    Attentions(plan, cache_dtype, shape or plan.model, name).rewrite(model)


class Attentions(Rewriter):
    """Records the attentions of a model, and their caches in the order of the layers."""

    opsets: ClassVar = {DOMAIN: VERSION}

    def __init__(self, plan: Plan, cache_dtype: ir.DataType, shape: ModelShape, name: str) -> None:
        super().__init__(plan, cache_dtype, name)
        self.shape = shape

    def layer(self, i: int, old: ir.Node) -> ir.Value:
        """The output of layer i, of ops that take query, key and value from the attention `old`."""
        parts = layer_parts(self.plan, i)
        dim, group = old.inputs[4].shape[-1], self.plan.model.group
        whole = value(old.outputs[0].name, old.outputs[0].dtype, old.outputs[0].shape)
        if len(parts) == 1:
            return self.part(parts[0], old, old.inputs[:3], whole)
        outputs = []
        for part in parts:
            queries = [head * group + j for head in part.heads for j in range(group)]
            inputs = []
            for kind, x, heads in zip(("query", "key", "value"), old.inputs[:3], (queries, part.heads, part.heads), strict=True):
                some = value(f"layers.{part.name}.{kind}.part", x.dtype, ["batch", "sequence", len(heads) * dim])
                inputs.append(pick(self, x, heads, dim, some))
            output = value(f"layers.{part.name}.attention.part", whole.dtype, ["batch", "sequence", len(queries) * dim])
            outputs.append((self.part(part, old, inputs, output), queries))
        return join(self, outputs, dim, whole)

    def part(
        self,
        part: Part,
        old: ir.Node,
        inputs: list[ir.Value],
        output: ir.Value,
        lse: ir.Value | None = None,
        span: ir.Value | None = None,
        codes: ir.Value | None = None,
    ) -> ir.Value:
        """The op of one part of a layer; its output.

        lse: takes its log-sum-exps, too. span: spans in force, [batch, kv_heads]; with them, LshAttention leaves out what they
        hold. codes: its queries, hashed.
        """
        dim = old.inputs[4].shape[-1]
        shapes: dict[str, tuple[ir.DataType, list[int | str]]]
        shapes = {f"{kind}.{part.name}": (self.cache_dtype, ["batch", *part.cache_shape(dim)]) for kind in part.caches}
        if part.lsh is not None:
            shapes[f"state.{part.name}"] = (ir.DataType.UINT8, ["batch", part.state_bytes(dim)])
        past, present = self.caches(shapes)
        attributes = {
            "num_heads": len(part.heads) * self.plan.model.group,
            "kv_num_heads": len(part.heads),
            "sink": part.sink,
            "scale": old.attributes["scale"].as_float(),
            "softcap": old.attributes["softcap"].as_float() if "softcap" in old.attributes else 0.0,
        }
        last: ir.Value | None
        if part.lsh is None:
            attributes["capacity"] = list(part.capacity)
            last = span or self.span_of(part)
        else:
            attributes |= _lsh_attributes(part) | {"identity": identity(part, self.shape, self.plan.n_max)}
            last = self.projection(part, dim)
        name = f"layers.{part.name}.attention"
        more: list[ir.Value | None] = [*self.scales(part)] if self.cache_dtype == ir.DataType.INT8 else []
        if part.lsh is not None and span is not None:
            more = [*(more or (None, None)), span, *(() if codes is None else (codes,))]
        outputs = [output, *present, *(() if lse is None else (lse,))]
        self.node(part.op, [*inputs, *past, self.length, last, *more], outputs, attributes, DOMAIN, name)
        return output

    def span_of(self, part: Part) -> ir.Value:
        """Spans in force of the heads of a part, [batch, kv_heads]."""
        span = self.op("Gather", self.span, np.array(part.layer), axis=0)
        whole = len(part.heads) == self.plan.model.kv_heads
        return span if whole else self.op("Gather", span, list(part.heads), axis=1)

    def scales(self, part: Part) -> list[ir.Value]:
        """Scales of the keys and of the values of each head in an int8 cache; 1 until `cache_scales` has measured them."""
        names = (f"layers.{part.name}.{kind}_scale" for kind in ("key", "value"))
        return [self.initializer(name, ir.tensor(np.ones(len(part.heads), np.float32), name=name)) for name in names]

    def projection(self, part: Part, dim: int) -> ir.Value | None:
        """The random projection or signs of a part, one initializer for all that have the same; None without one."""
        lsh = part.lsh
        assert lsh is not None
        if lsh.index == "exact":
            return None
        # Tables may have as many columns as a sketch has rounds of signs.
        kind = "signs" if lsh.index == "sketch" else "projection"
        name = f"lsh.{kind}.{dim}x{lsh.columns}.seed{lsh.seed}"
        known = self.initializers.get(name)
        return known or self.initializer(name, ir.tensor(projection_of(lsh, dim), name=name))


def _lsh_attributes(part: Part) -> dict[str, Any]:
    lsh = part.lsh
    assert lsh is not None
    own: dict[str, Any] = {}
    if lsh.index == "tables":
        own = {"bits": lsh.bits, "tables": lsh.tables, "min_collisions": lsh.min_collisions}
    elif lsh.index == "signature":
        own = {"signature_bits": lsh.signature_bits, "max_hamming": list(part.max_hamming or ())}
    own |= {"guard": lsh.guard} if lsh.guard else {}
    own |= {"fraction": lsh.fraction} if lsh.index == "sketch" else {"min_inclusion": lsh.min_inclusion}
    return {"index": lsh.index, "window": lsh.window, "layer": part.layer} | own

"""Target `hybrid`: attention of sampled heads in two nodes, so that only the sampling runs on the CPU.

Of each sampled part (its name is `{part}`), beside what `attention` has:

    layers.{part}.near.attention  SpanAttention over rings of sinks and window: past_key.{part}.near, past_value.{part}.near
    layers.{part}.codes           LshHash of the chunk's last token, for indexes of hashes
    layers.{part}.attention       LshAttention of all that the span in force leaves out: the one node that has no GPU kernel
    layers.{part}.merge           MergeAttention of both

Queries, codes, new keys and values, and what the far attention gives are all that passes between the devices.
"""

from __future__ import annotations

import onnx_ir as ir

from attnspan.export.graph import value
from attnspan.export.ops import DOMAIN
from attnspan.export.rewrite.attention import Attentions
from attnspan.planner.hybrid import near_part
from attnspan.planner.parts import Part
from attnspan.planner.plan import Plan
from attnspan.planner.shape import ModelShape

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


def rewrite_hybrid(model: ir.Model, plan: Plan, cache_dtype: ir.DataType, shape: ModelShape | None = None) -> None:
    """Turn a normal form into the `hybrid` form, in place. Arguments and errors as of `replace_attentions`."""
    from attnspan.export.hybrid_function import add_hybrid_functions

    _Hybrid(plan, cache_dtype, shape or plan.model, "hybrid").rewrite(model)
    add_hybrid_functions(model)


class _Hybrid(Attentions):
    """Two attentions for each sampled part, and one softmax of both."""

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
        """The ops of one part of a layer; its output. All SpanAttentions have an lse, as their function has."""
        if part.lsh is None:
            return super().part(part, old, inputs, output, self.lse(part))
        near, span = near_part(part, self.plan.n_max), self.span_of(part)
        pairs: list[ir.Value] = []
        for half, which, known in ((near, "near", None), (part, "far", self.codes(part, old, inputs[0]))):
            made = value(f"layers.{part.name}.{which}.output", output.dtype, output.shape), self.lse(half)
            super().part(half, old, inputs, *made, span, known)
            pairs += made
        heads = len(part.heads) * self.plan.model.group
        self.node("MergeAttention", pairs, [output], {"num_heads": heads}, DOMAIN, f"layers.{part.name}.merge")
        return output

    def lse(self, part: Part) -> ir.Value:
        """A value for the log-sum-exps of a part."""
        heads = len(part.heads) * self.plan.model.group
        return value(f"layers.{part.name}.attention.lse", FLOAT, ["batch", heads, "sequence"])

    def codes(self, part: Part, old: ir.Node, query: ir.Value) -> ir.Value | None:
        """What the query of the last token is hashed to, where keys are drawn by hashes; one that samples is the only one."""
        lsh, heads = part.lsh, len(part.heads) * self.plan.model.group
        assert lsh is not None
        # LshHash packs codes of tables in pairs.
        if lsh.index not in ("signature", "tables") or (lsh.tables or 0) % 2:
            return None
        kind = {"signature_bits": lsh.signature_bits} if lsh.index == "signature" else {"bits": lsh.bits, "tables": lsh.tables}
        words = (lsh.signature_bits or 0) // 32 or (lsh.tables or 0) // 2
        last = self.op("Slice", query, [-1], [2**31 - 1], [1])
        codes = value(f"layers.{part.name}.codes.output", INT32, ["batch", 1, heads, words])
        projection = self.projection(part, old.inputs[4].shape[-1])
        self.node("LshHash", [last, projection], [codes], {"num_heads": heads} | kind, DOMAIN, f"layers.{part.name}.codes")
        return codes

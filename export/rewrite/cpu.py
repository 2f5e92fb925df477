"""Target `cpu`: every attention of the normal form becomes SpanAttention over ring caches, LshAttention over whole ones, or both.

Inputs: `input_ids` [batch, sequence] int64; `length` [batch] int32, tokens already cached in each row; `span`
[layers, batch, kv_heads] int32, spans in force, sinks included; `logits_to_keep` [1] int64; for each part of a layer (see
`planner/parts.py`; its name is the layer's number where a layer has one part) `past_key.{name}`, `past_value.{name}`
[batch, slots of the part, head_dim] in the cache's type, and for sampled heads `past_state.{name}` [batch, bytes] uint8.
Outputs: `logits` [batch, kept, vocab]; each past's present. The model carries the bodies of its ops for runtimes without the
op library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from attnspan.export.graph import Recorder, value
from attnspan.export.ops import DOMAIN, VERSION
from attnspan.export.rewrite.heads import join, pick
from attnspan.planner.lsh import projection_of
from attnspan.planner.parts import Part, identity, layer_parts
from attnspan.planner.plan import Plan
from attnspan.planner.shape import ModelShape

INT32, INT64, UINT8 = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8


def rewrite_cpu(model: ir.Model, plan: Plan, cache_dtype: ir.DataType, shape: ModelShape | None = None) -> None:
    """Turn a normal form into the `cpu` form, in place. `shape`: the model, as indexes remember it (default: the plan's).

    ValueError when the graph is not a normal form with one attention per layer of the plan.
    """
    graph = model.graph
    attentions = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
    names = [f"layers.{i}.attention" for i in range(plan.model.layers)]
    if [node.name for node in attentions] != names:
        raise ValueError(f"{len(attentions)} attentions in the graph, {len(names)} layers in the plan")

    given = {x.name: x for x in graph.inputs}
    rewriter = _Rewriter(plan, cache_dtype, shape or plan.model)
    rewriter.positions(given["input_ids"], given["position_ids"])
    for i, node in enumerate(attentions):
        node.outputs[0].replace_all_uses_with(rewriter.layer(i, node))

    graph.inputs[:] = [given["input_ids"], rewriter.length, rewriter.span, given["logits_to_keep"], *rewriter.pasts]
    graph.outputs[:] = [graph.outputs[0], *rewriter.presents]
    graph.remove(attentions, safe=True)
    graph.extend(rewriter.nodes)
    for initializer in rewriter.initializers.values():
        graph.register_initializer(initializer)
    graph.name = "cpu"
    graph.opset_imports[DOMAIN] = VERSION
    add_functions(model)
    for clean in (RemoveUnusedNodesPass(), TopologicalSortPass()):
        clean(model)


def add_functions(model: ir.Model) -> None:
    """Add the body of each op of ours to a model whose nodes leave the optional output `lse` out."""
    from attnspan.export.lsh_function import LshAttention
    from attnspan.export.span_function import SpanAttention

    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for body in (SpanAttention, LshAttention):
        if body.name not in used:
            continue
        function = ir.serde.deserialize_function(body.to_function_proto())
        function.outputs.pop()  # ONNX Runtime wants a function to have exactly its nodes' outputs
        model.functions[function.identifier()] = function


class _Rewriter(Recorder):
    """Records the attentions of a model, and their caches in the order of the layers."""

    def __init__(self, plan: Plan, cache_dtype: ir.DataType, shape: ModelShape) -> None:
        super().__init__("cpu")
        self.plan, self.cache_dtype, self.shape = plan, cache_dtype, shape
        self.length = value("length", INT32, ["batch"])
        self.span = value("span", INT32, ["layers", "batch", plan.model.kv_heads])
        self.pasts: list[ir.Value] = []
        self.presents: list[ir.Value] = []

    def positions(self, ids: ir.Value, old: ir.Value) -> None:
        """Replace `old` by length, length + 1, ...: every row counts on from what it has cached."""
        sequence = self.op("Squeeze", self.op("Shape", ids, start=1))
        steps = self.op("Range", np.array(0), sequence, np.array(1))
        first = self.op("Unsqueeze", self.op("Cast", self.length, to=INT64), [1])
        old.replace_all_uses_with(self.op("Add", first, steps))

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

    def part(self, part: Part, old: ir.Node, inputs: list[ir.Value], output: ir.Value) -> ir.Value:
        """The op of one part of a layer; its output."""
        dim = old.inputs[4].shape[-1]
        shapes = {f"{kind}.{part.name}": (self.cache_dtype, ["batch", part.slots, dim]) for kind in ("key", "value")}
        if part.lsh is not None:
            shapes[f"state.{part.name}"] = (UINT8, ["batch", part.state_bytes(dim)])
        past, present = ([value(f"{when}_{name}", *of) for name, of in shapes.items()] for when in ("past", "present"))
        self.pasts += past
        self.presents += present
        attributes = {
            "num_heads": len(part.heads) * self.plan.model.group,
            "kv_num_heads": len(part.heads),
            "sink": self.plan.sink,
            "scale": old.attributes["scale"].as_float(),
            "softcap": 0.0,
        }
        last: ir.Value | None
        if part.lsh is None:
            attributes["capacity"] = list(part.capacity)
            last = self.op("Gather", self.span, np.array(part.layer), axis=0)
            if len(part.heads) < self.plan.model.kv_heads:
                last = self.op("Gather", last, list(part.heads), axis=1)
        else:
            attributes |= _lsh_attributes(part) | {"identity": identity(part, self.shape, self.plan.n_max)}
            last = self.projection(part, dim)
        name = f"layers.{part.name}.attention"
        self.node(part.op, [*inputs, *past, self.length, last], [output, *present], attributes, DOMAIN, name)
        return output

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
    own |= {"fraction": lsh.fraction} if lsh.index == "sketch" else {"min_inclusion": lsh.min_inclusion}
    return {"index": lsh.index, "window": lsh.window, "layer": part.layer} | own

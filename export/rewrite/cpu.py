"""Target `cpu`: every attention of the normal form becomes one SpanAttention node over ring caches.

Inputs: `input_ids` [batch, sequence] int64; `length` [batch] int32, tokens already cached in each row; `span`
[layers, batch, kv_heads] int32, spans in force, sinks included; `logits_to_keep` [1] int64; `past_key.{i}`,
`past_value.{i}` [batch, slots of layer i, head_dim] in the cache's type. Outputs: `logits` [batch, kept, vocab];
`present_key.{i}`, `present_value.{i}`. The model carries SpanAttention's body for runtimes without the op library.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from attnspan.export.graph import Recorder, value
from attnspan.export.ops import DOMAIN, SPAN_ATTENTION, VERSION
from attnspan.planner.plan import Plan

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64


def rewrite_cpu(model: ir.Model, plan: Plan, cache_dtype: ir.DataType) -> None:
    """Turn a normal form into the `cpu` form, in place.

    ValueError when the graph is not a normal form with one attention per layer of the plan.
    """
    graph = model.graph
    attentions = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
    names = [f"layers.{i}.attention" for i in range(plan.model.layers)]
    if [node.name for node in attentions] != names:
        raise ValueError(f"{len(attentions)} attentions in the graph, {len(names)} layers in the plan")

    given = {x.name: x for x in graph.inputs}
    record = Recorder("cpu")
    length = value("length", INT32, ["batch"])
    span = value("span", INT32, ["layers", "batch", plan.model.kv_heads])
    _positions(record, given["input_ids"], length, given["position_ids"])
    inputs, presents = [given["input_ids"], length, span, given["logits_to_keep"]], []
    for i, node in enumerate(attentions):
        new = _span_attention(record, i, node, plan, length, span, cache_dtype)
        inputs += new.inputs[3:5]
        presents += new.outputs[1:]
        node.outputs[0].replace_all_uses_with(new.outputs[0])

    graph.inputs[:] = inputs
    graph.outputs[:] = [graph.outputs[0], *presents]
    graph.remove(attentions, safe=True)
    graph.extend(record.nodes)
    for initializer in record.initializers.values():
        graph.register_initializer(initializer)
    graph.name = "cpu"
    graph.opset_imports[DOMAIN] = VERSION
    add_span_function(model)
    for clean in (RemoveUnusedNodesPass(), TopologicalSortPass()):
        clean(model)


def add_span_function(model: ir.Model) -> None:
    """Add the body of SpanAttention to a model whose nodes leave the optional output `lse` out."""
    from attnspan.export.span_function import SpanAttention

    function = ir.serde.deserialize_function(SpanAttention.to_function_proto())
    function.outputs.pop()  # ONNX Runtime wants a function to have exactly its nodes' outputs
    model.functions[function.identifier()] = function


def _positions(record: Recorder, ids: ir.Value, length: ir.Value, old: ir.Value) -> None:
    """Replace `old` by length, length + 1, ...: every row counts on from what it has cached."""
    sequence = record.op("Squeeze", record.op("Shape", ids, start=1))
    steps = record.op("Range", np.array(0), sequence, np.array(1))
    first = record.op("Unsqueeze", record.op("Cast", length, to=INT64), [1])
    old.replace_all_uses_with(record.op("Add", first, steps))


def _span_attention(
    record: Recorder,
    i: int,
    old: ir.Node,
    plan: Plan,
    length: ir.Value,
    span: ir.Value,
    cache_dtype: ir.DataType,
) -> ir.Node:
    """The SpanAttention node of layer i, which takes query, key and value from the attention `old`."""
    query, key, val = old.inputs[:3]
    capacity = plan.capacities()[i].tolist()
    head_dim = old.inputs[4].shape[-1]

    def caches(when: str) -> list[ir.Value]:
        return [value(f"{when}_{x}.{i}", cache_dtype, ["batch", sum(capacity), head_dim]) for x in ("key", "value")]

    attributes = {
        "num_heads": plan.model.heads,
        "kv_num_heads": plan.model.kv_heads,
        "capacity": capacity,
        "sink": plan.sink,
        "scale": old.attributes["scale"].as_float(),
        "softcap": 0.0,
    }
    output = value(old.outputs[0].name, old.outputs[0].dtype, old.outputs[0].shape)
    spans = record.op("Gather", span, np.array(i), axis=0)
    inputs = [query, key, val, *caches("past"), length, spans]
    name = f"layers.{i}.attention"
    return record.node(SPAN_ATTENTION.name, inputs, [output, *caches("present")], attributes, DOMAIN, name)

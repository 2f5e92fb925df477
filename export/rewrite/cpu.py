"""Target `cpu`: the ops of `attention`, and their bodies, for runtimes without the op library."""

from __future__ import annotations

import onnx_ir as ir

from attnspan.export.ops import DOMAIN
from attnspan.export.rewrite.attention import replace_attentions
from attnspan.planner.plan import Plan
from attnspan.planner.shape import ModelShape


def rewrite_cpu(model: ir.Model, plan: Plan, cache_dtype: ir.DataType, shape: ModelShape | None = None) -> None:
    """Turn a normal form into the `cpu` form, in place. Arguments and errors as of `replace_attentions`."""
    replace_attentions(model, plan, cache_dtype, shape, "cpu")
    add_functions(model)


def add_functions(model: ir.Model) -> None:
    """Add the body of each op of ours to a model whose nodes leave the optional output `lse` out."""
    from attnspan.export.int8_function import functions as int8_functions
    from attnspan.export.lsh_function import LshAttention
    from attnspan.export.span_function import SpanAttention

    nodes = [node for node in model.graph if node.domain == DOMAIN]
    used = {node.op_type for node in nodes}
    if any(node.inputs[3].dtype == ir.DataType.INT8 for node in nodes):
        bodies = int8_functions(used)
    else:
        float_bodies = (body for body in (SpanAttention, LshAttention) if body.name in used)
        bodies = [ir.serde.deserialize_function(body.to_function_proto()) for body in float_bodies]
    for body in bodies:
        if body.name in used:
            body.outputs.pop()  # ONNX Runtime wants a function to have exactly its nodes' outputs
        model.functions[body.identifier()] = body

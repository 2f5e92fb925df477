"""Target `tensorrt`: SpanAttention as a plugin node, strongly typed; the node has no body, TensorRT must have the plugin.

Inputs and outputs are those of `attention`. The type of the activations is also that of the caches, so that the plugin's
presents are its pasts, in place. What is done to the written file follows in `surgery`.
"""

from __future__ import annotations

import onnx_ir as ir

from attnspan.export.rewrite.attention import replace_attentions
from attnspan.planner.parts import refuse_sampled
from attnspan.planner.plan import Plan
from attnspan.planner.shape import ModelShape
from attnspan.plugins.trt_sparse_attn.schema import SPAN_ATTENTION


def rewrite_tensorrt(model: ir.Model, plan: Plan, cache_dtype: ir.DataType, shape: ModelShape | None = None) -> None:
    """Turn a normal form into the `tensorrt` form, in place. Arguments and errors as of `replace_attentions`.

    UserError for a plan with heads of mode `lsh`: the plugin does not sample.
    """
    refuse_sampled(
        plan,
        "target 'tensorrt' takes 'span' and 'dense', as its plugin does not sample; change --plan, or export with --target cpu",
    )
    replace_attentions(model, plan, cache_dtype, shape, "tensorrt")
    for node in [node for node in model.graph if node.op_type == "SpanAttention"]:
        node.resize_outputs(4)  # TensorRT wants all outputs of a plugin to have names
        for x in SPAN_ATTENTION.attributes:
            if x.default is not None and x.name not in node.attributes:  # TensorRT warns of each that is left out
                made = ir.AttrFloat32 if x.kind == "float" else ir.AttrInt64
                node.attributes[x.name] = made(x.name, x.default)
        lse, heads = node.outputs[3], node.attributes["num_heads"].as_int()
        lse.name, lse.dtype, lse.shape = f"{node.name}.lse", ir.DataType.FLOAT, ir.Shape(["batch", heads, "sequence"])
    span = next(x for x in model.graph.inputs if x.name == "span")
    span.shape = ir.Shape([plan.model.layers, "batch", plan.model.kv_heads])  # one dimension fewer for profiles to bound

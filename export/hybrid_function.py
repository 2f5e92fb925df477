"""The ops of target `hybrid` in standard ONNX: where the op library is not loaded, all attention is exact."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import BFLOAT16, FLOAT, INT32, INT64, script
from onnxscript.values import Opset

from attnspan.export.lsh_function import LshAttention
from attnspan.export.ops import DOMAIN, OPSET, VERSION
from attnspan.export.span_function import SpanAttention

op = Opset("", OPSET)


@script(Opset(DOMAIN, VERSION), default_opset=op)
def LshHash(x, projection, num_heads: int, bits: int = 0, tables: int = 0, signature_bits: int = 0):  # type: ignore[no-untyped-def]  # noqa: N802
    """Body of LshHash without a mean."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis_0 = op.Constant(value_ints=[0])
    axis_1 = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    heads = op.Reshape(op.Constant(value_int=num_heads), axis_1)

    vectors = op.Reshape(x, op.Concat(axis_0, axis_0, heads, rest, axis=0))
    rounded = op.Cast(op.Cast(vectors, to=BFLOAT16.dtype), to=FLOAT.dtype)
    columns = op.Cast(op.Cast(projection, to=BFLOAT16.dtype), to=FLOAT.dtype)
    signs = op.Cast(op.Greater(op.MatMul(rounded, columns), 0.0), to=INT64.dtype)

    # What a bit of a word stands for: 32 of a signature in order, the last of them the sign; or two codes of `bits` in 16 each.
    width = op.Constant(value_int=bits)
    signed = op.Greater(op.Constant(value_int=signature_bits), zero)
    bit = op.Range(zero, op.Where(signed, op.Constant(value_int=32), width + width), one)
    upper = bit - width + op.Constant(value_int=16)
    place = op.Where(op.Or(signed, op.Less(bit, width)), bit, upper)
    weight = op.Pow(op.Constant(value_int=2), place)
    weight = op.Where(op.Equal(place, op.Constant(value_int=31)), -weight, weight)
    words = op.Reshape(signs, op.Concat(axis_0, axis_0, axis_0, rest, op.Shape(bit), axis=0))
    codes = op.Cast(op.ReduceSum(words * weight, rest, keepdims=0), to=INT32.dtype)
    return codes


@script(Opset(DOMAIN, VERSION), default_opset=op)
def MergeAttention(output_a, lse_a, output_b, lse_b, num_heads: int):  # type: ignore[no-untyped-def]  # noqa: N802
    """Body of MergeAttention."""
    axis_0 = op.Constant(value_ints=[0])
    axis_1 = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    heads = op.Reshape(op.Constant(value_int=num_heads), axis_1)
    by_head = op.Concat(axis_0, axis_0, heads, rest, axis=0)

    # Less the larger one, or 0 where neither part has keys; [batch, tokens, heads, 1].
    top = op.Max(lse_a, lse_b)
    top = op.Where(op.IsInf(top), 0.0, top)
    of_a = op.Unsqueeze(op.Transpose(op.Exp(lse_a - top), perm=[0, 2, 1]), rest)
    of_b = op.Unsqueeze(op.Transpose(op.Exp(lse_b - top), perm=[0, 2, 1]), rest)
    both = of_a + of_b
    both = op.Where(op.Equal(both, 0.0), 1.0, both)
    a = op.Cast(op.Reshape(output_a, by_head), to=FLOAT.dtype) * of_a
    b = op.Cast(op.Reshape(output_b, by_head), to=FLOAT.dtype) * of_b
    sum_a = op.Where(op.Equal(of_a, 0.0), 0.0, a)
    sum_b = op.Where(op.Equal(of_b, 0.0), 0.0, b)
    output = op.CastLike(op.Reshape((sum_a + sum_b) / both, op.Shape(output_a)), output_a)
    return output


def far_attention() -> ir.Function:
    """Body of LshAttention with `span`: that of LshAttention, with another bound of what is seen."""
    body = ir.serde.deserialize_function(LshAttention.to_function_proto())
    by_name = {x.name: x for node in body for x in node.outputs}
    start, behind = by_name["first"].producer(), by_name["behind"].producer()
    assert start is not None
    assert behind is not None
    names = ("key_scale", "value_scale", "span", "query_codes")
    more = [ir.Value(name=name) for name in names]
    body.inputs.extend(more)

    def made(op_type: str, inputs: list[ir.Value], name: str, attributes: list[ir.Attr] | None = None) -> ir.Value:
        node = ir.Node("", op_type, inputs, attributes or (), outputs=[ir.Value(name=name)])
        body.insert_before(behind, node)
        return node.outputs[0]

    sinks = made("Constant", [], "far.sinks", [ir.RefAttr("value_int", "sink", ir.AttributeType.INT)])
    wide = made("Cast", [more[2]], "far.span", [ir.AttrInt64("to", ir.DataType.INT64)])
    window = made("Sub", [wide, sinks], "far.window")
    axes = made("Constant", [], "far.axes", [ir.AttrInt64s("value_ints", [2, 3, 4])])
    ir.convenience.replace_all_uses_with(by_name["first"], sinks)
    ir.convenience.replace_all_uses_with(by_name["behind"], made("Unsqueeze", [window, axes], "far.behind"))
    body.remove([start, behind], safe=True)
    return body


def add_hybrid_functions(model: ir.Model) -> None:
    """Add the body of each op to a model whose SpanAttentions and LshAttentions all have an lse, and MergeAttentions none."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for body in (SpanAttention, LshAttention, LshHash, MergeAttention):
        if body.name in used:
            made = far_attention() if body is LshAttention else ir.serde.deserialize_function(body.to_function_proto())
            model.functions[made.identifier()] = made

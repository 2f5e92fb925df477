"""The ops with int8 caches in standard ONNX: the float bodies; what is stored is widened before them and rounded behind them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import FLOAT, INT8, INT64, script
from onnxscript.values import Opset

from attnspan.export.lsh_function import LshAttention as FloatLshAttention
from attnspan.export.ops import DOMAIN, OPSET, VERSION
from attnspan.export.span_function import SpanAttention as FloatSpanAttention

op = Opset("", OPSET)


@script(Opset(DOMAIN, VERSION), default_opset=op)
def SpanAttention(  # type: ignore[no-untyped-def]  # noqa: N802 - the op's name
    query,
    key,
    value,
    past_key,
    past_value,
    length,
    span,
    key_scale,
    value_scale,
    num_heads: int,
    kv_num_heads: int,
    capacity: Sequence[int],
    sink: int = 64,
    scale: float = 0.0,
    softcap: float = 0.0,
):
    """Body of SpanAttention for int8 caches."""
    zero = op.Constant(value_int=0)
    axis_0 = op.Constant(value_ints=[0])
    axis_1 = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    most = op.Constant(value_float=127.0)

    # The scale of each slot: that of its head, [slots, 1].
    capacities = op.Constant(value_ints=capacity)
    ends = op.Unsqueeze(op.CumSum(capacities, zero), axis_1)
    slot = op.Range(zero, op.ReduceSum(capacities, keepdims=0), op.Constant(value_int=1))
    head = op.ReduceSum(op.Cast(slot >= ends, to=INT64.dtype), axis_0, keepdims=0)
    key_slots = op.Unsqueeze(op.Gather(key_scale, head), axis_1)
    value_slots = op.Unsqueeze(op.Gather(value_scale, head), axis_1)

    # The chunk as it will be stored.
    per_head = op.Concat(axis_0, axis_0, op.Shape(capacities), rest, axis=0)
    key_heads = op.Unsqueeze(key_scale, axis_1)
    value_heads = op.Unsqueeze(value_scale, axis_1)
    whole_key = op.Round(op.Cast(op.Reshape(key, per_head), to=FLOAT.dtype) / key_heads)
    whole_value = op.Round(op.Cast(op.Reshape(value, per_head), to=FLOAT.dtype) / value_heads)
    new_key = op.Reshape(op.Clip(whole_key, -most, most) * key_heads, op.Shape(key))
    new_value = op.Reshape(op.Clip(whole_value, -most, most) * value_heads, op.Shape(value))

    output, next_key, next_value, lse = FloatSpanAttention(
        query,
        new_key,
        new_value,
        op.Cast(past_key, to=FLOAT.dtype) * key_slots,
        op.Cast(past_value, to=FLOAT.dtype) * value_slots,
        length,
        span,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        capacity=capacity,
        sink=sink,
        scale=scale,
        softcap=softcap,
    )
    present_key = op.Cast(op.Round(next_key / key_slots), to=INT8.dtype)
    present_value = op.Cast(op.Round(next_value / value_slots), to=INT8.dtype)
    return output, present_key, present_value, lse


@script(Opset(DOMAIN, VERSION), default_opset=op)
def LshAttention(  # type: ignore[no-untyped-def]  # noqa: N802 - the op's name
    query,
    key,
    value,
    past_kv,
    past_state,
    length,
    projection,
    key_scale,
    value_scale,
    num_heads: int,
    kv_num_heads: int,
    index: str,
    bits: int,
    tables: int,
    signature_bits: int,
    max_hamming: Sequence[int],
    sink: int = 64,
    window: int = 64,
    scale: float = 0.0,
    softcap: float = 0.0,
    min_collisions: int = 2,
    min_inclusion: float = 0.0,
    fraction: float = 0.02,
    guard: float = 0.0,
    dense_below: int = -1,
    layer: int = 0,
    identity: int = 0,
):
    """Body of LshAttention for int8 caches."""
    axis_0 = op.Constant(value_ints=[0])
    axis_1 = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    most = op.Constant(value_float=127.0)

    # The cache by head, [batch, kv_heads, capacity, 2, dim], and the scales of keys and values.
    heads = op.Shape(key_scale)
    pair = op.Constant(value_ints=[2])
    dim = op.Shape(past_kv, start=2) / pair
    by_head = op.Concat(axis_0, heads, rest, pair, dim, axis=0)
    packed = op.Shape(past_kv)
    key_heads = op.Unsqueeze(key_scale, axis_1)
    value_heads = op.Unsqueeze(value_scale, axis_1)
    scales = op.Reshape(op.Concat(key_heads, value_heads, axis=1), op.Concat(heads, axis_1, pair, axis_1, axis=0))
    old_kv = op.Reshape(op.Reshape(op.Cast(past_kv, to=FLOAT.dtype), by_head) * scales, packed)

    # The chunk as it will be stored.
    per_head = op.Concat(axis_0, axis_0, heads, rest, axis=0)
    whole_key = op.Round(op.Cast(op.Reshape(key, per_head), to=FLOAT.dtype) / key_heads)
    whole_value = op.Round(op.Cast(op.Reshape(value, per_head), to=FLOAT.dtype) / value_heads)
    new_key = op.Reshape(op.Clip(whole_key, -most, most) * key_heads, op.Shape(key))
    new_value = op.Reshape(op.Clip(whole_value, -most, most) * value_heads, op.Shape(value))

    output, next_kv, present_state, lse = FloatLshAttention(
        query,
        new_key,
        new_value,
        old_kv,
        past_state,
        length,
        projection,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        index=index,
        bits=bits,
        tables=tables,
        signature_bits=signature_bits,
        max_hamming=max_hamming,
        sink=sink,
        window=window,
        scale=scale,
        softcap=softcap,
        min_collisions=min_collisions,
        min_inclusion=min_inclusion,
        fraction=fraction,
        guard=guard,
        dense_below=dense_below,
        layer=layer,
        identity=identity,
    )
    present_kv = op.Reshape(op.Cast(op.Round(op.Reshape(next_kv, by_head) / scales), to=INT8.dtype), packed)
    return output, present_kv, present_state, lse


def functions(used: set[str]) -> list[ir.Function]:
    """The bodies of the ops named in `used`, each before the float body that it calls `Float...`; the last output is `lse`."""
    found = []
    for outer, inner in ((SpanAttention, FloatSpanAttention), (LshAttention, FloatLshAttention)):
        if outer.name not in used:
            continue
        body = ir.serde.deserialize_function(outer.to_function_proto())
        for node in body:
            if node.domain == DOMAIN:
                node.op_type = f"Float{inner.name}"
        proto = inner.to_function_proto()
        proto.name = f"Float{inner.name}"
        found += [body, ir.serde.deserialize_function(proto)]
    return found

"""LshAttention in standard ONNX: the model-local function that runs where the op library is not loaded.

It does not sample: attention is exact over the whole context, and the state stays as it was, or is emptied where a row starts.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import FLOAT, INT64, script
from onnxscript.values import Opset

from attnspan.export.ops import DOMAIN, OPSET, VERSION

op = Opset("", OPSET)


@script(Opset(DOMAIN, VERSION), default_opset=op)
def LshAttention(  # type: ignore[no-untyped-def]  # noqa: N802 - the op's name
    query,
    key,
    value,
    past_kv,
    past_state,
    length,
    projection,
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
    """Body of LshAttention for floating-point caches. Parameters without a use are there because nodes have the attributes.

    The past cache is read by TensorScatter alone, so that a past and its present may be the same buffer.
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis_0 = op.Constant(value_ints=[0])
    axis_1 = op.Constant(value_ints=[1])
    axis_2 = op.Constant(value_ints=[2])
    rest = op.Constant(value_ints=[-1])

    kv_heads = op.Reshape(op.Constant(value_int=kv_num_heads), axis_1)
    width = op.Shape(past_kv, start=2)  # a key and its value
    dim = width / op.Constant(value_ints=[2])
    slots = op.Shape(past_kv, start=1, end=2)
    capacity = slots / kv_heads
    tokens = op.Shape(query, start=1, end=2)
    start = op.Cast(length, to=INT64.dtype)

    # The chunk as the cache stores it, written at its positions: [batch, kv_heads, capacity, 2 * dim].
    by_token = op.Concat(axis_0, axis_0, kv_heads, dim, axis=0)
    by_head = op.Concat(axis_0, kv_heads, capacity, width, axis=0)
    packed = op.Concat(axis_0, slots, width, axis=0)
    both = op.Concat(op.Reshape(key, by_token), op.Reshape(value, by_token), axis=-1)
    new_kv = op.Transpose(op.CastLike(both, past_kv), perm=[0, 2, 1, 3])
    all_kv = op.TensorScatter(op.Reshape(past_kv, by_head), new_kv, start, axis=-2)
    present_kv = op.Reshape(all_kv, packed)
    all_key, all_value = op.Split(all_kv, num_outputs=2, axis=-1)

    # What is seen, [batch, 1, 1, tokens, capacity]: positions from `first` on, `behind` the query or more (see hybrid_function).
    first = op.Constant(value_int=0)
    behind = op.Constant(value_int=0)
    position = op.Range(zero, op.Squeeze(capacity), one)
    query_position = op.Unsqueeze(start, axis_1) + op.Range(zero, op.Squeeze(tokens), one)
    last = op.Unsqueeze(query_position, op.Constant(value_ints=[1, 2, 4])) - behind
    seen = op.And(op.GreaterOrEqual(position, first), op.LessOrEqual(position, last))

    # Scores in fp32, [batch, kv_heads, group, tokens, capacity].
    given_scale = op.Constant(value_float=scale)
    natural_scale = op.Reciprocal(op.Sqrt(op.Cast(op.Squeeze(dim), to=FLOAT.dtype)))
    factor = op.Where(op.Equal(given_scale, 0.0), natural_scale, given_scale)
    grouped = op.Reshape(query, op.Concat(axis_0, axis_0, kv_heads, rest, dim, axis=0))
    queries = op.Transpose(op.Cast(grouped, to=FLOAT.dtype), perm=[0, 2, 3, 1, 4]) * factor
    keys_t = op.Transpose(op.Cast(all_key, to=FLOAT.dtype), perm=[0, 1, 3, 2])
    score = op.MatMul(queries, op.Unsqueeze(keys_t, axis_2))
    cap = op.Constant(value_float=softcap)
    uncapped = op.Equal(cap, 0.0)
    score = op.Where(uncapped, score, cap * op.Tanh(score / op.Where(uncapped, 1.0, cap)))
    score = op.Where(seen, score, -1e30)

    mixed = op.MatMul(op.Softmax(score, axis=-1), op.Unsqueeze(op.Cast(all_value, to=FLOAT.dtype), axis_2))
    joined = op.Reshape(op.Transpose(mixed, perm=[0, 3, 1, 2, 4]), op.Concat(axis_0, axis_0, rest, axis=0))
    output = op.CastLike(joined, query)
    lse = op.Reshape(op.ReduceLogSumExp(score, rest, keepdims=0), op.Concat(axis_0, rest, tokens, axis=0))
    # Nothing is indexed here; but of a row that starts, what an earlier one left must not stay.
    fresh = op.Unsqueeze(op.Equal(length, 0), axis_1)
    present_state = op.Where(fresh, op.CastLike(zero, past_state), past_state)
    return output, present_kv, present_state, lse

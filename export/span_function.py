"""SpanAttention in standard ONNX: the model-local function that runs where the op library is not loaded. Right, not fast."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import FLOAT, INT64, script
from onnxscript.values import Opset

from attnspan.export.ops import DOMAIN, OPSET, VERSION

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
    num_heads: int,
    kv_num_heads: int,
    capacity: Sequence[int],
    sink: int = 64,
    scale: float = 0.0,
    softcap: float = 0.0,
):
    """Body of SpanAttention for floating-point caches. Heads of unequal capacity are padded to the longest.

    The counts of heads follow from the shapes; they are parameters because nodes have them as attributes.
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis_0 = op.Constant(value_ints=[0])
    axis_1 = op.Constant(value_ints=[1])
    axis_2 = op.Constant(value_ints=[2])
    rest = op.Constant(value_ints=[-1])
    none = op.Constant(value_int=-1)

    sinks = op.Constant(value_int=sink)
    capacities = op.Constant(value_ints=capacity)
    kv_heads = op.Shape(capacities)
    dim = op.Shape(past_key, start=2)
    tokens = op.Shape(query, start=1, end=2)
    tokens_scalar = op.Squeeze(tokens)

    # Where the slots are: `head`, `local` (slot within the head) and `ring` (ring length of the head), all [slots].
    first_slot = op.CumSum(capacities, zero, exclusive=1)
    slot = op.Range(zero, op.ReduceSum(capacities, keepdims=0), one)
    head = op.ReduceSum(op.Cast(slot >= op.Unsqueeze(first_slot + capacities, axis_1), to=INT64.dtype), axis_0, keepdims=0)
    local = slot - op.Gather(first_slot, head)
    ring = op.Gather(capacities, head) - sinks

    # Position each slot holds before and after the chunk, [batch, slots]: the last one <= `last` that maps to the slot.
    first_token = op.Unsqueeze(op.Cast(length, to=INT64.dtype), axis_1)
    last = first_token - one
    held = op.Where(local < sinks, local, last - op.Mod(last - local, ring))
    before = op.Where(op.And(held >= local, held <= last), held, none)
    last_after = last + tokens_scalar
    held_after = op.Where(local < sinks, local, last_after - op.Mod(last_after - local, ring))
    written = op.And(held_after >= op.Max(local, first_token), held_after <= last_after)

    # The cache, and the chunk [batch, tokens, kv_heads, dim] rounded as the cache will store it, widened to fp32.
    old_key = op.Cast(past_key, to=FLOAT.dtype)
    old_value = op.Cast(past_value, to=FLOAT.dtype)
    per_head = op.Concat(axis_0, axis_0, kv_heads, dim, axis=0)
    new_key = op.Reshape(op.Cast(op.CastLike(key, past_key), to=FLOAT.dtype), per_head)
    new_value = op.Reshape(op.Cast(op.CastLike(value, past_value), to=FLOAT.dtype), per_head)

    # Keys and values that a query may see, [batch, kv_heads, longest + tokens, dim], and their positions.
    column = op.Range(zero, op.ReduceMax(capacities, keepdims=0), one)
    capacity_column = op.Unsqueeze(capacities, axis_1)
    slot_of_column = op.Unsqueeze(first_slot, axis_1) + op.Min(column, capacity_column - one)
    keys = op.Concat(op.Gather(old_key, slot_of_column, axis=1), op.Transpose(new_key, perm=[0, 2, 1, 3]), axis=2)
    values = op.Concat(op.Gather(old_value, slot_of_column, axis=1), op.Transpose(new_value, perm=[0, 2, 1, 3]), axis=2)
    old_positions = op.Where(column < capacity_column, op.Gather(before, slot_of_column, axis=1), none)
    query_position = first_token + op.Range(zero, tokens_scalar, one)
    new_positions = op.Expand(op.Unsqueeze(query_position, axis_1), op.Concat(kv_heads, axis_1, axis=0))
    position = op.Unsqueeze(op.Concat(old_positions, new_positions, axis=2), axis_2)

    # [batch, kv_heads, tokens, longest + tokens]
    distance = op.Unsqueeze(op.Unsqueeze(query_position, axis_1), rest) - position
    given_span = op.Cast(span, to=INT64.dtype)
    kept_span = op.Where(op.LessOrEqual(first_token, capacities), given_span, op.Min(given_span, capacities))
    window = op.Max(kept_span - sinks, one)
    window = op.Unsqueeze(window, op.Constant(value_ints=[2, 3]))
    near = op.Or(position < sinks, distance < window)
    seen = op.And(op.And(position >= zero, distance >= zero), near)

    # Scores in fp32, [batch, kv_heads, group, tokens, longest + tokens].
    given_scale = op.Constant(value_float=scale)
    natural_scale = op.Reciprocal(op.Sqrt(op.Cast(op.Squeeze(dim), to=FLOAT.dtype)))
    factor = op.Where(op.Equal(given_scale, 0.0), natural_scale, given_scale)
    grouped = op.Reshape(query, op.Concat(axis_0, axis_0, kv_heads, rest, dim, axis=0))
    queries = op.Transpose(op.Cast(grouped, to=FLOAT.dtype), perm=[0, 2, 3, 1, 4]) * factor
    keys_t = op.Transpose(keys, perm=[0, 1, 3, 2])
    score = op.MatMul(queries, op.Unsqueeze(keys_t, axis_2))
    cap = op.Constant(value_float=softcap)
    uncapped = op.Equal(cap, 0.0)
    score = op.Where(uncapped, score, cap * op.Tanh(score / op.Where(uncapped, 1.0, cap)))
    score = op.Where(op.Unsqueeze(seen, axis_2), score, -1e30)

    mixed = op.MatMul(op.Softmax(score, axis=-1), op.Unsqueeze(values, axis_2))
    joined = op.Reshape(op.Transpose(mixed, perm=[0, 3, 1, 2, 4]), op.Concat(axis_0, axis_0, rest, axis=0))
    output = op.CastLike(joined, query)
    lse = op.Reshape(op.ReduceLogSumExp(score, rest, keepdims=0), op.Concat(axis_0, rest, tokens, axis=0))

    # Each slot keeps what it holds or takes its token of the chunk, [batch, slots, dim].
    flat = op.Concat(axis_0, rest, dim, axis=0)
    row = op.Where(written, held_after - first_token, zero) * op.Squeeze(kv_heads) + head
    row = op.Unsqueeze(row, axis_2)
    written = op.Unsqueeze(written, axis_2)
    next_key = op.Where(written, op.GatherND(op.Reshape(new_key, flat), row, batch_dims=1), old_key)
    next_value = op.Where(written, op.GatherND(op.Reshape(new_value, flat), row, batch_dims=1), old_value)
    present_key = op.CastLike(next_key, past_key)
    present_value = op.CastLike(next_value, past_value)
    return output, present_key, present_value, lse

"""NumPy oracle of the ops in `attnspan.export.ops`, in float64 and written to be read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


def slot_of(position: int, capacity: int, sink: int) -> int:
    """Slot of a head's cache that stores the token at `position`."""
    if position < sink:
        return position
    return sink + (position - sink) % (capacity - sink)


def held_positions(length: int, capacity: int, sink: int) -> NDArray[np.int64]:
    """Position stored in each of a head's slots once `length` tokens are cached; -1 for an empty slot. [capacity]"""
    held = np.full(capacity, -1, np.int64)
    oldest_in_ring = max(sink, length - (capacity - sink))
    for position in [*range(min(sink, length)), *range(oldest_in_ring, length)]:
        held[slot_of(position, capacity, sink)] = position
    return held


def store(x: Array, dtype: np.dtype, scale: float | None) -> Array:
    """`x` in the cache's type: a cast, or for int8 `round(x / scale)` half to even, clipped to [-127, 127]."""
    if dtype != np.int8:
        return x.astype(dtype)
    assert scale is not None, "an int8 cache needs key_scale and value_scale"
    return np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), -127, 127).astype(np.int8)


def load(x: Array, scale: float | None) -> NDArray[np.float64]:
    """The real value of what `store` wrote."""
    return x.astype(np.float64) * (1.0 if scale is None else float(scale))


def span_attention_reference(
    query: Array,  # [batch, tokens, heads * dim]
    key: Array,  # [batch, tokens, kv_heads * dim]
    value: Array,
    past_key: Array,  # [batch, slots, dim], slots = sum(capacity), heads one after another
    past_value: Array,
    length: Array,  # [batch] tokens already cached
    span: Array,  # [batch, kv_heads] tokens a query sees, sinks included
    capacity: list[int],  # [kv_heads]
    sink: int,
    scale: float = 0.0,  # 0: 1 / sqrt(dim)
    softcap: float = 0.0,  # 0: none
    key_scale: Array | None = None,  # [kv_heads], int8 caches only
    value_scale: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """SpanAttention: `output` [batch, tokens, heads * dim], `present_key`, `present_value`, `lse` [batch, heads, tokens].

    `output` and `lse` are float64; the presents have the past's type. Raises ValueError for a span over its capacity
    once tokens have left the ring.
    """
    batch, tokens, _ = query.shape
    dim = past_key.shape[-1]
    kv_heads = len(capacity)
    heads = query.shape[-1] // dim
    group = heads // kv_heads
    scale = scale or 1 / np.sqrt(dim)
    if np.any((span > np.asarray(capacity)) & (np.asarray(length)[:, None] > np.asarray(capacity))):
        raise ValueError(f"span {span.tolist()} is over the capacity {capacity}")

    q = query.reshape(batch, tokens, heads, dim).astype(np.float64)
    new_key = key.reshape(batch, tokens, kv_heads, dim)
    new_value = value.reshape(batch, tokens, kv_heads, dim)
    output = np.zeros((batch, tokens, heads, dim))
    lse = np.zeros((batch, heads, tokens))
    present_key, present_value = past_key.copy(), past_value.copy()

    for b in range(batch):
        n = int(length[b])
        first_slot = 0
        for h in range(kv_heads):
            slots = slice(first_slot, first_slot + capacity[h])
            first_slot += capacity[h]
            k_scale = None if key_scale is None else float(key_scale[h])
            v_scale = None if value_scale is None else float(value_scale[h])
            stored_key = store(new_key[b, :, h], past_key.dtype, k_scale)
            stored_value = store(new_value[b, :, h], past_value.dtype, v_scale)

            # What a query can see: the ring as it was before this chunk, then the chunk, both in their stored form.
            held = held_positions(n, capacity[h], sink)
            used = held >= 0
            positions = np.concatenate([held[used], n + np.arange(tokens)])
            keys = load(np.concatenate([past_key[b, slots][used], stored_key]), k_scale)
            values = load(np.concatenate([past_value[b, slots][used], stored_value]), v_scale)
            window = max(int(span[b, h]) - sink, 1)

            for i in range(tokens):
                at = n + i
                seen = (positions <= at) & ((positions < sink) | (at - positions < window))
                for head in range(h * group, (h + 1) * group):
                    score = keys[seen] @ q[b, i, head] * scale
                    if softcap:
                        score = softcap * np.tanh(score / softcap)
                    lse[b, head, i] = score.max() + np.log(np.exp(score - score.max()).sum())
                    output[b, i, head] = np.exp(score - lse[b, head, i]) @ values[seen]

            for i in range(tokens):  # in order: of a chunk longer than the ring, the last tokens stay
                slot = slots.start + slot_of(n + i, capacity[h], sink)
                present_key[b, slot] = stored_key[i]
                present_value[b, slot] = stored_value[i]

    return output.reshape(batch, tokens, heads * dim), present_key, present_value, lse

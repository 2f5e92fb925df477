"""The second launch of a decode step: joins the parts that the workers of `span_decode` wrote, and brings the caches on."""

from __future__ import annotations

import triton
import triton.language as tl

from attnspan.plugins.trt_sparse_attn.kernels.common import LN2, cast, pair_tiles, ring_slot, scaled, stored, tiles_each

BLOCK_C = 16
"""Parts that are merged at a time."""


@triton.jit
def merge_chunks_kernel(
    query, key, value, key_cache, value_cache, length, span, capacity, offset, new_tokens, key_scale, value_scale, part,
    part_lse, output, lse, scale, softcap, sink, pairs, kv_heads, group, slots, workers, write,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Program x merges query head x of all rows: output [batch, heads * D] and, unless None, lse [batch, heads].

    With `write`, the new key and value go to their slot; the caches were read before, by the kernel that wrote the parts.
    """
    pair = tl.program_id(0) // group
    row = pair // kv_heads
    head = pair % kv_heads
    some = tl.arange(0, BLOCK_P)
    total = 0
    before = 0
    tiles = 0
    for first in range(0, pairs, BLOCK_P):
        count = pair_tiles(first + some, length, span, capacity, new_tokens, pairs, kv_heads, sink, BLOCK_N)
        total += tl.sum(count)
        before += tl.sum(tl.where(first + some < pair, count, 0))
        tiles += tl.sum(tl.where(first + some == pair, count, 0))
    chunk = tiles_each(total, workers)
    first_part = before // chunk + pair
    parts = tl.where(tiles > 0, (before + tiles - 1) // chunk + pair + 1 - first_part, 0)

    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    own = pair.to(tl.int64) * D
    q = tl.load(query + tl.program_id(0).to(tl.int64) * D + d, in_d, 0.0)
    k = tl.load(key + own + d, in_d, 0.0)
    v = tl.load(value + own + d, in_d, 0.0)
    factor = scale
    v_scale = 1.0
    if key_scale is not None:
        k_scale = tl.load(key_scale + head)
        v_scale = tl.load(value_scale + head)
        k = stored(k, k_scale, q.dtype)
        v = stored(v, v_scale, q.dtype)
        factor *= k_scale
    # The new token sees itself: `top` is finite from the start.
    top = scaled(tl.sum(q.to(tl.float32) * k.to(tl.float32)), factor, softcap, SOFTCAP)
    norm = tl.full([1], 1.0, tl.float32)
    acc = v.to(tl.float32) * v_scale
    c = tl.arange(0, BLOCK_C)
    at = (first_part.to(tl.int64) * group) + tl.program_id(0) % group
    for first in range(0, parts, BLOCK_C):
        there = first + c < parts
        each = at + (first + c) * group
        log = tl.load(part_lse + each, there, float("-inf"))
        out = tl.load(part + each[:, None] * D + d[None, :], there[:, None] & in_d[None, :], 0.0)
        higher = tl.maximum(top, tl.max(log))
        weight = tl.exp2(log - higher)
        fade = tl.exp2(top - higher)
        norm = norm * fade + tl.sum(weight)
        acc = acc * fade + tl.sum(weight[:, None] * out, 0)
        top = higher
    live = True
    if new_tokens is not None:
        live = tl.load(new_tokens + row) > 0
    result = tl.where(live, acc / norm, 0.0)
    tl.store(output + tl.program_id(0).to(tl.int64) * D + d, cast(result, output.dtype.element_ty), in_d)
    if lse is not None:
        log = tl.where(live, (top + tl.log2(norm)) * LN2, float("-inf"))
        tl.store(lse + tl.program_id(0) + tl.arange(0, 1), log)
    first_of_group = tl.program_id(0) % group == 0
    if (write != 0) & first_of_group & live:
        slot = ring_slot(tl.load(length + row), tl.load(capacity + head), sink) + tl.load(offset + head)
        to = (row.to(tl.int64) * slots + slot) * D + d
        tl.store(key_cache + to, k.to(key_cache.dtype.element_ty), in_d)
        tl.store(value_cache + to, v.to(value_cache.dtype.element_ty), in_d)

"""Writes the keys and values of a chunk to their slots, after the chunk was attended to."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from attnspan.plugins.trt_sparse_attn.kernels import checks
from attnspan.plugins.trt_sparse_attn.kernels.common import FP8_MAX, OPTIONS, cast, ring_slot, tile_dim

BLOCK_T = 32
"""Tokens that a block writes."""


@triton.jit
def _scaled_down(x, scale):
    return tl.minimum(tl.maximum(x.to(tl.float32) / scale, -FP8_MAX), FP8_MAX)


@triton.jit
def ring_update_kernel(
    key, value, key_cache, value_cache, length, capacity, offset, new_tokens, key_scale, value_scale,
    sink, tokens, pairs, kv_heads, slots, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Program x: tokens of block x // pairs, of (row, KV head) x % pairs. No two tokens are written to one slot."""
    pair = tl.program_id(0) % pairs
    row = pair // kv_heads
    head = pair % kv_heads
    count = tokens
    if new_tokens is not None:
        count = tl.load(new_tokens + row)
    room = tl.load(capacity + head)
    token = tl.program_id(0) // pairs * BLOCK_T + tl.arange(0, BLOCK_T)
    position = tl.load(length + row) + token
    # Of a chunk longer than the ring the last tokens stay; sinks always do.
    stays = (token < count) & ((position < sink) | (token >= count - (room - sink)))
    d = tl.arange(0, BLOCK_D)
    mask = stays[:, None] & (d < D)[None, :]
    source = ((row.to(tl.int64) * tokens + token) * kv_heads + head) * D
    source = source[:, None] + d[None, :]
    slot = row.to(tl.int64) * slots + tl.load(offset + head) + ring_slot(position, room, sink)
    target = slot[:, None] * D + d[None, :]
    k = tl.load(key + source, mask, 0.0)
    v = tl.load(value + source, mask, 0.0)
    if key_scale is not None:
        k = cast(_scaled_down(k, tl.load(key_scale + head)), key_cache.dtype.element_ty)
        v = cast(_scaled_down(v, tl.load(value_scale + head)), value_cache.dtype.element_ty)
    tl.store(key_cache + target, k, mask)
    tl.store(value_cache + target, v, mask)


def ring_update(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
    capacity: Tensor,
    offset: Tensor,
    *,
    sink: int = 64,
    new_tokens: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Writes a chunk, key and value [batch, tokens, kv_heads * dim], to caches [batch, slots, dim] in place.

    length: tokens cached before, [batch]; new_tokens: tokens that are there, [batch], of rows padded at their ends. e4m3 caches
    store x / scale, rounded half to even and clipped to -448..448. UserError for what the kernel does not take.
    """
    shape = checks.new_keys(key, value, key_cache, value_cache, length, capacity, offset, sink, new_tokens,
                            key_scale, value_scale)  # fmt: skip
    pairs = shape.batch * shape.kv_heads
    blocks = pairs * triton.cdiv(shape.tokens, BLOCK_T)
    if blocks:
        with checks.device_of(key):
            ring_update_kernel[(blocks,)](
                key, value, key_cache, value_cache, length, capacity, offset, new_tokens, key_scale, value_scale,
                sink, shape.tokens, pairs, shape.kv_heads, shape.slots, D=shape.dim, BLOCK_D=tile_dim(shape.dim), BLOCK_T=BLOCK_T,
                num_warps=4, num_stages=1, **OPTIONS,
            )  # fmt: skip

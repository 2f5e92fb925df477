"""Attention of a chunk of tokens: cached sinks and window, then the chunk's own keys; tiles outside the span are never touched.

A block holds BLOCK_M rows, (token, query head of the group) with heads fastest, of one row of the batch and one KV head, so
that a group shares every tile of keys. Positions that all its rows see need no mask: they are walked in a loop of their own. The
other loop takes the tiles at the edges: sinks, the far end of the window, the diagonal. Neither minds the order of tiles, so
each runs over one list, and there are two such pairs of loops: one over the cache, one over the chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from attnspan.plugins.trt_sparse_attn.kernels import checks
from attnspan.plugins.trt_sparse_attn.kernels.common import (
    LN2,
    LOG2E,
    OPTIONS,
    Config,
    arch_of,
    cast,
    dot,
    scaled,
    shared_bytes,
    stored,
    tile_dim,
)


def config(head_dim: int, element_bytes: int, arch: int) -> Config:
    """Tile and pipeline: 128 rows of queries and 64 or 128 keys where shared memory and registers hold them.

    Registers that go to the stack (the build's manifest tells where) were seen at edges and outside loops, not in unmasked loops.
    """
    if arch == 0:
        return Config(32, 32, 1, 1)
    columns, shared = tile_dim(head_dim), shared_bytes(arch)
    if columns == 64:  # registers for two blocks a multiprocessor: one multiplies while the other takes exponentials
        return Config(128, 64, 4, 2)
    if columns == 128:  # 128 keys a tile, or wgmma waits for its operands
        return Config(128, 128 if shared > (200 << 10) else 64 if shared > (100 << 10) else 32, 8, 2)
    if shared > (200 << 10):
        return Config(128, 64, 8, 2)
    if shared > (100 << 10):
        return Config(64, 32, 4, 2)
    # Widening e4m3 takes registers of its own: half the rows.
    return Config(64, 32, 8, 2) if element_bytes > 1 else Config(32, 32, 4, 2)


@triton.jit
def _online(acc, norm, top, q, k, v, seen, scale, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """One tile of the online softmax. Scores and `top` are in units of log2; a row that has seen nothing keeps top at -inf."""
    score = dot(q, k, tl.zeros([q.shape[0], k.shape[1]], tl.float32))
    if SOFTCAP:
        score = scaled(score, scale, softcap, SOFTCAP)
        factor = 1.0
    else:
        factor = scale
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1) * factor)
    shift = higher
    if MASKED:
        shift = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2(score * factor - shift[:, None])
    fade = tl.exp2(top - shift)
    norm = norm * fade + tl.sum(weight, 1)
    acc = dot(cast(weight, v.dtype), v, acc * fade[:, None])
    return acc, norm, higher


@triton.jit
def _edge(i, sinks, lead, whole, sink_from, band_from, BLOCK_N: tl.constexpr):
    """Tile i of a list of edge tiles: those of sinks, `lead` at the far end of the band, and what follows `whole` tiles of it.

    Returns its first position and whether it is of sinks.
    """
    in_sinks = i < sinks
    tile = i - sinks
    tile += tl.where(tile < lead, 0, whole)
    return tl.where(in_sinks, sink_from + i * BLOCK_N, band_from + tile * BLOCK_N), in_sinks


@triton.jit
def span_prefill_kernel(
    query, key, value, key_cache, value_cache, length, span, capacity, offset, new_tokens, key_scale, value_scale, output, lse,
    scale, softcap, sink, tokens, pairs, kv_heads, group, slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Program x: block of rows x // pairs, from the last on since those see most, of (row, KV head) x % pairs.

    Writes output [batch, tokens, heads * D] and, unless None, lse [batch, heads, tokens].
    """
    pair = tl.program_id(0) % pairs
    block = tl.cdiv(tokens * group, BLOCK_M) - 1 - tl.program_id(0) // pairs
    row = pair // kv_heads
    head = pair % kv_heads
    past = 0
    if key_cache is not None:
        past = tl.load(length + row)
    count = tokens
    if new_tokens is not None:
        count = tl.load(new_tokens + row)
    reach = tl.load(span + pair)
    if key_cache is not None:
        # The host cannot see a span over its head's capacity. As long as no token has left the ring any span will do.
        room = tl.load(capacity + head)
        reach = tl.where(past <= room, reach, tl.minimum(reach, room))
    window = tl.maximum(reach - sink, 1)

    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    token = r // group
    live = token < count
    at = past + token
    first_at = past + block * BLOCK_M // group
    last_at = past + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // group, count - 1)
    # A block past the row's last token has no tiles.
    there = first_at <= last_at
    heads = kv_heads * group
    q_row = ((row.to(tl.int64) * tokens + token) * heads + head * group + r % group) * D
    in_q = live[:, None] & in_d[None, :]
    q = tl.load(query + q_row[:, None] + d[None, :], in_q, 0.0)
    factor = scale
    if key_scale is not None:
        k_scale = tl.load(key_scale + head)
        v_scale = tl.load(value_scale + head)
        factor *= k_scale
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Of the band, the block sees [low, last_at]; all its rows see [all_from, first_at].
    low = tl.maximum(sink, first_at - window + 1)
    all_from = last_at - window + 1

    if key_cache is not None:
        ring = tl.load(capacity + head) - sink
        first_slot = row.to(tl.int64) * slots + tl.load(offset + head)
        keys = key_cache + first_slot * D + d[:, None]
        values = value_cache + first_slot * D + d[None, :]
        start = (low - sink) % ring
        held = tl.maximum(past - low, 0)
        sinks_end = tl.minimum(past, sink)
        sink_tiles = tl.cdiv(sinks_end, BLOCK_N)
        tiles = tl.cdiv(held, BLOCK_N)
        lead = tl.minimum(tl.cdiv(tl.maximum(all_from - low, 0), BLOCK_N), tiles)
        whole = tl.maximum(held // BLOCK_N - lead, 0)
        edges = tl.where(there, sink_tiles + tiles - whole, 0)
        for i in range(0, edges):
            first, in_sinks = _edge(i, sink_tiles, lead, whole, 0, low, BLOCK_N)
            position = first + n
            inside = position < tl.where(in_sinks, sinks_end, past)
            slot = start + position - low
            slot = tl.where(in_sinks, position, sink + slot - tl.where(slot >= ring, ring, 0))
            k = tl.load(keys + slot[None, :] * D, inside[None, :] & in_d[:, None], 0.0)
            v = tl.load(values + slot[:, None] * D, inside[:, None] & in_d[None, :], 0.0)
            seen = inside[None, :] & (in_sinks | (at[:, None] - position[None, :] < window))
            acc, norm, top = _online(acc, norm, top, q, k.to(q.dtype), v.to(q.dtype), seen, factor, softcap, True, SOFTCAP)
        for i in range(lead, tl.where(there, lead + whole, lead)):
            slot = start + i * BLOCK_N + n
            slot = sink + slot - tl.where(slot >= ring, ring, 0)
            if BLOCK_D == D:
                k = tl.load(keys + slot[None, :] * D)
                v = tl.load(values + slot[:, None] * D)
            else:
                k = tl.load(keys + slot[None, :] * D, in_d[:, None], 0.0)
                v = tl.load(values + slot[:, None] * D, in_d[None, :], 0.0)
            acc, norm, top = _online(acc, norm, top, q, k.to(q.dtype), v.to(q.dtype), None, factor, softcap, False, SOFTCAP)

    # The chunk's own keys lie `step` apart; those that are sinks come before the band.
    step = kv_heads * D
    own = row.to(tl.int64) * tokens * step + head * D
    band = tl.maximum(low, past)
    width = tl.maximum(last_at + 1 - band, 0)
    sinks_end = tl.minimum(sink, last_at + 1)
    sink_tiles = tl.cdiv(tl.maximum(sinks_end - past, 0), BLOCK_N)
    tiles = tl.cdiv(width, BLOCK_N)
    lead = tl.minimum(tl.cdiv(tl.maximum(all_from - band, 0), BLOCK_N), tiles)
    whole = tl.maximum(tl.maximum(first_at + 1 - band, 0) // BLOCK_N - lead, 0)
    edges = tl.where(there, sink_tiles + tiles - whole, 0)
    for i in range(0, edges):
        first, in_sinks = _edge(i, sink_tiles, lead, whole, past, band, BLOCK_N)
        position = first + n
        inside = position < tl.where(in_sinks, sinks_end, last_at + 1)
        tile = own + (first - past).to(tl.int64) * step
        k = tl.load(key + tile + n[None, :] * step + d[:, None], inside[None, :] & in_d[:, None], 0.0)
        v = tl.load(value + tile + n[:, None] * step + d[None, :], inside[:, None] & in_d[None, :], 0.0)
        if key_scale is not None:
            k = stored(k, k_scale, q.dtype)
            v = stored(v, v_scale, q.dtype)
        ahead = at[:, None] - position[None, :]
        seen = inside[None, :] & (ahead >= 0) & (in_sinks | (ahead < window))
        acc, norm, top = _online(acc, norm, top, q, k, v, seen, factor, softcap, True, SOFTCAP)
    for i in range(lead, tl.where(there, lead + whole, lead)):
        tile = own + (band - past + i * BLOCK_N).to(tl.int64) * step
        if BLOCK_D == D:
            k = tl.load(key + tile + n[None, :] * step + d[:, None])
            v = tl.load(value + tile + n[:, None] * step + d[None, :])
        else:
            k = tl.load(key + tile + n[None, :] * step + d[:, None], in_d[:, None], 0.0)
            v = tl.load(value + tile + n[:, None] * step + d[None, :], in_d[None, :], 0.0)
        if key_scale is not None:
            k = stored(k, k_scale, q.dtype)
            v = stored(v, v_scale, q.dtype)
        acc, norm, top = _online(acc, norm, top, q, k, v, None, factor, softcap, False, SOFTCAP)

    if key_scale is not None:
        acc *= v_scale
    norm = tl.where(live, norm, 1.0)
    result = tl.where(live[:, None], acc / norm[:, None], 0.0)
    in_out = (token < tokens)[:, None] & in_d[None, :]
    tl.store(output + q_row[:, None] + d[None, :], cast(result, output.dtype.element_ty), in_out)
    if lse is not None:
        log = tl.where(live, (top + tl.log2(norm)) * LN2, float("-inf"))
        tl.store(lse + (row.to(tl.int64) * heads + head * group + r % group) * tokens + token, log, token < tokens)


def span_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    length: Tensor | None,
    span: Tensor,
    capacity: Tensor | None,
    offset: Tensor | None,
    *,
    num_heads: int,
    sink: int = 64,
    scale: float | None = None,
    softcap: float = 0.0,
    new_tokens: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a chunk: output [batch, tokens, num_heads * dim], with `return_lse` also lse [batch, num_heads, tokens].

    query [batch, tokens, num_heads * dim]; key, value [batch, tokens, kv_heads * dim], not in the caches yet; caches [batch,
    slots, dim]; length and new_tokens [batch]; span [batch, kv_heads]; capacity, offset [kv_heads]; all integers int32. Without
    caches (None, with length, capacity and offset) there is no past. Rows of `new_tokens` have fewer tokens: what is beyond gives
    zeros and lse -inf. The caches are read only: `ring_update` writes the chunk. `out`: output and lse to write to. Meaning and
    limits as docs/ops/SpanAttention.md; UserError for what the kernel does not take, before anything is launched.
    """
    shape = checks.attention(query, key, value, key_cache, value_cache, length, span, capacity, offset, num_heads, sink, scale,
                             softcap, new_tokens, key_scale, value_scale)  # fmt: skip
    output, lse = out or checks.results(query, num_heads, return_lse)
    launch = config(shape.dim, 2 if key_cache is None else key_cache.element_size(), arch_of(query.device))
    pairs = shape.batch * shape.kv_heads
    blocks = pairs * triton.cdiv(shape.tokens * shape.group, launch.block_m)
    if blocks:
        with checks.device_of(query):
            span_prefill_kernel[(blocks,)](
                query, key, value, key_cache, value_cache, length, span, capacity, offset, new_tokens, key_scale, value_scale,
                output, lse, shape.scale if softcap else shape.scale * LOG2E, softcap, sink, shape.tokens, pairs, shape.kv_heads,
                shape.group, shape.slots, D=shape.dim, BLOCK_D=tile_dim(shape.dim), BLOCK_M=launch.block_m,
                BLOCK_N=launch.block_n, SOFTCAP=softcap > 0, num_warps=launch.num_warps, num_stages=launch.num_stages,
                **OPTIONS,
            )  # fmt: skip
    return output if lse is None else (output, lse)

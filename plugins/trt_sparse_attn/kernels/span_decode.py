"""Attention of one new token a row: the kept slots of all heads as one flat list of tiles, cut evenly over a fixed grid.

The list runs over (row, KV head) pairs and holds each pair's tiles of kept slots. Every worker takes the same number of
consecutive tiles, whatever heads they belong to, so a long head never sets the time and a plan costs the bytes it keeps. Each
worker finds its part from lengths and spans by itself: no list in memory, no synchronisation with the host, one launch less.
`merge_chunks` joins the parts by log-sum-exp, adds the new token's own term, and can write the new key and value to the ring.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspan.plugins.trt_sparse_attn.kernels import checks
from attnspan.plugins.trt_sparse_attn.kernels.common import (
    INTERPRET,
    LOG2E,
    OPTIONS,
    Config,
    arch_of,
    cast,
    dot,
    kept_tokens,
    pair_tiles,
    scaled,
    shared_bytes,
    tile_dim,
    tiles_each,
)
from attnspan.plugins.trt_sparse_attn.kernels.merge_chunks import BLOCK_C, merge_chunks_kernel

BLOCK_P = 16 if INTERPRET else 256
"""Pairs whose tiles are counted at a time; few in the interpreter, so that small tests take more than one turn."""
BLOCK_G = 16
"""Query heads of a tile: the least that a tensor core takes. Larger groups take more blocks and read their keys again."""


def config(head_dim: int, element_bytes: int, arch: int) -> Config:
    """Tile and pipeline for a cache of `element_bytes` per element.

    Two tiles of keys and values are in memory or on their way. With 64 KiB of them, three blocks fit a multiprocessor of 227 KiB,
    and twice the 36 KiB is in flight that cover the latency of HBM3e at 4.8 TB/s. Where shared memory is less, so are tiles.
    """
    if arch == 0:
        return Config(BLOCK_G, 32, 1, 1)
    if element_bytes == 1:  # more registers for a tile, as each element is widened: fewer rows and one tile more on its way
        return Config(BLOCK_G, max(16, min(64, (8 << 10) // tile_dim(head_dim))), 4, 4)
    keys = (16 if shared_bytes(arch) > (200 << 10) else 8) << 10
    return Config(BLOCK_G, max(16, min(128, keys // (tile_dim(head_dim) * element_bytes))), 4, 3)


def workers_per_sm(element_bytes: int, arch: int) -> int:
    """Blocks of `span_decode` that fit a multiprocessor, by shared memory and registers: one wave of equal parts."""
    return 3 if element_bytes > 1 and shared_bytes(arch) > (100 << 10) else 2


@triton.jit
def span_decode_kernel(
    query, key_cache, value_cache, length, span, capacity, offset, new_tokens, key_scale, value_scale, part, part_lse,
    scale, softcap, sink, pairs, kv_heads, group, slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Worker x of the grid attends to its tiles, for heads [16 y, 16 y + 16) of each group.

    Writes part [workers + pairs, group, D] and part_lse [workers + pairs, group] (log2), at index worker + pair: both grow along
    the list, so no two parts share one, and the parts of a pair lie side by side.
    """
    worker = tl.program_id(0)
    workers = tl.num_programs(0)
    some = tl.arange(0, BLOCK_P)
    total = 0
    for first in range(0, pairs, BLOCK_P):
        total += tl.sum(pair_tiles(first + some, length, span, capacity, new_tokens, pairs, kv_heads, sink, BLOCK_N))
    chunk = tiles_each(total, workers)
    tile = worker * chunk
    last = tl.minimum(tile + chunk, total)
    # The pair of tile `tile`, and the list's index of its first tile.
    pair = 0
    pair_first = 0
    before = 0
    for first in range(0, pairs, BLOCK_P):
        tiles = pair_tiles(first + some, length, span, capacity, new_tokens, pairs, kv_heads, sink, BLOCK_N)
        end = before + tl.cumsum(tiles)
        passed = (end <= tile) & (first + some < pairs)
        pair += tl.sum(passed.to(tl.int32))
        pair_first = tl.maximum(pair_first, tl.max(tl.where(passed, end, 0)))
        before += tl.sum(tiles)

    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    in_d = d < D
    while tile < last:
        row = pair // kv_heads
        head = pair % kv_heads
        at = tl.load(length + row)
        room = tl.load(capacity + head)
        sinks, recent = kept_tokens(at, tl.load(span + pair), room, sink)
        ring = room - sink
        kept = sinks + recent
        tiles = tl.cdiv(kept, BLOCK_N)
        if new_tokens is not None:
            tiles = tl.where(tl.load(new_tokens + row) > 0, tiles, 0)
        begin = tile - pair_first
        end = tl.minimum(tiles, last - pair_first)
        if begin < end:
            # Kept slots in the order of memory: two runs, sinks with what has wrapped round the ring, then the rest.
            start = tl.where(recent > 0, (at - recent - sink) % ring, 0)
            wrapped = tl.maximum(start + recent - ring, 0)
            run = sinks + wrapped
            gap = start - wrapped
            first_slot = row.to(tl.int64) * slots + tl.load(offset + head)
            keys = key_cache + first_slot * D + d[:, None]
            values = value_cache + first_slot * D + d[None, :]
            q = query + pair.to(tl.int64) * group * D + g[:, None] * D + d[None, :]
            q = tl.load(q, (g < group)[:, None] & in_d[None, :], 0.0)
            factor = tl.full([BLOCK_G], 1.0, tl.float32) * scale
            if key_scale is not None:
                # e4m3 widens to fp16 in one instruction and to bf16 in four: products in fp16, with rows of q at most 1.
                most = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)
                q = cast(q.to(tl.float32) / most[:, None], tl.float16)
                factor *= most * tl.load(key_scale + head)
            top = tl.full([BLOCK_G], float("-inf"), tl.float32)
            # One sum per score column: summed over columns once, at the end.
            norm = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
            acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
            for i in range(begin, end):
                j = i * BLOCK_N + n
                there = j < kept
                slot = j + tl.where(j >= run, gap, 0)
                if BLOCK_D == D:
                    k = tl.load(keys + slot[None, :] * D, there[None, :], 0.0, eviction_policy="evict_first")
                    v = tl.load(values + slot[:, None] * D, there[:, None], 0.0, eviction_policy="evict_first")
                else:
                    k = tl.load(keys + slot[None, :] * D, there[None, :] & in_d[:, None], 0.0, eviction_policy="evict_first")
                    v = tl.load(values + slot[:, None] * D, there[:, None] & in_d[None, :], 0.0, eviction_policy="evict_first")
                score = dot(q, k.to(q.dtype), tl.zeros([BLOCK_G, BLOCK_N], tl.float32))
                score = tl.where(there[None, :], scaled(score, factor[:, None], softcap, SOFTCAP), float("-inf"))
                # Every tile has a key: `higher` is finite.
                higher = tl.maximum(top, tl.max(score, 1))
                weight = tl.exp2(score - higher[:, None])
                fade = tl.exp2(top - higher)
                norm = norm * fade[:, None] + weight
                acc = dot(cast(weight, q.dtype), v.to(q.dtype), acc * fade[:, None])
                top = higher
            sums = tl.sum(norm, 1)
            acc = acc / sums[:, None]
            if value_scale is not None:
                acc *= tl.load(value_scale + head)
            to = (worker + pair).to(tl.int64) * group + g
            tl.store(part + to[:, None] * D + d[None, :], acc, (g < group)[:, None] & in_d[None, :])
            tl.store(part_lse + to, top + tl.log2(sums), g < group)
        pair_first += tiles
        tile = tl.minimum(pair_first, last)
        pair += 1


@cache
def workers_of(device: torch.device, element_bytes: int) -> int:
    """Workers of the grid: one wave of the device."""
    if device.type != "cuda":
        return 5
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return workers_per_sm(element_bytes, arch_of(device)) * processors


def scratch_size(batch: int, kv_heads: int, group: int, dim: int, workers: int) -> int:
    """Numbers that both launches of a step share: part [workers + pairs, group, dim], then part_lse [workers + pairs, group]."""
    return (workers + batch * kv_heads) * group * (dim + 1)


def span_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
    span: Tensor,
    capacity: Tensor,
    offset: Tensor,
    *,
    num_heads: int,
    sink: int = 64,
    scale: float | None = None,
    softcap: float = 0.0,
    new_tokens: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
    update: bool = False,
    workers: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    scratch: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one token a row: output [batch, 1, num_heads * dim], with `return_lse` also lse [batch, num_heads, 1].

    query [batch, 1, num_heads * dim]; key, value [batch, 1, kv_heads * dim], the new token's, not in the caches yet; caches
    [batch, slots, dim]; length [batch]; span [batch, kv_heads]; capacity, offset [kv_heads]; all integers int32. `update` also
    writes the new token to the caches, as `ring_update` does. `workers`: blocks that share the work, by default one wave. `out`:
    output and lse to write to; `scratch`: fp32, `scratch_size` elements or more, its content is lost.
    Meaning and limits as docs/ops/SpanAttention.md; UserError for what the kernels do not take, before anything is launched.
    """
    shape = checks.attention(query, key, value, key_cache, value_cache, length, span, capacity, offset, num_heads, sink, scale,
                             softcap, new_tokens, key_scale, value_scale)  # fmt: skip
    if shape.tokens != 1:
        raise checks.UserError(f"query holds {shape.tokens} tokens a row: span_decode takes 1; use span_prefill")
    pairs, group = shape.batch * shape.kv_heads, shape.group
    workers = workers or workers_of(query.device, key_cache.element_size())
    launch = config(shape.dim, key_cache.element_size(), arch_of(query.device))
    size = scratch_size(shape.batch, shape.kv_heads, group, shape.dim, workers)
    scratch = torch.empty(size, dtype=torch.float32, device=query.device) if scratch is None else scratch.view(-1)[:size]
    part, part_lse = scratch[: size // (shape.dim + 1) * shape.dim], scratch[size // (shape.dim + 1) * shape.dim :]
    output, lse = out or checks.results(query, num_heads, return_lse)
    numbers = (shape.scale if softcap else shape.scale * LOG2E, softcap, sink, pairs, shape.kv_heads, group, shape.slots)
    tile = {"D": shape.dim, "BLOCK_D": tile_dim(shape.dim), "BLOCK_N": launch.block_n, "BLOCK_P": BLOCK_P, "SOFTCAP": softcap > 0}
    with checks.device_of(query):
        span_decode_kernel[(workers, triton.cdiv(group, BLOCK_G))](
            query, key_cache, value_cache, length, span, capacity, offset, new_tokens, key_scale, value_scale, part, part_lse,
            *numbers, **tile, BLOCK_G=BLOCK_G, num_warps=launch.num_warps, num_stages=launch.num_stages, **OPTIONS,
        )  # fmt: skip
        merge_chunks_kernel[(pairs * group,)](
            query, key, value, key_cache, value_cache, length, span, capacity, offset, new_tokens, key_scale, value_scale, part,
            part_lse, output, lse, *numbers, workers, int(update), **tile, BLOCK_C=BLOCK_C, num_warps=4, num_stages=1,
            **OPTIONS,
        )  # fmt: skip
    return output if lse is None else (output, lse)

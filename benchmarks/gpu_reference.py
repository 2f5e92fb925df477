"""Reference of the kernels in PyTorch, fp32 and written to be read: the meaning of docs/ops/SpanAttention.md, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

SINK = 64
FP8 = torch.float8_e4m3fn


def stored(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """x [..., kv_heads, dim] as a cache of `dtype` holds it; fp8: x / scale, clipped to its range, to nearest even."""
    if dtype != FP8:
        return x.to(dtype)
    assert scale is not None
    return (x.float() / scale[:, None]).clamp(-448, 448).to(FP8)


def loaded(x: Tensor, scale: Tensor | None) -> Tensor:
    """The real values, in fp32, of what is stored: x [..., kv_heads, dim]."""
    return x.float() if scale is None else x.float() * scale[:, None]


def held_positions(length: int, capacity: int, device: torch.device) -> Tensor:
    """Position in each slot of a head after `length` tokens; -1: none. [capacity]"""
    slot = torch.arange(capacity, device=device)
    ring = capacity - SINK
    turns = torch.div(length - 1 - slot, ring, rounding_mode="floor")
    in_ring = torch.where(turns >= 0, slot + turns * ring, -1)
    return torch.where(slot < SINK, torch.where(slot < length, slot, -1), in_ring)


def attention(
    query: Tensor, key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor] | None, length: list[int], span: Tensor,
    capacity: list[int], heads: int, softcap: float, new_tokens: list[int], scales: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [batch, tokens, heads * dim] and lse [batch, heads, tokens], both fp32. Rows past new_tokens give zeros and -inf."""
    batch, tokens, width = query.shape
    dim, kv_heads = width // heads, span.shape[1]
    group = heads // kv_heads
    kind = key.dtype if caches is None else caches[0].dtype
    q = query.view(batch, tokens, kv_heads, group, dim).float()
    fresh = [loaded(stored(x.view(batch, tokens, kv_heads, dim), kind, s), s) for x, s in zip((key, value), scales, strict=True)]
    output = torch.zeros(batch, tokens, kv_heads, group, dim, device=query.device)
    lse = torch.full((batch, kv_heads, group, tokens), float("-inf"), device=query.device)
    for b in range(batch):
        at = length[b] + torch.arange(new_tokens[b], device=query.device)
        first = 0
        for h in range(kv_heads):
            parts, positions = [x[b, : new_tokens[b], h] for x in fresh], at
            if caches is not None:
                held = held_positions(length[b], capacity[h], query.device)
                slots = slice(first, first + capacity[h])
                first += capacity[h]
                real = [
                    loaded(c[b, slots][:, None], s if s is None else s[h : h + 1])[:, 0]
                    for c, s in zip(caches, scales, strict=True)
                ]
                parts = [torch.cat([old[held >= 0], new]) for old, new in zip(real, parts, strict=True)]
                positions = torch.cat([held[held >= 0], at])
            far = at[:, None] - positions[None, :]
            seen = (far >= 0) & ((positions < SINK)[None, :] | (far < int(span[b, h]) - SINK))
            score = torch.einsum("igd,nd->gin", q[b, : new_tokens[b], h], parts[0]) * dim**-0.5
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            score = score.masked_fill(~seen, float("-inf"))
            lse[b, h, :, : new_tokens[b]] = score.logsumexp(-1)
            output[b, : new_tokens[b], h] = torch.einsum("gin,nd->igd", score.softmax(-1), parts[1])
    return output.view(batch, tokens, width), lse.view(batch, heads, tokens)


def update(
    key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor], length: list[int], capacity: list[int], new_tokens: list[int],
    scales: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The caches after the chunk was written: of tokens that share a slot the last one stays."""
    batch, tokens, _ = key.shape
    dim, kv_heads = caches[0].shape[-1], len(capacity)
    out = []
    for x, cache, scale in zip((key, value), caches, scales, strict=True):
        written = stored(x.view(batch, tokens, kv_heads, dim), cache.dtype, scale)
        # Bytes, because fp8 tensors cannot be indexed everywhere.
        after, bits = cache.clone().view(torch.uint8), written.contiguous().view(torch.uint8)
        for b in range(batch):
            position = length[b] + torch.arange(new_tokens[b], device=x.device)
            first = 0
            for h in range(kv_heads):
                ring = capacity[h] - SINK
                stays = (position < SINK) | (position >= length[b] + new_tokens[b] - ring)
                slot = torch.where(position < SINK, position, SINK + (position - SINK) % ring)
                after[b, first + slot[stays]] = bits[b, : new_tokens[b], h][stays]
                first += capacity[h]
        out.append(after.view(cache.dtype))
    return out[0], out[1]


def sign_products(x: Tensor, projection: Tensor) -> Tensor:
    """x [..., dim] @ projection [dim, columns] in fp64 after rounding both to bfloat16; a bit is set where it is above 0."""
    return x.bfloat16().double() @ projection.bfloat16().double()

"""The kernels as PyTorch ops `torch.ops.attnspan.*`, with shapes for torch.compile.

They work on CUDA tensors, and on CPU tensors where Triton interprets; there, lengths and spans are checked by value, too.
`span_attention` and `ring_update` change the caches in place. Arguments as the functions of the same name in `kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnspan.plugins.trt_sparse_attn import kernels
from attnspan.plugins.trt_sparse_attn.kernels import checks

__all__ = ["lsh_hash", "merge", "ring_update", "span_attention", "span_decode", "span_prefill"]


def _check(
    length: Tensor | None, span: Tensor, capacity: Tensor | None, offset: Tensor | None, cache: Tensor | None, sink: int
) -> None:
    if span.device.type == "cpu" and cache is not None:
        assert length is not None
        assert capacity is not None
        assert offset is not None
        checks.values(length, span, capacity, offset, cache.shape[1], sink)


def _pair(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    assert isinstance(result, tuple)
    return result


def _like_attention(query: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[0], num_heads, query.shape[1], dtype=torch.float32)


@torch.library.custom_op("attnspan::span_prefill", mutates_args=())
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
    num_heads: int,
    sink: int = 64,
    scale: float | None = None,
    softcap: float = 0.0,
    new_tokens: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk: output [batch, tokens, num_heads * dim], lse [batch, num_heads, tokens]."""
    _check(length, span, capacity, offset, key_cache, sink)
    return _pair(kernels.span_prefill(
        query, key, value, key_cache, value_cache, length, span, capacity, offset, num_heads=num_heads, sink=sink, scale=scale,
        softcap=softcap, new_tokens=new_tokens, key_scale=key_scale, value_scale=value_scale, return_lse=True,
    ))  # fmt: skip


@span_prefill.register_fake
def _(query, key, value, key_cache, value_cache, length, span, capacity, offset, num_heads, *_, **__):  # type: ignore[no-untyped-def]
    return _like_attention(query, num_heads)


@torch.library.custom_op("attnspan::span_decode", mutates_args=())
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
    num_heads: int,
    sink: int = 64,
    scale: float | None = None,
    softcap: float = 0.0,
    new_tokens: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one token a row, the caches as they were: output [batch, 1, num_heads * dim], lse [batch, num_heads, 1]."""
    _check(length, span, capacity, offset, key_cache, sink)
    return _pair(kernels.span_decode(
        query, key, value, key_cache, value_cache, length, span, capacity, offset, num_heads=num_heads, sink=sink, scale=scale,
        softcap=softcap, new_tokens=new_tokens, key_scale=key_scale, value_scale=value_scale, return_lse=True,
    ))  # fmt: skip


@span_decode.register_fake
def _(query, key, value, key_cache, value_cache, length, span, capacity, offset, num_heads, *_, **__):  # type: ignore[no-untyped-def]
    return _like_attention(query, num_heads)


@torch.library.custom_op("attnspan::span_attention", mutates_args=("key_cache", "value_cache"))
def span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
    span: Tensor,
    capacity: Tensor,
    offset: Tensor,
    num_heads: int,
    sink: int = 64,
    scale: float | None = None,
    softcap: float = 0.0,
    new_tokens: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk or a step, then the caches hold it: output [batch, tokens, num_heads * dim], lse [batch, num_heads,
    tokens]."""
    _check(length, span, capacity, offset, key_cache, sink)
    return _pair(kernels.span_attention(
        query, key, value, key_cache, value_cache, length, span, capacity, offset, num_heads=num_heads, sink=sink, scale=scale,
        softcap=softcap, new_tokens=new_tokens, key_scale=key_scale, value_scale=value_scale, return_lse=True,
    ))  # fmt: skip


@span_attention.register_fake
def _(query, key, value, key_cache, value_cache, length, span, capacity, offset, num_heads, *_, **__):  # type: ignore[no-untyped-def]
    return _like_attention(query, num_heads)


@torch.library.custom_op("attnspan::ring_update", mutates_args=("key_cache", "value_cache"))
def ring_update(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
    capacity: Tensor,
    offset: Tensor,
    sink: int = 64,
    new_tokens: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Writes a chunk's keys and values to their slots."""
    kernels.ring_update(key, value, key_cache, value_cache, length, capacity, offset, sink=sink, new_tokens=new_tokens,
                        key_scale=key_scale, value_scale=value_scale)  # fmt: skip


@ring_update.register_fake
def _(*_, **__):  # type: ignore[no-untyped-def]
    return None


@torch.library.custom_op("attnspan::lsh_hash", mutates_args=())
def lsh_hash(
    x: Tensor,
    projection: Tensor,
    num_heads: int,
    bits: int | None = None,
    tables: int | None = None,
    signature_bits: int | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    """Codes int16 [batch, tokens, num_heads, tables], or signatures int32 [batch, tokens, num_heads, signature_bits / 32]."""
    kind = {"bits": bits, "tables": tables, "signature_bits": signature_bits}
    return kernels.lsh_hash(x, projection, num_heads=num_heads, mean=mean, **kind)


@lsh_hash.register_fake
def _(x, projection, num_heads, bits=None, tables=None, signature_bits=None, mean=None):  # type: ignore[no-untyped-def]
    count, dtype = (tables, torch.int16) if signature_bits is None else (signature_bits // 32, torch.int32)
    return x.new_empty(*x.shape[:2], num_heads, count, dtype=dtype)


@torch.library.custom_op("attnspan::merge", mutates_args=())
def merge(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins (output, lse) pairs of attention over parts of the keys."""
    return kernels.merge(outputs, lses)


@merge.register_fake
def _(outputs, lses):  # type: ignore[no-untyped-def]
    return torch.empty_like(outputs[0]), torch.empty_like(lses[0])

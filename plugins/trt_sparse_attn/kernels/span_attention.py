"""Attention of a chunk or a step, and the caches brought on: what a layer calls."""

from __future__ import annotations

from torch import Tensor

from attnspan.plugins.trt_sparse_attn.kernels.ring_update import ring_update
from attnspan.plugins.trt_sparse_attn.kernels.span_decode import span_decode
from attnspan.plugins.trt_sparse_attn.kernels.span_prefill import span_prefill


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
    *,
    num_heads: int,
    sink: int = 64,
    scale: float | None = None,
    softcap: float = 0.0,
    new_tokens: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
    workers: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    scratch: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """SpanAttention in place: `span_decode` for one token a row, else `span_prefill`; then the caches hold the chunk, too.

    Arguments and results as theirs; `workers` and `scratch` are for `span_decode`. `length` is not changed: the caller adds what
    was new.
    """
    tensors = (query, key, value, key_cache, value_cache, length, span, capacity, offset)
    if query.dim() == 3 and query.shape[1] == 1:
        return span_decode(*tensors, num_heads=num_heads, sink=sink, scale=scale, softcap=softcap, new_tokens=new_tokens,
                           key_scale=key_scale, value_scale=value_scale, return_lse=return_lse, update=True, workers=workers,
                           out=out, scratch=scratch)  # fmt: skip
    result = span_prefill(*tensors, num_heads=num_heads, sink=sink, scale=scale, softcap=softcap, new_tokens=new_tokens,
                          key_scale=key_scale, value_scale=value_scale, return_lse=return_lse, out=out)  # fmt: skip
    ring_update(key, value, key_cache, value_cache, length, capacity, offset, sink=sink, new_tokens=new_tokens,
                key_scale=key_scale, value_scale=value_scale)  # fmt: skip
    return result

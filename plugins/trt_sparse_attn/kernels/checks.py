"""What the kernels take, checked before anything is launched and without waiting for the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn.kernels.common import DTYPES, FP8, FP8_ARCH, HEAD_DIMS, INTERPRET, arch_of

__all__ = ["MARGIN", "Shape", "UserError", "attention", "device_of", "new_keys", "one_device", "one_of", "results", "shaped",
           "values"]  # fmt: skip

MARGIN = 64
"""Tokens that a head's capacity and span hold besides its sinks, at least."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, and the scale in force."""

    batch: int
    tokens: int
    kv_heads: int
    group: int
    dim: int
    slots: int
    scale: float


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """UserError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UserError(f"{name} is {value}: must be one of {', '.join(str(a) for a in allowed)}")


def shaped(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """UserError unless the tensor is contiguous and has that shape and, if given, type."""
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {list(tensor.shape)}: must be {list(shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise UserError(f"{name} is {tensor.dtype}: must be {dtype}")
    if not tensor.is_contiguous():
        raise UserError(f"{name} has strides {tensor.stride()}: must be contiguous")


def one_device(**tensors: Tensor | None) -> None:
    """UserError unless all tensors are on one device that kernels can run on."""
    there = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    name, device = next(iter(there.items()))
    for other, elsewhere in there.items():
        if elsewhere != device:
            raise UserError(f"{name} is on {device}, {other} on {elsewhere}: tensors must be on one device")
    if device.type != "cuda" and not (INTERPRET and device.type == "cpu"):
        raise UserError(f"tensors are on {device}: must be on cuda, or on cpu with TRITON_INTERPRET=1 set before Python starts")


def _scales(cache: Tensor, key_scale: Tensor | None, value_scale: Tensor | None, kv_heads: int) -> None:
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if (scale is not None) != (cache.dtype == FP8):
            raise UserError(f"{name} is {'given' if scale is not None else 'missing'} for a {cache.dtype} cache: goes with {FP8}")
        if scale is not None:
            shaped(name, scale, (kv_heads,), torch.float32)


def _caches(key_cache: Tensor, value_cache: Tensor, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Slots and head size."""
    if key_cache.dim() != 3:
        raise UserError(f"key_cache has shape {list(key_cache.shape)}: must be [batch, slots, dim]")
    _, slots, dim = key_cache.shape
    one_of("key_cache's type", key_cache.dtype, (dtype, FP8))
    if key_cache.dtype == FP8 and 0 < arch_of(key_cache.device) < FP8_ARCH:
        raise UserError(f"key_cache is {FP8} on sm_{arch_of(key_cache.device)}: must be {dtype} below sm_{FP8_ARCH}")
    shaped("key_cache", key_cache, (batch, slots, dim))
    shaped("value_cache", value_cache, (batch, slots, dim), key_cache.dtype)
    return slots, dim


def results(query: Tensor, num_heads: int, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """New tensors for the output, as query [batch, tokens, num_heads * dim], and the lse [batch, num_heads, tokens] if wanted."""
    batch, tokens, _ = query.shape
    lse = torch.empty(batch, num_heads, tokens, dtype=torch.float32, device=query.device) if with_lse else None
    return torch.empty_like(query), lse


def new_keys(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
    capacity: Tensor,
    offset: Tensor,
    sink: int,
    new_tokens: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Shape:
    """Checks what `ring_update` is given; UserError names the value got and those allowed."""
    one_device(key=key, value=value, key_cache=key_cache, value_cache=value_cache, length=length, capacity=capacity,
               offset=offset, new_tokens=new_tokens, key_scale=key_scale, value_scale=value_scale)  # fmt: skip
    if key.dim() != 3:
        raise UserError(f"key has shape {list(key.shape)}: must be [batch, tokens, kv_heads * dim]")
    batch, tokens, width = key.shape
    one_of("key's type", key.dtype, DTYPES)
    slots, dim = _caches(key_cache, value_cache, batch, key.dtype)
    one_of("head_dim", dim, HEAD_DIMS)
    if capacity.dim() != 1 or width != capacity.shape[0] * dim:
        raise UserError(
            f"key has shape {list(key.shape)}, capacity {list(capacity.shape)}: must be [batch, tokens, kv_heads * {dim}] "
            "and [kv_heads]"
        )
    kv_heads = capacity.shape[0]
    shaped("key", key, (batch, tokens, width))
    shaped("value", value, (batch, tokens, width), key.dtype)
    shaped("length", length, (batch,), torch.int32)
    shaped("capacity", capacity, (kv_heads,), torch.int32)
    shaped("offset", offset, (kv_heads,), torch.int32)
    if new_tokens is not None:
        shaped("new_tokens", new_tokens, (batch,), torch.int32)
    _scales(key_cache, key_scale, value_scale, kv_heads)
    if slots < kv_heads * (sink + MARGIN) or sink < 0:
        raise UserError(f"key_cache holds {slots} slots for {kv_heads} heads: each needs {sink} sinks and {MARGIN} more at least")
    return Shape(batch, tokens, kv_heads, 0, dim, slots, 0.0)


def attention(
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
    sink: int,
    scale: float | None,
    softcap: float,
    new_tokens: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Shape:
    """Checks what the attention kernels are given; UserError names the value got and those allowed.

    Without caches there are no cached tokens: length, capacity and offset are None, too.
    """
    if query.dim() != 3 or num_heads < 1 or query.shape[-1] % num_heads:
        raise UserError(f"query has shape {list(query.shape)}: must be [batch, tokens, {num_heads} heads * dim]")
    batch, tokens, width = query.shape
    dim = width // num_heads
    one_of("head_dim", dim, HEAD_DIMS)
    one_of("query's type", query.dtype, DTYPES)
    if span.dim() != 2 or num_heads % max(span.shape[1], 1):
        raise UserError(f"span has shape {list(span.shape)}: must be [{batch}, kv_heads], kv_heads a divisor of {num_heads}")
    kv_heads = span.shape[1]
    shaped("query", query, (batch, tokens, width))
    shaped("key", key, (batch, tokens, kv_heads * dim), query.dtype)
    slots = 0
    if key_cache is not None:
        if value_cache is None or length is None or capacity is None or offset is None:
            raise UserError("value_cache, length, capacity or offset is missing: they go with key_cache")
        shape = new_keys(key, value, key_cache, value_cache, length, capacity, offset, sink, new_tokens, key_scale, value_scale)
        if (shape.dim, shape.kv_heads) != (dim, kv_heads):
            raise UserError(f"caches have {shape.kv_heads} heads of {shape.dim}: query and span have {kv_heads} of {dim}")
        slots = shape.slots
    else:
        given = (value_cache, length, capacity, offset, key_scale, value_scale)
        if any(x is not None for x in given):
            raise UserError("key_cache is missing: value_cache, length, capacity, offset and scales go with it")
        shaped("value", value, (batch, tokens, kv_heads * dim), query.dtype)
        if new_tokens is not None:
            shaped("new_tokens", new_tokens, (batch,), torch.int32)
    one_device(query=query, key=key, span=span, key_cache=key_cache)
    shaped("span", span, (batch, kv_heads), torch.int32)
    if sink < 0 or softcap < 0 or (scale is not None and scale <= 0):
        raise UserError(f"sink is {sink}, softcap {softcap}, scale {scale}: sink and softcap must be 0 or more, scale above 0")
    return Shape(batch, tokens, kv_heads, num_heads // kv_heads, dim, slots, dim**-0.5 if scale is None else scale)


def values(length: Tensor, span: Tensor, capacity: Tensor, offset: Tensor, slots: int, sink: int = 64) -> None:
    """Checks what lengths, spans and capacities say, which waits for the device: for debugging, and where tensors are on a CPU.

    length [batch], span [batch, kv_heads], capacity and offset [kv_heads]. UserError for a span below sink + 64, or over its
    head's capacity where tokens have left the ring, a negative length, or heads that do not lie one after another in `slots`.
    """
    spans, capacities, offsets = span.cpu(), capacity.cpu(), offset.cpu()
    if bool((length < 0).any()):
        raise UserError(f"length is {length.tolist()}: must be 0 or more")
    packed = torch.cumsum(capacities, 0) - capacities
    if not torch.equal(packed.int(), offsets) or int(capacities.sum()) != slots:
        raise UserError(f"capacity {capacities.tolist()}, offset {offsets.tolist()}: heads must fill {slots} slots in order")
    low = sink + MARGIN
    bad = (spans < low) | ((spans > capacities) & (length.cpu()[:, None] > capacities))
    if bool(bad.any()):
        b, h = (int(i) for i in bad.nonzero()[0])
        got, most = int(spans[b, h]), int(capacities[h])
        raise UserError(f"span of row {b}, KV head {h} is {got}: must be from {low} to its capacity {most}")

"""Attention of a transformers model with one span per KV head, in tiles, with a backward pass that can be watched.

One tile is `rows` queries of one KV head, all query heads of its group, against the keys they may see; memory is linear in the
number of tokens. Works on any device PyTorch has, in fp32, fp16 and bf16 with fp32 scores and sums (fp64 in fp64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from attnspan.calibration import op_attention
from attnspan.planner.rules import SINK

NAME = "attnspan_calibration"
ROWS = 128
"""Queries of a tile: its scores stay in the second-level cache up to some thousand keys."""


class Watcher(Protocol):
    """Sees every tile of the backward pass; see `attnspan.calibration.influence`."""

    def tile(self, layer: int, head: int, weight: Tensor, gradient: Tensor, base: Tensor) -> None:
        """weight, gradient [group, rows, keys]: w and g of all keys up to the last row's; base [group, rows]: D."""


class Setting:
    """Which spans are in force, and who watches. spans [layers, kv_heads] in tokens; None: dense."""

    def __init__(self, spans: npt.NDArray[np.int32] | None = None, watcher: Watcher | None = None) -> None:
        self.spans, self.watcher = spans, watcher
        self.seen: set[int] = set()


_setting: ContextVar[Setting] = ContextVar("_setting")


@contextmanager
def attention(setting: Setting) -> Iterator[Setting]:
    """Puts a setting in force for the forward and backward passes of hooked models inside the block."""
    token = _setting.set(setting)
    try:
        yield setting
    finally:
        _setting.reset(token)


def hook(model: Any) -> None:
    """Make a transformers model attend through this module; a model that cannot raises what transformers raises."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> tuple[Tensor, None]:
    """The attention that transformers calls: query [batch, heads, tokens, dim], key and value [batch, kv_heads, tokens, dim]."""
    setting = _setting.get()
    layer = module.layer_idx
    setting.seen.add(layer)
    spans = None if setting.spans is None else [int(s) for s in setting.spans[layer]]
    # Without gradients the op that is deployed serves where it is installed.
    quick = (
        not torch.is_grad_enabled()
        and query.device.type == "cpu"
        and query.dtype in op_attention.ELEMENT
        and op_attention.available()
    )
    rows = zip(query, key, value, strict=True)
    if quick:
        out = torch.stack([op_attention.attend(q, k, v, spans, scaling) for q, k, v in rows])
    else:
        out = torch.stack([_Attention.apply(q, k, v, spans, scaling, layer, setting.watcher) for q, k, v in rows])
    return out.transpose(1, 2), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, d] times b [n, d] transposed, in wide precision. bf16 inputs are exact in fp32, so on a CPU the product may run on
    its bf16 units with fp32 sums."""
    wide = _wide(a.dtype)
    if a.dtype != torch.bfloat16 or a.device.type != "cpu":
        return a.to(wide) @ b.to(wide).t()
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return a.to(wide) @ b.to(wide).t()
    finally:
        matmul.fp32_precision = before


def _tiles(tokens: int) -> Iterator[tuple[int, int]]:
    """The last rows first: tiles shrink, so that each fits into the memory that the one before gave back."""
    for first in reversed(range(0, tokens, ROWS)):
        yield first, min(first + ROWS, tokens)


def _keys(first: int, last: int, span: int | None) -> tuple[int, int]:
    """Keys that rows [first, last) see: [0, sinks) and [low, last) with sinks <= low; (0, 0) when there is no gap between."""
    low = 0 if span is None else first - (span - SINK) + 1
    return (SINK, low) if low > SINK else (0, 0)


def _hide(x: Tensor, first: int, last: int, gap: tuple[int, int], span: int | None, value: float) -> Tensor:
    """Writes value where rows [first, last) must not look; x [group, rows, keys without the gap]. Only the columns where some row
    must not are touched: the diagonal and the far edge of the window."""
    rows = last - first
    row = torch.arange(rows, device=x.device)[:, None]
    x[..., -rows:].masked_fill_(row < row.t(), value)
    if span is None:
        return x
    low, high = max(SINK, gap[1]), last - (span - SINK)
    if low < high:
        shift = gap[1] - gap[0]
        key = torch.arange(low, high, device=x.device)
        x[..., low - shift : high - shift].masked_fill_(key <= row + (first - (span - SINK)), value)
    return x


def _cut(x: Tensor, gap: tuple[int, int], last: int) -> Tensor:
    return torch.cat([x[: gap[0]], x[gap[1] : last]]) if gap[1] else x[:last]


class _Attention(torch.autograd.Function):
    """query [heads, tokens, dim], key and value [kv_heads, tokens, dim] -> output [heads, tokens, dim]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: list[int] | None, scale: float, layer: int,
                watcher: Watcher | None) -> Tensor:  # fmt: skip
        heads, tokens, dim = query.shape
        kv_heads = key.shape[0]
        group = heads // kv_heads
        grouped = query.view(kv_heads, group, tokens, dim)
        output = torch.empty_like(grouped)
        lse = query.new_empty(kv_heads, group, tokens, dtype=_wide(query.dtype))
        for h in range(kv_heads):
            span = None if spans is None else spans[h]
            for first, last in _tiles(tokens):
                gap = _keys(first, last, span)
                q = grouped[h, :, first:last].reshape(-1, dim)
                scores = _product(q, _cut(key[h], gap, last)).mul_(scale).view(group, last - first, -1)
                _hide(scores, first, last, gap, span, -math.inf)
                top = scores.amax(-1, keepdim=True)
                weights = scores.sub_(top).exp_()
                total = weights.sum(-1, keepdim=True)
                seen = _cut(value[h], gap, last)
                out = weights.to(value.dtype).view(-1, seen.shape[0]) @ seen
                output[h, :, first:last] = out.view(group, last - first, dim) / total
                lse[h, :, first:last] = (top + total.log()).squeeze(-1)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.rest = spans, scale, layer, watcher
        return output.view(heads, tokens, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, output, lse = ctx.saved_tensors
        spans, scale, layer, watcher = ctx.rest
        kv_heads, tokens, dim = key.shape
        group = query.shape[0] // kv_heads
        wide = _wide(query.dtype)
        grouped, upstream = query.view(kv_heads, group, tokens, dim), grads[0].reshape(kv_heads, group, tokens, dim)
        base = (upstream.to(wide) * output.to(wide)).sum(-1)
        d_query = torch.empty_like(grouped)
        d_key, d_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for h in range(kv_heads):
            span = None if spans is None else spans[h]
            for first, last in _tiles(tokens):
                # A watcher wants all keys, a gradient only those that were seen.
                gap = (0, 0) if watcher else _keys(first, last, span)
                k, v = _cut(key[h], gap, last), _cut(value[h], gap, last)
                q, up = (x[h, :, first:last].reshape(-1, dim) for x in (grouped, upstream))
                shape = (group, last - first, k.shape[0])
                weight = _product(q, k).mul_(scale).view(shape).sub_(lse[h, :, first:last, None])
                # Keys outside the span in force may weigh more than all inside; e^60 stands for "everything" without overflow.
                weight = _hide(weight.clamp_max_(60).exp_(), first, last, gap, None if watcher else span, 0)
                gradient = _product(up, v).view(shape)
                rows = base[h, :, first:last]
                if watcher:
                    watcher.tile(layer, h, weight, gradient, rows)
                    if span is not None:
                        _hide(weight, first, last, gap, span, 0)
                d_scores = gradient.sub_(rows[..., None]).mul_(weight).mul_(scale).to(query.dtype).view(-1, k.shape[0])
                flat = weight.to(query.dtype).view(-1, k.shape[0])
                d_query[h, :, first:last] = (d_scores @ k).view(group, last - first, dim)
                cut = gap[0] if gap[1] else 0
                for total, part in ((d_key[h], d_scores.t() @ q), (d_value[h], flat.t() @ up)):
                    total[:cut] += part[:cut]
                    total[gap[1] : last] += part[cut:]
        return d_query.view_as(query), d_key.to(key.dtype), d_value.to(value.dtype), None, None, None, None

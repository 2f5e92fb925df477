"""Joins attention over parts of the keys: (output, lse) pairs to one output, by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspan.plugins.trt_sparse_attn.kernels import checks
from attnspan.plugins.trt_sparse_attn.kernels.common import HEAD_DIMS, OPTIONS, cast, tile_dim

BLOCK_R = 32
"""Rows, (token, head), of a block."""


@triton.jit
def merge_kernel(
    a, a_lse, b, b_lse, output, lse, rows, tokens, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Program x: rows [32 x, 32 x + 32) of [batch, tokens, heads]. lse and its inputs are [batch, heads, tokens], natural."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = r < rows
    at = (r // (tokens * heads) * heads + r % heads) * tokens + r // heads % tokens
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (d < D)[None, :]
    tile = r[:, None] * D + d[None, :]
    la = tl.load(a_lse + at, there, float("-inf"))
    lb = tl.load(b_lse + at, there, float("-inf"))
    top = tl.maximum(la, lb)
    # Of two empty parts the difference would be NaN.
    shift = tl.where(top == float("-inf"), 0.0, top)
    wa = tl.exp(la - shift)
    wb = tl.exp(lb - shift)
    total = wa + wb
    any_key = total > 0
    total = tl.where(any_key, total, 1.0)
    per = 1 / total
    # A part that saw nothing may hold anything.
    xa = tl.where((wa > 0)[:, None], tl.load(a + tile, mask, 0.0).to(tl.float32), 0.0)
    xb = tl.where((wb > 0)[:, None], tl.load(b + tile, mask, 0.0).to(tl.float32), 0.0)
    out = xa * (wa * per)[:, None] + xb * (wb * per)[:, None]
    tl.store(output + tile, cast(out, output.dtype.element_ty), mask)
    tl.store(lse + at, tl.where(any_key, shift + tl.log(total), float("-inf")), there)


def merge(
    outputs: Sequence[Tensor], lses: Sequence[Tensor], out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """One (output, lse) of attention over all keys from those over parts of them.

    outputs: tensors [batch, tokens, heads * dim], all of one type; lses: [batch, heads, tokens] fp32, the natural logarithm of
    each part's sum of exponentials, -inf where it has no keys. Where no part has any, zeros and -inf. Parts are added in fp32.
    `out`: output and lse to write to, of two parts or more.
    """
    if not outputs or len(outputs) != len(lses):
        raise checks.UserError(f"merge got {len(outputs)} outputs and {len(lses)} lses: must be as many, and one at least")
    first, width = outputs[0], outputs[0].shape[-1]
    if lses[0].dim() != 3 or first.dim() != 3 or width % max(lses[0].shape[1], 1):
        raise checks.UserError(f"output has shape {list(first.shape)}, lse {list(lses[0].shape)}: must be [batch, tokens, "
                               "heads * dim] and [batch, heads, tokens]")  # fmt: skip
    (batch, tokens, _), heads = first.shape, lses[0].shape[1]
    if width // heads not in HEAD_DIMS or not first.dtype.is_floating_point:
        raise checks.UserError(f"head_dim is {width // heads}, type {first.dtype}: must be of {HEAD_DIMS} and floating point")
    for output, lse in zip(outputs, lses, strict=True):
        checks.shaped("output", output, (batch, tokens, width), first.dtype)
        checks.shaped("lse", lse, (batch, heads, tokens), torch.float32)
    checks.one_device(**{f"output {i}": x for i, x in enumerate(outputs)}, **{f"lse {i}": x for i, x in enumerate(lses)})
    output, lse = first, lses[0]
    rows = batch * tokens * heads
    for i in range(1, len(outputs)):
        last = i == len(outputs) - 1
        if last and out is not None:
            total, log = out
        else:
            total = torch.empty(first.shape, dtype=first.dtype if last else torch.float32, device=first.device)
            log = torch.empty_like(lse)
        if rows:
            with checks.device_of(first):
                merge_kernel[(triton.cdiv(rows, BLOCK_R),)](
                    output, lse, outputs[i], lses[i], total, log, rows, tokens, heads,
                    D=width // heads, BLOCK_D=tile_dim(width // heads), BLOCK_R=BLOCK_R, num_warps=4, num_stages=1,
                    **OPTIONS,
                )  # fmt: skip
        output, lse = total, log
    return (output.clone(), lse.clone()) if len(outputs) == 1 else (output, lse)

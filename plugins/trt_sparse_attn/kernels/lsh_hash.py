"""Hashes of queries and keys for sampled attention: signs of random projections, packed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspan.planner.rules import SIGNATURE_BITS
from attnspan.plugins.trt_sparse_attn.kernels import checks
from attnspan.plugins.trt_sparse_attn.kernels.common import DTYPES, HEAD_DIMS, OPTIONS, cast, dot

BLOCK_M = 64
"""Vectors of a block."""
COLUMNS = 128
"""Columns of the projection that a block multiplies by, each code padded to 16 or 32 bits."""
BLOCK_K = 32
"""Elements of a head at a time. The fp32 tiles of 64 and more fill the registers before they are rounded."""


@triton.jit
def lsh_hash_kernel(
    x, projection, mean, codes, rows, row_vectors, heads, mean_row, count, bits, D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (x, y): vectors [64 x, 64 x + 64) of x [rows, D], codes from BLOCK_L y on, of `count` codes of `bits` bits each.

    Bit j of code l is the sign of the product with column l * bits + j of projection [D, count * bits]; WIDTH is `bits` rounded
    up to 16 or 32. `row_vectors`: vectors of a row of the batch; mean [.., heads, D] has `mean_row` elements per row, or 0.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_L * WIDTH)
    code = tl.program_id(1) * BLOCK_L + c // WIDTH
    bit = c % WIDTH
    real = (code < count) & (bit < bits)
    column = code * bits + bit
    at = r // row_vectors * mean_row + r % heads * D
    product = tl.zeros([BLOCK_M, BLOCK_L * WIDTH], tl.float32)
    for first in range(0, D, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        mask = (r < rows)[:, None] & (d < D)[None, :]
        vectors = tl.load(x + r[:, None] * D + d[None, :], mask, 0.0).to(tl.float32)
        if mean is not None:
            vectors -= tl.load(mean + at[:, None] + d[None, :], mask, 0.0)
        matrix = tl.load(projection + d[:, None] * (count * bits) + column[None, :], (d < D)[:, None] & real[None, :], 0.0)
        product = dot(cast(vectors, tl.bfloat16), cast(matrix, tl.bfloat16), product)
    # A padded bit's column is zero, and no product with it above zero.
    packed = (product > 0).to(tl.int32) << bit[None, :]
    packed = tl.sum(tl.reshape(packed, [BLOCK_M, BLOCK_L, WIDTH]), 2)
    each = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    to = codes + r[:, None] * count + each[None, :]
    tl.store(to, packed.to(codes.dtype.element_ty), (r < rows)[:, None] & (each < count)[None, :])


def lsh_hash(
    x: Tensor,
    projection: Tensor,
    *,
    num_heads: int,
    bits: int | None = None,
    tables: int | None = None,
    signature_bits: int | None = None,
    mean: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Hashes of the vectors of x [batch, tokens, num_heads * dim]: bit j is (x - mean) . projection[:, j] > 0, both as bfloat16.

    `bits` K (1 to 15) and `tables` L (1 to 1024): int16 [batch, tokens, num_heads, L], bit j of table l of column l * K + j.
    `signature_bits` (64, 128 or 256): words int32 [batch, tokens, num_heads, signature_bits / 32], bit j in bit j % 32 of
    word j // 32. projection fp32 [dim, L * K or signature_bits]; mean fp32 [num_heads, dim] or [batch, num_heads, dim].
    `out`: codes to write to. As docs/ops/LshAttention.md; products are summed in fp32. UserError for what the kernel does not
    take.
    """
    if x.dim() != 3 or num_heads < 1 or x.shape[-1] % num_heads:
        raise checks.UserError(f"x has shape {list(x.shape)}: must be [batch, tokens, {num_heads} heads * dim]")
    (batch, tokens, width), dim = x.shape, x.shape[-1] // num_heads
    checks.one_of("head_dim", dim, HEAD_DIMS)
    checks.one_of("x's type", x.dtype, (*DTYPES, torch.float32))
    if signature_bits is not None:
        if bits is not None or tables is not None:
            raise checks.UserError(f"bits is {bits}, tables {tables}: must be left out where signature_bits is given")
        checks.one_of("signature_bits", signature_bits, SIGNATURE_BITS)
        bits, count, kind = 32, signature_bits // 32, torch.int32
    else:
        if bits is None or tables is None or not (1 <= bits <= 15 and 1 <= tables <= 1024):
            raise checks.UserError(f"bits is {bits}, tables {tables}: must be 1 to 15 and 1 to 1024, or signature_bits given")
        count, kind = tables, torch.int16
    checks.shaped("x", x, (batch, tokens, width))
    checks.shaped("projection", projection, (dim, count * bits), torch.float32)
    mean_row = 0
    if mean is not None:
        checks.shaped("mean", mean, (num_heads, dim) if mean.dim() == 2 else (batch, num_heads, dim), torch.float32)
        mean_row = num_heads * dim if mean.dim() == 3 else 0
    checks.one_device(x=x, projection=projection, mean=mean)
    codes = torch.empty(batch, tokens, num_heads, count, dtype=kind, device=x.device) if out is None else out
    rows, padded = batch * tokens * num_heads, 16 if bits < 16 else 32
    block = COLUMNS // padded
    if rows:
        with checks.device_of(x):
            lsh_hash_kernel[(triton.cdiv(rows, BLOCK_M), triton.cdiv(count, block))](
                x, projection, mean, codes, rows, tokens * num_heads, num_heads, mean_row, count, bits,
                D=dim, BLOCK_K=BLOCK_K, BLOCK_M=BLOCK_M, BLOCK_L=block, WIDTH=padded, num_warps=4, num_stages=1,
                **OPTIONS,
            )  # fmt: skip
    return codes

"""What all kernels share: limits, the launch configuration, and the device functions for slots, dots and scores."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

HEAD_DIMS = (64, 80, 96, 128, 256)
"""Elements of a head. Each is a multiple of 16 bytes, so that rows load in vectors; 80 and 96 pad their tile to 128."""
DTYPES = (torch.float16, torch.bfloat16)
"""Activations. A cache has the same type, or float8_e4m3fn with a scale per KV head."""
FP8 = torch.float8_e4m3fn
FP8_ARCH = 89
"""First architecture that converts e4m3 in hardware; Triton refuses the type below it."""
LOG2E = math.log2(math.e)
OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every kernel, by the JIT and ahead of time: given, since Triton's own defaults change with versions."""
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one block can have, by architecture."""

INTERPRET = bool(triton.knobs.runtime.interpret)
"""Kernels run in Triton's interpreter, on CPU tensors."""

# The interpreter's dot is wrong for bfloat16 and its casts truncate: there, operands are widened and values rounded first.
INTERPRETED = tl.constexpr(INTERPRET)
FP8_MAX = tl.constexpr(448.0)
LN2 = tl.constexpr(math.log(2))
LOG2E_ = tl.constexpr(LOG2E)


class Config(NamedTuple):
    """Launch configuration of a kernel: plain numbers, so that ahead-of-time builds and the JIT choose alike."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@cache
def arch_of(device: torch.device) -> int:
    """Compute capability as one number: 90 for sm_90. 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    capability: tuple[int, int] = torch.cuda.get_device_capability(device)
    return capability[0] * 10 + capability[1]


def shared_bytes(arch: int) -> int:
    """Shared memory of a block on `arch`; one that is not in the table has that of the nearest below it."""
    known = [a for a in SHARED_BYTES if a <= arch]
    return SHARED_BYTES[max(known)] if known else SHARED_BYTES[86]


def tile_dim(head_dim: int) -> int:
    """Columns of a tile: `head_dim` rounded up to a power of two."""
    return 1 << (head_dim - 1).bit_length()


@triton.jit
def dot(a, b, acc):
    """a @ b + acc in fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def cast(x, KIND: tl.constexpr):
    """x, in fp32, rounded half to even to KIND. e4m3: x is within its range."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        if KIND.is_bf16():
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        if KIND.is_fp8e4nv():
            near = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
            x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, near)  # subnormals: multiples of 2^-9
    return x.to(KIND)


@triton.jit
def scaled(score, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2: `scale` holds log2(e) unless there is a softcap, which is applied before it."""
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1): right at both infinities, and within 1e-7 around 0.
        twice = tl.exp2(score * (scale / softcap) * (2 * LOG2E_))
        return (softcap * LOG2E_) * (1 - 2 / (twice + 1))
    return score * scale


@triton.jit
def stored(x, scale, like):
    """x as it comes back from the cache, less the scale: rounded to e4m3 in units of `scale`, in the type of `like`."""
    small = tl.minimum(tl.maximum(x.to(tl.float32) / scale, -FP8_MAX), FP8_MAX)
    return cast(small, tl.float8e4nv).to(like)


@triton.jit
def ring_slot(position, capacity, sink):
    """Slot of the token at `position`, counted from the head's first."""
    return tl.where(position < sink, position, sink + (position - sink) % (capacity - sink))


@triton.jit
def kept_tokens(length, span, capacity, sink):
    """Cached tokens that the token at position `length` sees: how many sinks, and how many recent ones.

    A span over the capacity, which no check on the host can see, counts as the capacity.
    """
    sinks = tl.minimum(length, sink)
    recent = tl.minimum(tl.maximum(tl.minimum(span, capacity) - sink, 1) - 1, length - sink)
    return sinks, tl.maximum(recent, 0)


@triton.jit
def pair_tiles(pair, length, span, capacity, new_tokens, pairs, kv_heads, sink, BLOCK_N: tl.constexpr):
    """Tiles of kept slots of each (row, KV head) pair; none past the last pair or of a row without a new token."""
    there = pair < pairs
    row = pair // kv_heads
    room = tl.load(capacity + pair % kv_heads, there, 0)
    sinks, recent = kept_tokens(tl.load(length + row, there, 0), tl.load(span + pair, there, 0), room, sink)
    if new_tokens is not None:
        there = there & (tl.load(new_tokens + row, there, 0) > 0)
    return tl.where(there, tl.cdiv(sinks + recent, BLOCK_N), 0)


@triton.jit
def tiles_each(total, workers):
    """Tiles of each worker of a decode step. One alone would not fill the pipeline."""
    return tl.maximum(tl.cdiv(total, workers), 2)

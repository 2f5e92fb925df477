"""The kernels that are compiled ahead of time: one line each per architecture, type and head size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from attnspan.plugins.trt_sparse_attn.kernels.common import FP8_ARCH, HEAD_DIMS, tile_dim
from attnspan.plugins.trt_sparse_attn.kernels.lsh_hash import BLOCK_K, BLOCK_M, COLUMNS, lsh_hash_kernel
from attnspan.plugins.trt_sparse_attn.kernels.merge import BLOCK_R, merge_kernel
from attnspan.plugins.trt_sparse_attn.kernels.merge_chunks import BLOCK_C, merge_chunks_kernel
from attnspan.plugins.trt_sparse_attn.kernels.ring_update import BLOCK_T, ring_update_kernel
from attnspan.plugins.trt_sparse_attn.kernels.span_decode import BLOCK_G, BLOCK_P, span_decode_kernel, workers_per_sm
from attnspan.plugins.trt_sparse_attn.kernels.span_decode import config as decode_config
from attnspan.plugins.trt_sparse_attn.kernels.span_prefill import config as prefill_config
from attnspan.plugins.trt_sparse_attn.kernels.span_prefill import span_prefill_kernel

__all__ = ["TYPES", "Variant", "variants"]

TYPES = {"fp16": ("*fp16", "*fp16", 2), "bf16": ("*bf16", "*bf16", 2), "fp16_fp8": ("*fp16", "*fp8e4nv", 1),
         "bf16_fp8": ("*bf16", "*fp8e4nv", 1)}  # fmt: skip
"""Name of activations and cache -> their pointer types, and the cache's bytes per element."""


@dataclass(frozen=True)
class Variant:
    """One kernel to compile. signature maps every argument, in order, to its Triton type or "constexpr"; constexprs has the
    values of the latter (None: the argument is left out); divisible names arguments that are multiples of 16; grid says what x,
    y, z are."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    grid: str


def _variant(
    name: str, kernel: Any, types: dict[str, str], constexprs: dict[str, object], warps: int, stages: int, grid: str
) -> Variant:
    """`types` and `constexprs` may name arguments that the kernel does not have; those that neither names are i32."""
    names = list(kernel.arg_names)
    given = {n: constexprs[n] for n in names if n in constexprs}
    signature = {n: "constexpr" if n in given else types.get(n, "i32") for n in names}
    pointers = tuple(n for n in names if signature[n].startswith("*"))
    return Variant(name, kernel, signature, given, pointers, warps, stages, grid)


def _attention(name: str, arch: int, dim: int) -> list[Variant]:
    """Prefill, decode, merge of a decode step's parts, update of the ring."""
    activation, cache, size = TYPES[name]
    types = dict.fromkeys(("query", "key", "value", "output"), activation) | dict.fromkeys(("key_cache", "value_cache"), cache)
    types |= dict.fromkeys(("length", "span", "capacity", "offset"), "*i32")
    types |= dict.fromkeys(("part", "part_lse", "lse", "key_scale", "value_scale"), "*fp32")
    types |= dict.fromkeys(("scale", "softcap"), "fp32")
    left_out = ("new_tokens",) if cache == "*fp8e4nv" else ("new_tokens", "key_scale", "value_scale")
    fixed: dict[str, object] = {**dict.fromkeys(left_out), "D": dim, "BLOCK_D": tile_dim(dim), "SOFTCAP": False}
    prefill, decode = prefill_config(dim, size, arch), decode_config(dim, size, arch)
    step = fixed | {"BLOCK_N": decode.block_n, "BLOCK_P": BLOCK_P, "BLOCK_G": BLOCK_G, "BLOCK_C": BLOCK_C}
    chunk = fixed | {"BLOCK_M": prefill.block_m, "BLOCK_N": prefill.block_n}
    suffix = f"{name}_d{dim}"
    return [
        _variant(f"span_prefill_{suffix}", span_prefill_kernel, types, chunk, prefill.num_warps, prefill.num_stages,
                 f"x: batch * kv_heads * ceil(tokens * group / {prefill.block_m})"),
        _variant(f"span_decode_{suffix}", span_decode_kernel, types, step, decode.num_warps, decode.num_stages,
                 f"x: workers, {workers_per_sm(size, arch)} per multiprocessor; y: ceil(group / {BLOCK_G})"),
        _variant(f"merge_chunks_{suffix}", merge_chunks_kernel, types, step, 4, 1, "x: batch * heads"),
        _variant(f"ring_update_{suffix}", ring_update_kernel, types, fixed | {"BLOCK_T": BLOCK_T}, 4, 1,
                 f"x: batch * kv_heads * ceil(tokens / {BLOCK_T})"),
    ]  # fmt: skip


def _merge(name: str, dim: int) -> Variant:
    types = dict.fromkeys(("a", "b", "output"), f"*{name}") | dict.fromkeys(("a_lse", "b_lse", "lse"), "*fp32")
    fixed: dict[str, object] = {"D": dim, "BLOCK_D": tile_dim(dim), "BLOCK_R": BLOCK_R}
    return _variant(f"merge_{name}_d{dim}", merge_kernel, types, fixed, 4, 1, f"x: ceil(batch * tokens * heads / {BLOCK_R})")


def _hash(name: str, dim: int, kind: str, codes: str, width: int) -> Variant:
    types = {"x": f"*{name}", "projection": "*fp32", "mean": "*fp32", "codes": codes}
    block = COLUMNS // width
    fixed: dict[str, object] = {"D": dim, "BLOCK_K": BLOCK_K, "BLOCK_M": BLOCK_M, "BLOCK_L": block, "WIDTH": width}
    grid = f"x: ceil(batch * tokens * heads / {BLOCK_M}); y: ceil(codes / {block})"
    return _variant(f"lsh_{kind}_{name}_d{dim}", lsh_hash_kernel, types, fixed, 4, 1, grid)


def variants(
    arch: int, head_dims: Iterable[int] = HEAD_DIMS, dtypes: Iterable[str | torch.dtype] = tuple(TYPES)
) -> list[Variant]:
    """What is compiled for sm_`arch`; `dtypes` are names of TYPES, or torch.float16 and torch.bfloat16 for those without fp8.

    A cache in fp8 needs sm_89: below it such types are left out. Softcap, rows with fewer tokens than the chunk and hashes
    without a mean (zeros do) are the JIT's: their arguments are constants here.
    """
    wanted = [{torch.float16: "fp16", torch.bfloat16: "bf16"}[t] if isinstance(t, torch.dtype) else t for t in dtypes]
    table: list[Variant] = []
    for dim in head_dims:
        for name in wanted:
            if name.endswith("fp8"):
                table += _attention(name, arch, dim) if arch >= FP8_ARCH else []
            else:
                table += [*_attention(name, arch, dim), _merge(name, dim)]
                table += [_hash(name, dim, "codes", "*i16", 16), _hash(name, dim, "signatures", "*i32", 32)]
    return table

"""What the kernels are compared with: PyTorch's best dense attention, flex_attention with the same mask, FlashInfer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_cases import SINK, TILE, Case
from gpu_timing import Step, Stopwatch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class UnavailableError(Exception):
    """A baseline that does not run here, and why, in one line."""


def dense_sdpa(case: Case, query: Tensor, key: Tensor, value: Tensor, watch: Stopwatch) -> tuple[str, Step]:
    """The fastest of all backends and forms for query [batch, heads, tokens, dim], key and value [batch, kv_heads, context, dim].

    Forms: GQA as it is; decode with the heads of a group as rows of one, which reads each key once; prefill with keys repeated
    beforehand, outside the timing, for backends without GQA.
    """
    causal = case.phase == "prefill"
    forms: dict[str, Callable[[], Tensor]] = {"": lambda: sdpa(query, key, value, is_causal=causal, enable_gqa=case.group > 1)}
    if case.group > 1 and not causal:
        grouped = query.view(case.batch, case.kv_heads, case.group, case.dim)
        forms[" grouped"] = lambda: sdpa(grouped, key, value)
    if not watch.cuda:
        return "sdpa", forms[""]
    if case.group > 1 and causal:
        wide = [x.repeat_interleave(case.group, 1) for x in (key, value)]
        forms[" repeated"] = lambda: sdpa(query, wide[0], wide[1], is_causal=True)
    best: tuple[float, str, Step] | None = None
    for backend in BACKENDS:
        for name, form in forms.items():

            def step(backend: SDPBackend = backend, form: Callable[[], Tensor] = form) -> Tensor:
                with sdpa_kernel(backend):
                    return form()

            try:
                seconds = watch.quick(step)
            except RuntimeError:  # no kernel of this backend for these shapes
                continue
            if best is None or seconds < best[0]:
                best = (seconds, f"sdpa {backend.name.lower().removesuffix('_attention')}{name}", step)
    if best is None:
        raise UnavailableError("no backend of scaled_dot_product_attention takes these shapes")
    return best[1], best[2]


def block_mask(spans: Tensor, group: int, first: int, context: int) -> Any:
    """BlockMask of queries `first` .. `context` against keys 0 .. context, spans int32 [kv_heads]; blocks of 128, in closed form.

    `create_block_mask` would make the mask itself, [heads, context, context], unless it is compiled.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device = spans.device
    q0 = torch.arange(first, context, TILE, device=device)[None, :, None]
    q1 = (q0 + TILE - 1).clamp(max=context - 1)
    k0 = torch.arange(0, context, TILE, device=device)[None, None, :]
    k1 = k0 + TILE - 1
    window = (spans.long() - SINK).repeat_interleave(group)[:, None, None]
    some = (k0 <= q1) & ((k0 < SINK) | (q0 - k1 < window))
    whole = (k1 <= q0) & ((k1 < SINK) | (q1 - k0 < window)) & (k1 < context)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None], order.to(torch.int32)[None]

    wide = spans.repeat_interleave(group)

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = q + first
        return (k <= at) & ((k < SINK) | (at - k < wide[head] - SINK))

    return BlockMask.from_kv_blocks(
        *listed(some & ~whole), *listed(whole), BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=(context - first, context)
    )


def flex(case: Case, spans: Tensor, query: Tensor, key: Tensor, value: Tensor, watch: Stopwatch) -> tuple[str, Step]:
    """flex_attention under the plan's mask; compiled on a GPU. spans int32 [kv_heads]."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(spans, case.group, case.context - query.shape[2], case.context)
    run: Any = flex_attention
    if watch.cuda:
        torch._dynamo.config.recompile_limit = 1000
        run = torch.compile(flex_attention, dynamic=False)

    def step() -> Tensor:
        out: Tensor = run(query, key, value, block_mask=mask, enable_gqa=case.group > 1)
        return out

    try:
        step()
    except Exception as error:
        raise UnavailableError(f"flex_attention: {type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
    return ("flex compiled" if watch.cuda else "flex eager"), step


def flashinfer(case: Case, query: Tensor, key: Tensor, value: Tensor, watch: Stopwatch) -> tuple[str, Step]:
    """FlashInfer's dense attention, the memory of key and value read as pages of 16 tokens (decode) or as one row (prefill)."""
    if importlib.util.find_spec("flashinfer") is None or not watch.cuda:
        raise UnavailableError("FlashInfer is not installed")
    import flashinfer as fi

    try:
        if case.phase == "decode":
            page, pages = 16, case.context // 16
            workspace = torch.empty(256 << 20, dtype=torch.uint8, device=query.device)
            wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=case.group > 1)
            shape = (case.batch * pages, page, case.kv_heads, case.dim)
            indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=query.device) * pages
            indices = torch.arange(case.batch * pages, dtype=torch.int32, device=query.device)
            last = torch.full((case.batch,), page, dtype=torch.int32, device=query.device)
            wrapper.plan(indptr, indices, last, case.heads, case.kv_heads, case.dim, page, q_data_type=query.dtype)
            q, cache = query.view(case.batch, case.heads, case.dim), (key.view(shape), value.view(shape))
            step = partial(wrapper.run, q, cache)
        else:
            if case.batch > 1:
                raise UnavailableError("FlashInfer prefill is compared at batch 1 only")
            q = query[0].transpose(0, 1).contiguous()
            k, v = (x.view(case.context, case.kv_heads, case.dim) for x in (key, value))
            step = partial(fi.single_prefill_with_kv_cache, q, k, v, causal=True)
        step()
    except UnavailableError:
        raise
    except Exception as error:
        raise UnavailableError(f"FlashInfer: {type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
    return f"flashinfer {getattr(fi, '__version__', '?')}", step

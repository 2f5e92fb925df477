"""What the plugin in Python does when an engine runs: tensors from addresses, then the kernels.

Nothing here waits for the device and, after the first call of a context, nothing copies to it: a step can be captured in a graph.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnspan.plugins.trt_sparse_attn import kernels
from attnspan.plugins.trt_sparse_attn.kernels.common import INTERPRET
from attnspan.plugins.trt_sparse_attn.kernels.span_decode import workers_of

if TYPE_CHECKING:
    from attnspan.plugins.trt_sparse_attn.plugin import Plugin

__all__ = ["Memory", "launch", "tensor"]

Memory = tuple[int, tuple[int, ...], str]
"""Address, shape, type by its NumPy name."""


class _Device:
    """Bytes on the GPU, as PyTorch takes them from other libraries."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def tensor(address: int, shape: Sequence[int], kind: str) -> Tensor:
    """A tensor over memory of others: on the GPU, or on the CPU where kernels are interpreted."""
    dtype: torch.dtype = getattr(torch, kind)
    count = math.prod(shape)
    device = "cpu" if INTERPRET else "cuda"
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    size = count * dtype.itemsize
    if INTERPRET:
        raw = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    else:
        raw = torch.as_tensor(_Device(address, size), device=device)
    return raw.view(dtype).view(tuple(shape))


def launch(plugin: Plugin, inputs: Sequence[Memory], outputs: Sequence[Memory], workspace: int, stream: int) -> None:
    """Runs one node on `stream`. UserError for what the kernels do not take."""
    current = nullcontext() if INTERPRET else torch.cuda.stream(torch.cuda.ExternalStream(stream))
    with current:
        given, results = ([tensor(*memory) for memory in memories] for memories in (inputs, outputs))
        _OPS[plugin.op.name](plugin, given, results, workspace)


def _span_attention(plugin: Plugin, given: list[Tensor], results: list[Tensor], workspace: int) -> None:
    from attnspan.plugins.trt_sparse_attn.plugin import SCRATCH_WORKERS, scratch_numbers

    query, key, value, past_key, past_value, length, span, *scales = given
    output, present_key, present_value, lse = results
    if plugin.building:
        # A builder times plugins on whatever its buffers hold: lengths of the kind would reach memory of others.
        length = torch.zeros_like(length)
    for past, present in ((past_key, present_key), (past_value, present_value)):
        if past.data_ptr() != present.data_ptr():
            present.copy_(past)
    values: Any = plugin.values
    capacity, offset = _layout(plugin, query.device)
    numbers = scratch_numbers(values, query.shape[0], past_key.shape[2])
    scratch = tensor(workspace, (numbers,), "float32") if workspace else None
    kernels.span_attention(
        query, key, value, present_key, present_value, length, span, capacity, offset, num_heads=values["num_heads"],
        sink=values["sink"], scale=values["scale"] or None, softcap=values["softcap"],
        key_scale=scales[0] if scales else None, value_scale=scales[1] if scales else None, return_lse=True,
        workers=min(workers_of(query.device, past_key.element_size()), SCRATCH_WORKERS), out=(output, lse), scratch=scratch,
    )  # fmt: skip


def _layout(plugin: Plugin, device: torch.device) -> tuple[Tensor, Tensor]:
    """Capacity and offset of each KV head, int32 on the device."""
    if device not in plugin.layout:
        capacity = torch.tensor(plugin.values["capacity"], dtype=torch.int32)
        offset = (capacity.cumsum(0) - capacity).int()
        plugin.layout[device] = (capacity.to(device), offset.to(device))
    layout: tuple[Tensor, Tensor] = plugin.layout[device]
    return layout


def _lsh_hash(plugin: Plugin, given: list[Tensor], results: list[Tensor], workspace: int) -> None:
    x, projection, mean = given
    values: Any = plugin.values
    codes = results[0] if values["signature_bits"] else results[0].view(torch.int16)
    kind = {name: values[name] or None for name in ("bits", "tables", "signature_bits")}
    kernels.lsh_hash(x, projection, num_heads=values["num_heads"], mean=mean, out=codes, **kind)


def _merge_attention(plugin: Plugin, given: list[Tensor], results: list[Tensor], workspace: int) -> None:
    output_a, lse_a, output_b, lse_b = given
    kernels.merge((output_a, output_b), (lse_a, lse_b), out=(results[0], results[1]))


_OPS = {"SpanAttention": _span_attention, "LshHash": _lsh_hash, "MergeAttention": _merge_attention}

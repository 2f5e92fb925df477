"""Launches of the Python host functions, written down, and calls of SpanAttention compared with those of the C++ plugin."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trt_launch import Library, Node

from attnspan.plugins.trt_sparse_attn import kernels, schema
from attnspan.plugins.trt_sparse_attn.kernels.common import FP8
from attnspan.plugins.trt_sparse_attn.kernels.span_decode import workers_per_sm

PACKAGE = "attnspan.plugins.trt_sparse_attn.kernels"
NAMES = {kind: str(kind).removeprefix("torch.") for kind in (torch.float16, torch.bfloat16, torch.int32, torch.float32, FP8)}
SUFFIX = {torch.float16: "fp16", torch.bfloat16: "bf16"}


class Host:
    """The Python host functions with recorders for kernels. `launches`: (kernel, grid, arguments by name, warps)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[str, tuple[int, ...], dict[str, Any], int]] = []
        self.arch, self.multiprocessors = 90, 132
        modules = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in
                   ("span_decode", "span_prefill", "ring_update", "merge", "lsh_hash")}  # fmt: skip
        for module in modules.values():
            for name in ("span_decode_kernel", "merge_chunks_kernel", "span_prefill_kernel", "ring_update_kernel", "merge_kernel",
                         "lsh_hash_kernel"):  # fmt: skip
                kernel = getattr(module, name, None)
                if kernel is not None:
                    monkeypatch.setattr(module, name, self.recorder(name.removesuffix("_kernel"), kernel.arg_names))
        for name in ("span_decode", "span_prefill"):
            monkeypatch.setattr(modules[name], "arch_of", lambda device: self.arch)
        monkeypatch.setattr(
            modules["span_decode"], "workers_of", lambda device, size: workers_per_sm(size, self.arch) * self.multiprocessors
        )

    def recorder(self, kernel: str, names: Sequence[str]) -> Any:
        host = self

        class Recorder:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*values: Any, **constants: Any) -> None:
                    arguments = dict(zip(names, values, strict=False)) | constants
                    host.launches.append((kernel, grid, arguments, constants["num_warps"]))

                return launch

        return Recorder()


def compare(host: Host, library: Library, suffix: str, own: dict[str, int], stream: int) -> dict[str, dict[str, Any]]:
    """Each launch of the library equals the host's. `own`: addresses of what the host allocates itself. Returns the arguments."""
    done = [entry for entry in library.log() if "kernel" in entry]
    assert len(done) == len(host.launches)
    found = {}
    for (kernel, grid, wanted, warps), got in zip(host.launches, done, strict=True):
        assert got["kernel"] == f"{kernel}_{suffix}" if "lsh" not in kernel else got["kernel"].startswith("lsh_")
        assert (got["grid"], got["threads"], got["stream"]) == ([*grid, 1, 1][:3], 32 * warps, stream)
        assert (got["arch"], got["image"]) == (host.arch, "cubin")
        arguments = found[kernel] = got["arguments"]
        assert list(arguments)[-2:] == ["global_scratch", "profile_scratch"]
        assert list(arguments.values())[-2:] == [0, 0]
        for name, value in list(arguments.items())[:-2]:
            if name in own:
                assert value == own[name], name
            elif name in ("part", "part_lse", "capacity", "offset"):
                continue  # memory of the library's own: looked at below
            elif isinstance(wanted[name], Tensor):
                assert value == wanted[name].data_ptr(), name
            elif isinstance(wanted[name], float):
                assert value == np.float32(wanted[name]), name
            else:
                assert value == wanted[name], name
        left_out = {name for name, value in wanted.items() if name not in arguments and value is not None}
        assert left_out <= {name for name in wanted if name.isupper() or name in ("num_warps", "num_stages", "enable_fp_fusion")}
    host.launches.clear()
    return found


def aligned(size: int) -> tuple[Any, int]:
    """Memory, and an address in it that is a multiple of 256."""
    memory = ctypes.create_string_buffer(size + 256)
    return memory, -(-ctypes.addressof(memory) // 256) * 256


def span_inputs(
    batch: int, tokens: int, group: int, dim: int, capacity: Sequence[int], dtype: torch.dtype, fp8: bool
) -> dict[str, Tensor]:
    """Inputs of SpanAttention in order. Nobody reads them."""
    kv_heads, slots, cache = len(capacity), sum(capacity), FP8 if fp8 else dtype
    shapes = {"query": (batch, tokens, kv_heads * group * dim), "key": (batch, tokens, kv_heads * dim),
              "value": (batch, tokens, kv_heads * dim)}  # fmt: skip
    inputs = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    inputs |= {name: torch.empty(batch, slots, dim, dtype=cache) for name in ("key_cache", "value_cache")}
    inputs |= {"length": torch.zeros(batch, dtype=torch.int32), "span": torch.zeros(batch, kv_heads, dtype=torch.int32)}
    if fp8:
        inputs |= {name: torch.ones(kv_heads) for name in ("key_scale", "value_scale")}
    return inputs


def compare_span(
    host: Host, library: Library, arch: int, batch: int, tokens: int, group: int, dim: int, capacity: Sequence[int],
    dtype: torch.dtype = torch.bfloat16, fp8: bool = False, sink: int = 64, scale: float = 0.0, multiprocessors: int = 132,
) -> None:  # fmt: skip
    """One call of SpanAttention on a device of compute capability `arch`."""
    host.arch, host.multiprocessors = arch, multiprocessors
    library.device(arch, multiprocessors)
    inputs = span_inputs(batch, tokens, group, dim, capacity, dtype, fp8)
    numbers = {name: torch.tensor(x, dtype=torch.int32) for name, x in
               (("capacity", list(capacity)), ("offset", np.cumsum([0, *capacity[:-1]]).tolist()))}  # fmt: skip
    heads = len(capacity) * group
    kernels.span_attention(**inputs, **numbers, num_heads=heads, sink=sink, scale=scale or None, return_lse=True)

    attributes = {"num_heads": heads, "kv_num_heads": len(capacity), "capacity": list(capacity), "sink": sink, "scale": scale}
    node = Node(library, schema.SPAN_ATTENTION, attributes, [NAMES[x.dtype] for x in inputs.values()],
                [tuple(x.shape) for x in inputs.values()])  # fmt: skip
    addresses = [x.data_ptr() for x in inputs.values()]
    output, lse = torch.empty_like(inputs["query"]), torch.empty(batch, heads, tokens)
    size = node.workspace(batch)
    memory, workspace = aligned(size)
    node.run(addresses, [output.data_ptr(), *addresses[3:5], lse.data_ptr()], batch, tokens, workspace, stream=4096)
    suffix = f"{SUFFIX[dtype]}{'_fp8' if fp8 else ''}_d{dim}"
    found = compare(host, library, suffix, {"output": output.data_ptr(), "lse": lse.data_ptr()}, stream=4096)
    assert set(found) == ({"span_decode", "merge_chunks"} if tokens == 1 else {"span_prefill", "ring_update"})
    for kernel, arguments in found.items():
        for name, wanted in numbers.items():
            at = arguments[name]
            assert at % 16 == 0
            assert (ctypes.c_int32 * len(capacity)).from_address(at)[:] == wanted.tolist(), (kernel, name)
    if tokens == 1:
        parts = (found["merge_chunks"]["workers"] + batch * len(capacity)) * group * 4
        part, part_lse = found["span_decode"]["part"], found["span_decode"]["part_lse"]
        assert (part, part_lse) == (found["merge_chunks"]["part"], found["merge_chunks"]["part_lse"])
        assert workspace <= part <= part + parts * dim <= part_lse <= part_lse + parts <= workspace + size
        assert found["merge_chunks"]["write"] == 1
    del memory


def span_node(library: Library, inputs: dict[str, Tensor], heads: int, capacity: Sequence[int], **more: Any) -> Node:
    attributes = {"num_heads": heads, "kv_num_heads": len(capacity), "capacity": list(capacity)}
    types, shapes = [NAMES[x.dtype] for x in inputs.values()], [tuple(x.shape) for x in inputs.values()]
    return Node(library, schema.SPAN_ATTENTION, attributes, types, shapes, **more)


def run_span(node: Node, inputs: dict[str, Tensor], **instead: int) -> dict[str, int]:
    """Runs with memory of its own for outputs; `instead`: other addresses. Returns the addresses."""
    batch, tokens = inputs["query"].shape[:2]
    at = {name: x.data_ptr() for name, x in inputs.items()}
    memory, at["workspace"] = aligned(node.workspace(batch))
    at |= {"output": 1 << 20, "present_key": at["key_cache"], "present_value": at["value_cache"], "lse": 1 << 21} | instead
    outputs = [at[name] for name in ("output", "present_key", "present_value", "lse")]
    node.run([at[name] for name in inputs], outputs, batch, tokens, at["workspace"])
    del memory
    return at

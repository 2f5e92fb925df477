"""Attention without gradients on the CPU by the op that is deployed: several times faster than the tiles in PyTorch.

One ONNX Runtime session per shape of caches runs a single `SpanAttention` node on the memory of PyTorch's tensors.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from attnspan.planner.errors import UserError
from attnspan.planner.rules import BLOCK, SINK

ELEMENT = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}
"""ONNX element types."""


@cache
def available() -> bool:
    """Whether ONNX Runtime, onnx and the op library are installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401

        from attnspan.cpu_runtime.library import library_path

        library_path()
    except (ImportError, UserError):
        return False
    return True


def attend(query: Tensor, key: Tensor, value: Tensor, spans: list[int] | None, scale: float) -> Tensor:
    """query [heads, tokens, dim], key and value [kv_heads, tokens, dim], spans in tokens (None: dense) -> [heads, tokens,
    dim].
    """
    heads, tokens, dim = query.shape
    kv_heads = key.shape[0]
    whole = -(-(tokens + 1) // BLOCK) * BLOCK + SINK  # a ring that holds everything, and more than the sinks
    capacity = tuple(whole if spans is None else min(span, whole) for span in (spans or [whole] * kv_heads))
    session = _session(heads, capacity, query.dtype, scale, torch.get_num_threads())
    flat = [x.transpose(0, 1).reshape(1, tokens, -1).contiguous() for x in (query, key, value)]
    # The op leaves what it does not fill: nothing of it is read.
    caches = [torch.empty(1, sum(capacity), dim, dtype=query.dtype) for _ in range(2)]
    numbers = [torch.zeros(1, dtype=torch.int32), torch.tensor([capacity], dtype=torch.int32)]
    output = torch.empty_like(flat[0])
    binding = session.io_binding()
    names = ("query", "key", "value", "past_key", "past_value", "length", "span")
    for name, x in zip(names, [*flat, *caches, *numbers], strict=True):
        binding.bind_input(name, "cpu", 0, ELEMENT.get(x.dtype, 6), list(x.shape), x.data_ptr())
    for name, x in zip(("output", "present_key", "present_value"), [output, *caches], strict=True):
        binding.bind_output(name, "cpu", 0, ELEMENT[x.dtype], list(x.shape), x.data_ptr())
    session.run_with_iobinding(binding)
    return output[0].view(tokens, heads, dim).transpose(0, 1)


@lru_cache(maxsize=256)
def _session(heads: int, capacity: tuple[int, ...], dtype: torch.dtype, scale: float, threads: int) -> Any:
    import onnxruntime as ort
    from onnx import helper

    from attnspan.cpu_runtime.library import library_path

    kind = ELEMENT[dtype]
    shapes = {"query": (kind, 3), "key": (kind, 3), "value": (kind, 3), "past_key": (kind, 3), "past_value": (kind, 3),
              "length": (6, 1), "span": (6, 2)}  # fmt: skip
    results = {"output": (kind, 3), "present_key": (kind, 3), "present_value": (kind, 3)}

    def infos(of: dict[str, tuple[int, int]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, t, [f"{name}_{i}" for i in range(rank)]) for name, (t, rank) in of.items()]

    node = helper.make_node("SpanAttention", list(shapes), list(results), domain="attnspan", num_heads=heads,
                            kv_num_heads=len(capacity), capacity=list(capacity), sink=SINK, scale=scale)  # fmt: skip
    graph = helper.make_graph([node], "span_attention", infos(shapes), infos(results))
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("attnspan", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library_path()))
    # Idle threads must not spin: PyTorch's share the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

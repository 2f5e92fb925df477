"""Runs one SpanAttention node on ONNX Runtime with the op library; shared by the tests of the op."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from attnspan.cpu_runtime.library import library_path

bfloat16 = np.dtype(ml_dtypes.bfloat16)
ONNX_TYPE = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    bfloat16: TensorProto.BFLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int32): TensorProto.INT32,
}
INPUTS = ("query", "key", "value", "past_key", "past_value", "length", "span", "key_scale", "value_scale")


def library() -> Path:
    return Path(os.environ.get("ATTNSPAN_LIBRARY") or library_path())


def session(
    heads: int,
    capacity: list[int],
    *,
    activation: Any = np.float32,
    cache: Any = np.float32,
    threads: int = 2,
    isa: str = "",
    drop: tuple[str, ...] = (),
    shapes: bool = True,
    **attributes: Any,
) -> ort.InferenceSession:
    """A session over one node with outputs output, present_key, present_value, lse; `drop` leaves inputs out,
    without `shapes` the graph declares none."""
    activation, cache = np.dtype(activation), np.dtype(cache)
    types = [activation] * 3 + [cache] * 2 + [np.dtype(np.int32)] * 2 + [np.dtype(np.float32)] * 2
    names = [n for n in INPUTS if (cache == np.int8 or not n.endswith("_scale")) and n not in drop]
    rank = {"length": 1, "key_scale": 1, "value_scale": 1, "span": 2}
    inputs = [
        helper.make_tensor_value_info(n, ONNX_TYPE[t], [f"{n}_{i}" for i in range(rank.get(n, 3))] if shapes else None)
        for n, t in zip(INPUTS, types, strict=True)
        if n in names
    ]
    outputs = [
        helper.make_tensor_value_info(n, ONNX_TYPE[np.dtype(t)], [f"{n}_{i}" for i in range(3)] if shapes else None)
        for n, t in (("output", activation), ("present_key", cache), ("present_value", cache), ("lse", np.float32))
    ]
    node = helper.make_node(
        "SpanAttention",
        [n if n in names else "" for n in INPUTS[: 9 if cache == np.int8 else 7]],
        ["output", "present_key", "present_value", "lse"],
        domain="attnspan",
        **{"num_heads": heads, "kv_num_heads": len(capacity), "capacity": capacity, **attributes},
    )
    graph = helper.make_graph([node], "one_node", inputs, outputs)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("attnspan", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if shapes:
        onnx.checker.check_model(model, check_custom_domain=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library()))
    before = os.environ.get("ATTNSPAN_ISA")
    os.environ["ATTNSPAN_ISA"] = isa
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    finally:
        if before is None:
            del os.environ["ATTNSPAN_ISA"]
        else:
            os.environ["ATTNSPAN_ISA"] = before


def run(sess: ort.InferenceSession, feeds: dict[str, np.ndarray], in_place: bool = True) -> dict[str, np.ndarray]:
    """Runs the node. With `in_place` the arrays past_key and past_value are bound as the presents too, and are changed."""
    binding = sess.io_binding()
    kept = []
    for name, array in feeds.items():
        array = np.ascontiguousarray(array)
        kept.append(array)
        binding.bind_input(name, "cpu", 0, ONNX_TYPE[array.dtype], list(array.shape), array.ctypes.data)
    batch, tokens, width = feeds["query"].shape
    shape = {
        "output": (batch, tokens, width),
        "present_key": feeds["past_key"].shape,
        "present_value": feeds["past_value"].shape,
        "lse": (batch, width // feeds["past_key"].shape[-1], tokens),
    }
    out = {}
    for name, dims in shape.items():
        dtype = {"output": feeds["query"].dtype, "lse": np.dtype(np.float32)}.get(name, feeds["past_key"].dtype)
        past = "past" + name.removeprefix("present")
        out[name] = feeds[past] if in_place and past in feeds else np.zeros(dims, dtype)
        binding.bind_output(name, "cpu", 0, ONNX_TYPE[dtype], list(dims), out[name].ctypes.data)
    sess.run_with_iobinding(binding)
    return out

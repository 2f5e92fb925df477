"""Quantised weights of an ONNX file, by QuantizeLinear and DequantizeLinear: TensorRT-RTX builds them beside 16-bit numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attnspan.export.ops import IR_VERSION, OPSET
from attnspan.plugins.trt_sparse_attn import builder, tensorrt_api
from attnspan.plugins.trt_sparse_attn.engine import Profile

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

SIZE, BLOCK = 128, 64
STEPS = [Profile("decode", (1, 4, 4), (1, 1, 1), (1, 1, 1))]


def save(path: Path, weights: int, activations: int, blocks: bool, both: bool) -> None:
    """x . dequantised weights; `blocks`: a scale for each 64 rows, else for a column; `both`: x is quantised, too."""
    random = np.random.default_rng(0)
    content = random.integers(-7, 8, SIZE * SIZE).tolist()
    scales = [SIZE // BLOCK, SIZE] if blocks else [SIZE]
    how = {"axis": 0, "block_size": BLOCK} if blocks else {"axis": 1}
    initializers = [
        helper.make_tensor("weight", weights, [SIZE, SIZE], content),
        helper.make_tensor("scale", activations, scales, random.uniform(0.01, 0.1, np.prod(scales)).tolist()),
    ]
    nodes = [helper.make_node("DequantizeLinear", ["weight", "scale"], ["matrix"], **how)]
    name = "x"
    if both:
        initializers += [helper.make_tensor("x_scale", activations, [], [0.05]), helper.make_tensor("zero", weights, [], [0])]
        nodes.append(helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["small"]))
        nodes.append(helper.make_node("DequantizeLinear", ["small", "x_scale"], ["wide"]))
        name = "wide"
    nodes.append(helper.make_node("MatMul", [name, "matrix"], ["y"]))
    ends = [helper.make_tensor_value_info(end, activations, ["batch", SIZE]) for end in ("x", "y")]
    graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION), path)


@pytest.mark.parametrize("activations", ["FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize(
    ("weights", "blocks", "both"),
    [("INT8", False, False), ("INT8", False, True), ("FLOAT8E4M3FN", False, False), ("FLOAT8E4M3FN", False, True),
     ("INT4", True, False)],
)  # fmt: skip
def test_quantised_weights_build(tmp_path: Path, weights: str, activations: str, blocks: bool, both: bool) -> None:
    path = tmp_path / "linear.onnx"
    save(path, getattr(TensorProto, weights), getattr(TensorProto, activations), blocks, both)
    api = tensorrt_api.load(rtx=True)
    assert len(builder.serialize(api, path, STEPS, layers=1, arch="89").engine) > 1000

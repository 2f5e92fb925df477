"""ONNX models of one plugin node, for TensorRT's parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from attnspan.export.ops import DOMAIN, IR_VERSION, OPSET, VERSION
from attnspan.plugins.trt_sparse_attn.engine import Profile
from attnspan.plugins.trt_sparse_attn.schema import Op, Port

TYPES = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "int32": TensorProto.INT32,
}
PROFILES = [
    Profile("prefill", (1, 1, 1), (1, 32, 32), (1, 1, 1)),
    Profile("decode", (1, 4, 4), (1, 1, 1), (1, 1, 1)),
]
SPAN = {"num_heads": 4, "kv_num_heads": 2, "capacity": [128, 192]}
SIZES = {"num_heads*dim": 256, "kv_num_heads*dim": 128, "dim": 64, "slots": 320, "kv_num_heads": 2, "num_heads": 4,
         "columns": 128, "words": 4, "batch": "batch", "tokens": "sequence"}  # fmt: skip


def types_of(op: Op, kind: str = "float16", cache: str | None = None) -> list[str]:
    """A type of each input: optional ones go with an e4m3 cache."""
    letters = {"T": kind, "C": cache or kind}
    ports = op.inputs if cache == "float8_e4m3fn" else op.inputs[: op.required_inputs]
    return [letters.get(port.type, port.type) for port in ports]


def save_node(
    path: Path,
    op: Op,
    attributes: dict[str, Any],
    types: list[str],
    shapes: dict[str, list[int | str]] | None = None,
    domain: str = DOMAIN,
) -> Path:
    """A model of one node with inputs of these types; `shapes` in place of those that SIZES gives."""
    ports = op.inputs[: len(types)]
    results = op.outputs

    def shape(name: str, axes: tuple[str, ...]) -> list[Any]:
        return (shapes or {}).get(name) or [SIZES[axis] for axis in axes]

    def values(of: tuple[Port, ...], kinds: list[str]) -> list[Any]:
        make = helper.make_tensor_value_info
        return [make(x.name, TYPES[kind], shape(x.name, x.shape)) for x, kind in zip(of, kinds, strict=True)]

    letters = {port.type: kind for port, kind in zip(ports, types, strict=True)}
    inputs, outputs = values(ports, types), values(results, [letters.get(port.type, port.type) for port in results])
    names = [[x.name for x in of] for of in (inputs, outputs)]
    node = helper.make_node(op.name, *names, name="node", domain=domain, **attributes)
    graph = helper.make_graph([node], "node", inputs, outputs)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(domain, VERSION)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION), path)
    return path

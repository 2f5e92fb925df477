"""Builds engines of one node, and nodes that are refused, with the plugin in C++ or in Python; a process has one of them.

trt_cpp_program.py LIBRARY|python OUT     engines into the folder OUT; JSON: why the bad nodes were refused
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trt_nodes import PROFILES, SPAN, save_node, types_of

from attnspan.plugins.trt_sparse_attn import builder, plugin, tensorrt_api
from attnspan.plugins.trt_sparse_attn.schema import LSH_HASH, MERGE_ATTENTION, SPAN_ATTENTION
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Api

HASH = {"num_heads": 4, "signature_bits": 128}
TABLES = {"num_heads": 4, "bits": 10, "tables": 8}
MERGE = {"num_heads": 4}
FP8 = "float8_e4m3fn"
GOOD: dict[str, Any] = {
    "span_fp16": (SPAN_ATTENTION, SPAN | {"sink": 4, "scale": 0.25}, ("float16",), {}),
    "span_bf16": (SPAN_ATTENTION, SPAN, ("bfloat16",), {}),
    "span_fp8": (SPAN_ATTENTION, SPAN, ("bfloat16", FP8), {}),
    "hash": (LSH_HASH, HASH, ("float16",), {}),
    "tables": (LSH_HASH, TABLES, ("bfloat16",), {"projection": [64, 80]}),
    "merge": (MERGE_ATTENTION, MERGE, ("bfloat16",), {}),
}
BAD: dict[str, Any] = {
    "type": (SPAN_ATTENTION, SPAN, ("float32",), {}),
    "cache": (SPAN_ATTENTION, SPAN, ("float16", "bfloat16"), {}),
    "capacity": (SPAN_ATTENTION, SPAN | {"capacity": [128, 100]}, ("float16",), {}),
    "slots": (SPAN_ATTENTION, SPAN, ("float16",), {"past_key": ["batch", 300, 64]}),
    "head": (SPAN_ATTENTION, SPAN, ("float16",), {"query": ["batch", "sequence", 128]}),
    "rank": (SPAN_ATTENTION, SPAN, ("float16",), {"length": ["batch", 1]}),
    "bits": (LSH_HASH, HASH | {"bits": 3}, ("float16",), {}),
    "lse": (MERGE_ATTENTION, MERGE, ("float16",), {"lse_b": ["batch", 3, "sequence"]}),
}


def refusal(api: Api, path: Path) -> str:
    """The first reason that the plugin gives."""
    said: list[str] = []
    logger = api.logger(lambda _, text: said.append(text))
    network = api.trt.Builder(logger).create_network(api.network_flags())
    parser = api.trt.OnnxParser(network, logger)
    with plugin.collected():
        parser.parse_from_file(str(path))
    reasons = [*plugin.refusals, *(text.removeprefix("attnspan: ") for text in said if text.startswith("attnspan: "))]
    return reasons[0]


def main(library: str, out: Path) -> None:
    api = tensorrt_api.load(rtx=True)
    if library == "python":
        plugin.register(api)
    else:
        api.load_plugin(Path(library))
    for name, (op, attributes, kinds, shapes) in GOOD.items():
        path = save_node(out / f"{name}.onnx", op, attributes, types_of(op, *kinds), shapes)
        (out / f"{name}.engine").write_bytes(builder.serialize(api, path, PROFILES, layers=1, arch="89").engine)
    reasons = {}
    for name, (op, attributes, kinds, shapes) in BAD.items():
        reasons[name] = refusal(api, save_node(out / f"{name}.onnx", op, attributes, types_of(op, *kinds), shapes))
    print(json.dumps(reasons))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

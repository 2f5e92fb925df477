"""Target `portable` in TensorRT without a plugin: parsed into its own attention and cache layers, and built into an engine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_models import export_tiny

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn import tensorrt_api
from attnspan.plugins.trt_sparse_attn.engine import BuildOptions, build_engine


def installed() -> tensorrt_api.Api:
    try:
        return tensorrt_api.load(rtx=True)
    except UserError as error:
        pytest.skip(f"needs tensorrt-rtx: {error}")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_built_without_a_plugin(dtype: str, tmp_path: Path) -> None:
    """Two layers of two rules each: every cache is an input and an output of the network, updated in place."""
    api = installed()
    folder = export_tiny(tmp_path, target="portable", dtype=dtype, cache_dtype=dtype, chunk=48).folder
    layers, presents = parsed(api, folder / "model.onnx")
    assert layers["KV_CACHE_UPDATE"] == 8
    assert layers["ATTENTION_INPUT"] == layers["ATTENTION_OUTPUT"] == 4
    assert layers["ROTARY_EMBEDDING"] == 4
    assert "PLUGIN_V3" not in layers
    kind = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    rings = [64 + 144, 64 + 384]
    assert presents == [(kind, (-1, 1, slots, 16)) for _ in range(2) for slots in rings for _ in range(2)]

    engine = build_engine(folder, BuildOptions(rtx=True, arch="80", max_batch=3))
    assert engine.stat().st_size > 10_000
    sidecar = json.loads(engine.with_suffix(".json").read_text(encoding="utf-8"))
    assert sidecar["plugin"] is None
    assert [profile["sequence"] for profile in sidecar["profiles"]] == [[1, 48, 48], [1, 1, 1]]


def parsed(api: tensorrt_api.Api, model: Path) -> tuple[Counter[str], list[tuple[str, Any]]]:
    """Layers by their kinds, and type and shape of each cache that the network gives out."""
    logger = api.logger(lambda severity, text: None)
    network = api.trt.Builder(logger).create_network(api.network_flags())
    parser = api.trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(model)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    outputs = [network.get_output(i) for i in range(1, network.num_outputs)]
    assert [x.name.replace("present", "past") for x in outputs] == [
        network.get_input(i).name for i in range(4, network.num_inputs)
    ]
    return layers, [(api.data_type(x.dtype), tuple(x.shape)) for x in outputs]

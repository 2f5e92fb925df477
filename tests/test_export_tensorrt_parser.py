"""What TensorRT's parser makes of target `tensorrt`: TensorRT-RTX, which needs no GPU, with the plugin in Python."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tiny_models import export_rules

from attnspan.export.pipeline import Options, export_model
from attnspan.planner.rules import HeadRule

DIM = 64  # the plugin takes no smaller heads


class Network:
    """A parsed network. The parser must outlive what it made."""

    def __init__(self, model: Path) -> None:
        from attnspan.plugins.trt_sparse_attn import plugin, tensorrt_api

        self.api = tensorrt_api.load(rtx=True)
        plugin.register(self.api)
        self.logger = self.api.logger(lambda *_: None)
        self.builder = self.api.trt.Builder(self.logger)
        self.network = self.builder.create_network(self.api.network_flags())
        self.parser = self.api.trt.OnnxParser(self.network, self.logger)
        assert self.parser.parse_from_file(str(model)), [self.parser.get_error(i).desc() for i in range(self.parser.num_errors)]

    def inputs_and_outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Types and shapes; -1: not known before a call."""
        n = self.network
        values = [n.get_input(i) for i in range(n.num_inputs)] + [n.get_output(i) for i in range(n.num_outputs)]
        return {x.name: (self.api.data_type(x.dtype), tuple(x.shape)) for x in values}

    def layers(self) -> dict[str, list[Any]]:
        """Layers by type."""
        found = defaultdict(list)
        for layer in (self.network.get_layer(i) for i in range(self.network.num_layers)):
            found[str(layer.type).rpartition(".")[2]].append(layer)
        return found

    def types(self, kind: str) -> set[str]:
        """Types of the first outputs of all layers of a type."""
        return {self.api.data_type(layer.get_output(0).dtype) for layer in self.layers()[kind]}


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def parsed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, str]:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    rules = [[HeadRule("span", 0, 0.25), HeadRule("span", 0, 0.75)]] * 2
    config = {"family": "qwen3", "head_dim": DIM}
    folder = tmp_path_factory.mktemp("parsed")
    done = export_rules(folder, rules, config=config, target="tensorrt", dtype=request.param, cache_dtype=None)
    return Network(done.folder / "model.onnx"), {"fp16": "float16", "bf16": "bfloat16"}[request.param]


def test_inputs_and_outputs(parsed: tuple[Network, str]) -> None:
    """Batch, tokens and kept logits are open, all else is fixed; the number of kept logits is a shape tensor, in host memory."""
    network, kind = parsed
    cache = (kind, (-1, 128 + 384, DIM))
    caches = {f"{when}_{name}.{i}": cache for when in ("past", "present") for name in ("key", "value") for i in range(2)}
    assert network.inputs_and_outputs() == caches | {
        "input_ids": ("int64", (-1, -1)),
        "length": ("int32", (-1,)),
        "span": ("int32", (2, -1, 2)),
        "logits_to_keep": ("int64", (1,)),
        "logits": ("float32", (-1, -1, 300)),
    }
    shape_tensors = [x.name for x in map(network.network.get_input, range(network.network.num_inputs)) if x.is_shape_tensor]
    assert shape_tensors == ["logits_to_keep"]


def test_layers(parsed: tuple[Network, str]) -> None:
    """One plugin a layer, RoPE as the native layer, products in the model's type, sums of norms in fp32."""
    network, kind = parsed
    layers = network.layers()
    assert [layer.name for layer in layers["PLUGIN_V3"]] == ["layers.0.attention", "layers.1.attention"]
    assert len(layers["ROTARY_EMBEDDING"]) == 2 * 2
    assert len(layers["MATRIX_MULTIPLY"]) == 2 * 7 + 1
    assert len(layers["REDUCE"]) == 2 * 4 + 1
    for name in ("PLUGIN_V3", "ROTARY_EMBEDDING", "MATRIX_MULTIPLY", "ACTIVATION"):
        assert network.types(name) == {kind}
    assert network.types("REDUCE") == network.types("UNARY") - {"int64"} == {"float32"}


@pytest.mark.model
def test_demo_model(tmp_path: Path) -> None:
    """All 30 layers."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from demo_model import gguf

    done = export_model(Options(str(gguf()), tmp_path / "out", target="tensorrt", n_max=4096))
    network = Network(done.folder / "model.onnx")
    assert len(network.layers()["PLUGIN_V3"]) == 30
    assert network.inputs_and_outputs()["past_key.29"] == ("bfloat16", (-1, 3 * 2048, 64))

"""The normal form against transformers: every family, RoPE of every type, caches, batches; and the traced oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from tiny_models import FAMILIES, save_tiny_model
from transformers import AutoModelForCausalLM

from attnspan.export.frontends.build import build
from attnspan.export.frontends.trace import trace
from attnspan.export.source import open_source
from attnspan.planner.errors import UserError

N_MAX = 4096
TOLERANCE = 2e-5  # fp32 against fp32; logits of the tiny models go up to 7


class NormalForm:
    """A normal form on ONNX Runtime."""

    def __init__(self, model: ir.Model, folder: Path, check: bool = True) -> None:
        file = folder / "normal.onnx"
        ir.save(model, file, external_data="normal.onnx.data")
        if check:
            onnx.checker.check_model(file, full_check=True)
        self.session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        self.caches = [x for x in self.session.get_inputs() if x.name.startswith("past_")]

    def __call__(self, ids: np.ndarray, keep: int = 0, past: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Outputs by name; `past` are the outputs of the call before."""
        batch, tokens = ids.shape
        if past is None:
            past = {
                x.name.replace("past", "present"): np.zeros((batch, x.shape[1], 0, x.shape[3]), np.float32) for x in self.caches
            }
        first = past["present_key.0"].shape[2]
        feeds = {x.name: past[x.name.replace("past", "present")] for x in self.caches}
        feeds |= {"input_ids": ids, "logits_to_keep": np.array([keep])}
        feeds["position_ids"] = np.tile(np.arange(first, first + tokens), (batch, 1))
        names = [x.name for x in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, feeds), strict=True))


def built(folder: Path) -> ir.Model:
    source = open_source(str(folder))
    return build(source.config, source.weights, N_MAX)


def expected(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids)).logits.numpy()
    return logits


def some_ids(batch: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers(family: str, tmp_path: Path) -> None:
    """A batch in one go, and cut into chunks of 20, 1 and 12 with logits of the last rows only."""
    folder = save_tiny_model(tmp_path, family)
    ids = some_ids(2, 33)
    want = expected(folder, ids)
    run = NormalForm(built(folder), tmp_path)
    np.testing.assert_allclose(run(ids)["logits"], want, atol=TOLERANCE)

    first = run(ids[:, :20], keep=3)
    np.testing.assert_allclose(first["logits"], want[:, 17:20], atol=TOLERANCE)
    second = run(ids[:, 20:21], keep=1, past=first)
    third = run(ids[:, 21:], keep=40, past=second)
    np.testing.assert_allclose(third["logits"], want[:, 21:], atol=TOLERANCE)


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": LLAMA3 | {"rope_theta": 10000.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("rope", ROPES)
def test_rope_equals_transformers(rope: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, rope_parameters=ROPES[rope])
    ids = some_ids(1, 150)
    got = NormalForm(built(folder), tmp_path)(ids)["logits"]
    np.testing.assert_allclose(got, expected(folder, ids), atol=5 * TOLERANCE)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_of_an_older_config(rope: str, tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling, the type as `rope_type` or, earlier, `type`."""
    folder = save_tiny_model(tmp_path, rope_parameters=ROPES[rope])
    ids = some_ids(1, 100)
    new = NormalForm(built(folder), tmp_path)(ids)["logits"]
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    if rope != "theta":
        config["rope_scaling"] = scaling
    if rope in ("linear", "dynamic"):
        scaling["type"] = scaling.pop("rope_type")
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(NormalForm(built(folder), tmp_path)(ids)["logits"], new)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_are_widened(dtype: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, dtype=dtype)
    ids = some_ids(1, 20)
    got = NormalForm(built(folder), tmp_path)(ids)["logits"]
    np.testing.assert_allclose(got, expected(folder, ids), atol=TOLERANCE)


def test_attentions_are_the_normal_form(tmp_path: Path) -> None:
    model = built(save_tiny_model(tmp_path, "qwen3"))
    names = [node.name for node in model.graph if node.op_type == "Attention"]
    assert names == ["layers.0.attention", "layers.1.attention"]
    assert model.opset_imports == {"": 24}
    assert {node.domain for node in model.graph} == {""}


def test_weights_stay_in_place(tmp_path: Path) -> None:
    """fp32 weights are the safetensors file itself; a tied embedding is there once."""
    model = built(save_tiny_model(tmp_path, "qwen2"))
    weights = {name: x.const_value for name, x in model.graph.initializers.items() if name.startswith("model.")}
    assert all(isinstance(x, ir.ExternalTensor) and x.path.endswith("model.safetensors") for x in weights.values())
    assert [name for name in weights if "embed" in name] == ["model.embed_tokens.weight"]
    assert "lm_head.weight" not in model.graph.initializers


@pytest.mark.parametrize("family", ["llama-biased", "qwen2", "qwen3"])
def test_tracing_gives_the_same(family: str, tmp_path: Path) -> None:
    """The oracle that shares no code with the builder: same inputs, same outputs, logits and caches."""
    folder = save_tiny_model(tmp_path / "model", family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = some_ids(2, 12)
    results = []
    for name, graph in (("built", built(folder)), ("traced", trace(model))):
        (tmp_path / name).mkdir()
        run = NormalForm(graph, tmp_path / name, check=name == "built")
        first = run(ids[:, :9], keep=2)
        results.append((first, run(ids[:, 9:], keep=1, past=first)))
    for mine, traced in zip(*results, strict=True):
        assert list(mine) == list(traced)
        for name in mine:
            np.testing.assert_allclose(mine[name], traced[name], atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; MODEL must be one of llama, mistral, "),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type is 'proportional'"),
        ({"rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 1024}, "up to 1024 tokens only"),
        (
            {"model_type": "gemma3_text", "hidden_activation": "gelu"},
            "hidden_activation is 'gelu'; MODEL must use one of 'silu', ",
        ),
        ({"intermediate_size": 95}, "'model.layers.0.mlp.gate_proj.weight' is [96, 64], [95, 64] by config.json"),
        ({"attention_bias": True}, "lacks the weight 'model.layers.0.self_attn.q_proj.bias'"),
        ({"num_hidden_layers": 1}, "9 weights that its model_type has no use for"),
        ({"rms_norm_eps": None}, "lacks 'rms_norm_eps'"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_refusals(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = open_source(str(save_tiny_model(tmp_path)))
    config = {key: value for key, value in (source.config | change).items() if value is not None}
    with pytest.raises(UserError) as error:
        build(config, source.weights, N_MAX)
    assert message in str(error.value)

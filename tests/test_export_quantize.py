"""Weights in 4 and 8 bits: the graph computes what the dequantised matrices compute, and each is stored once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import export_tiny, save_tiny_model

from attnspan.cpu_runtime.session import Session
from attnspan.export import quantize, weights, writer
from attnspan.export.frontends.build import build
from attnspan.export.quantize import fake_quantize, is_quantized, quantize_weights
from attnspan.export.source import open_source
from attnspan.planner.errors import UserError
from attnspan.runtime.artefact import Artefact

FLOAT = ir.DataType.FLOAT
ACTIVATIONS = 0.02
"""Share of the largest logit that 8-bit activations may move logits on average."""


def nearest(weight: np.ndarray, bits: int) -> np.ndarray:
    """By blocks of 32 inputs: 8 bits about 0, 4 bits over the range of the block and 0; each number to the nearest level."""
    outputs, inputs = weight.shape
    padded = np.zeros((outputs, -(-inputs // 32) * 32), np.float32)
    padded[:, :inputs] = weight
    x = padded.reshape(outputs, -1, 32)
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    if bits == 8:
        step = np.maximum(-low, high) / 128
        return step * np.ones_like(x)
    return (high - low) / 15 * np.ones_like(x)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.sampled_from([32, 64, 96, 40, 7]), st.sampled_from(["int4", "int8"]), st.integers(0, 99))
def test_error_is_within_a_step(outputs: int, inputs: int, kind: str, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32)
    got = fake_quantize(weight, kind, end=False)
    assert got.shape == weight.shape
    step = nearest(weight, 4 if kind == "int4" else 8).reshape(outputs, -1)[:, :inputs]
    assert (np.abs(got - weight) <= 1.01 * step).all()
    if weight.size >= 64:  # a quarter on average, where there are enough to average over
        assert np.abs(got - weight).mean() <= 0.35 * step.mean()
    rows = [fake_quantize(row[None], kind, end=False)[0] for row in weight]
    np.testing.assert_array_equal(np.stack(rows), got)  # so that fused matrices may be quantised in parts


def product(weight: ir.TensorProtocol, inputs: int, outputs: int, transposed: bool, bias: bool) -> ir.Model:
    """input_ids is there as a normal form has it; y = x W, with W stored either way round."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["tokens", inputs]))
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    tensors = {"w": weight} | ({"b": ir.tensor(np.arange(outputs, dtype=np.float32), name="b")} if bias else {})
    held = [ir.Value(name=n, type=ir.TensorType(FLOAT), shape=ir.Shape(t.shape), const_value=t) for n, t in tensors.items()]
    kind, how = ("Gemm", {"transB": int(transposed)}) if transposed or bias else ("MatMul", {})
    node = ir.node(kind, [x, *held], how)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(FLOAT), ir.Shape(["tokens", outputs])
    graph = ir.Graph([x, ids], [y], nodes=[node], initializers=held, opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=12)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_product(kind: str, transposed: bool, bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms, blocks of few rows, inputs that are no whole number of blocks; no tokens at all, as an expert may get."""
    monkeypatch.setattr(weights, "BLOCK", 7 * 72)
    monkeypatch.setattr(quantize, "SMALLEST", 1)
    rng = np.random.default_rng(0)
    outputs, inputs = 61, 72
    w = rng.normal(size=(outputs, inputs)).astype(np.float32)
    stored = ir.tensor(w if transposed else np.ascontiguousarray(w.T), name="w")
    model = product(stored, inputs, outputs, transposed, bias)
    quantize_weights(model, kind)
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    writer.write_model(model, tmp_path / "m.onnx", "m.data", 256)
    session = ort.InferenceSession(tmp_path / "m.onnx")
    x = rng.normal(size=(5, inputs)).astype(np.float32)
    got = session.run(None, {"x": x, "input_ids": np.zeros(1, np.int64)})[0]
    want = x @ fake_quantize(w, kind, end=True).T + (np.arange(outputs) if bias else 0)  # the only product is the head
    assert np.abs(got - want).mean() <= 0.01 * np.abs(want).max()
    assert session.run(None, {"x": x[:0], "input_ids": np.zeros(1, np.int64)})[0].shape == (0, outputs)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tied") / "model", "qwen2", dtype="bfloat16")


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_model(kind: str, tied: Path, tmp_path: Path) -> None:
    """The normal form with quantised weights against the one with dequantised ones; nothing is read before it is written."""
    source = open_source(str(tied))
    quantised, exact = build(source.config, source.weights, 512), build(source.config, source.weights, 512)
    quantize_weights(quantised, kind)
    for name, x in exact.graph.initializers.items():
        if name.endswith("weight") and len(x.shape) == 2 and is_quantized(tuple(x.shape), name):
            held = x.const_value.numpy().astype(np.float32)
            x.const_value = ir.tensor(fake_quantize(held, kind, end="embed" in name), name=name)
    ops = [node.op_type for node in quantised.graph]
    # Keys and values of 32 features are too small.
    assert (ops.count("Gemm"), ops.count("MatMulNBits"), ops.count("GatherBlockQuantized")) == (2 * 2, 2 * 5 + 1, 1)
    logits = []
    ids = np.random.default_rng(0).integers(0, 256, (2, 40))
    for name, model in (("quantised", quantised), ("exact", exact)):
        writer.write_model(model, tmp_path / f"{name}.onnx", f"{name}.data", 256)
        session = ort.InferenceSession(tmp_path / f"{name}.onnx")
        pasts = {x.name: np.zeros((2, 2, 0, 16), np.float32) for x in session.get_inputs() if x.name.startswith("past")}
        feeds = {"input_ids": ids, "position_ids": np.tile(np.arange(40), (2, 1)), "logits_to_keep": np.zeros(1, np.int64)}
        logits.append(session.run(["logits"], feeds | pasts)[0])
    assert np.abs(logits[0] - logits[1]).mean() <= ACTIVATIONS * np.abs(logits[1]).max()

    got = {name: x.const_value for name, x in ir.load(tmp_path / "quantised.onnx").graph.initializers.items()}
    embedding, head = got["model.embed_tokens.weight_Q8_rows"], got["model.embed_tokens.weight_Q8"]
    assert (embedding.offset, embedding.length) == (head.offset, head.length)  # tied: stored once
    bits = {name.rsplit("_Q", 1)[1].split("_")[0] for name in got if "_Q" in name}
    assert bits == ({"4", "8"} if kind == "int4" else {"8"})


def test_experts_are_chosen_in_full_precision() -> None:
    assert is_quantized((64, 512), "model.layers.0.mlp.gate_proj.weight")
    assert not is_quantized((64, 512), "model.layers.0.mlp.gate.weight")
    assert not is_quantized((8, 32), "model.layers.0.self_attn.k_proj.weight")
    assert not is_quantized((300, 72), "model.embed_tokens.weight", embedding=True)


def test_unknown_type(tied: Path, tmp_path: Path) -> None:
    source = open_source(str(tied))
    with pytest.raises(UserError, match="--weights is 'int3'; must be one of int4, int8"):
        quantize_weights(build(source.config, source.weights, 512), "int3")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="no PyTorch to verify with")
@pytest.mark.parametrize(("target", "family"), [("cpu", "qwen3"), ("portable", "llama-biased")])
def test_export_is_verified(target: str, family: str, tmp_path: Path) -> None:
    """With PyTorch on matrices quantised likewise; the report says what quantising changed."""
    done = export_tiny(tmp_path, family, target=target, weights="int4", verify_tokens=200, n_max=256)
    assert done.description["weights"] == "int4"
    for row in done.description["verify"]["rows"]:
        assert row["lost_diff"] > 3 * row["mean_diff"]  # the model as it was is farther away than the quantised one
    artefact = Artefact.load(done.folder)
    assert artefact.info["files"]["model.onnx.data"]["bytes"] < 200_000
    assert Session(done.folder).prefill(0, [1, 2, 3]).shape == (1, 300)

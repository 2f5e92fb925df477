"""Verification: the PyTorch reference against the NumPy one, right artefacts pass, wrong ones do not and are not kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from reference import span_attention_reference
from tiny_models import export_tiny, save_tiny_model

from attnspan.export import artefact as artefact_module
from attnspan.export import verify_worker
from attnspan.export.pipeline import Options, export_model
from attnspan.export.torch_reference import TorchReference
from attnspan.export.verify import AS_IT_IS, TOLERANCE, Row, VerificationError, check, text
from attnspan.runtime.artefact import Artefact

TOKENS = 400  # more than either capacity, 128 and 384


@pytest.mark.parametrize("cache", ["float32", "float16", "bfloat16"])
def test_torch_attention_equals_the_numpy_reference(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for all queries; spans differ by query and head; the last queries are scored in a chunk of their own."""
    monkeypatch.setattr("attnspan.export.torch_reference.QUERIES", 48)
    heads, kv_heads, tokens, dim, sink = 6, 3, 100, 16, 8
    query, key, value = (torch.randn(1, n, tokens, dim) for n in (heads, kv_heads, kv_heads))
    spans = torch.randint(sink + 1, tokens, (tokens, 2, kv_heads))
    spans[50:] = spans[50]
    spans[:50] = spans[0]
    reference = TorchReference.__new__(TorchReference)
    reference.spans, reference.sinks, reference.cache_dtype = spans, (0, sink), getattr(torch, cache)
    reference.scales = None
    got, _ = reference._attend(SimpleNamespace(layer_idx=1), query, key, value, scaling=0.3)

    flat = [x[0].transpose(0, 1).flatten(1)[None].numpy() for x in (query, key, value)]
    numpy_cache = ir.DataType[{"float32": "FLOAT"}.get(cache, cache.upper())].numpy()
    for positions in (slice(0, 50), slice(50, 100)):
        past = np.zeros((1, kv_heads * tokens, dim), numpy_cache)
        span = spans[positions.start, 1][None].numpy()
        want, *_ = span_attention_reference(*flat, past, past, np.zeros(1, int), span, [tokens] * kv_heads, sink, scale=0.3)
        np.testing.assert_allclose(got[0, positions].flatten(1), want[0, positions], atol=2e-6)


def compare(folder: Path, model: Path, tokens: int = TOKENS) -> list[Row]:
    artefact = Artefact.load(folder)
    rows = verify_worker.compare(artefact, model, tokens)
    for row in rows:
        check(row, TOLERANCE[artefact.cache_dtype])
    return rows


@pytest.mark.parametrize(
    ("family", "cache"),
    [("llama", "fp32"), ("llama-biased", "fp32"), ("llama-mha", "bf16"), ("qwen2", "fp16"), ("qwen3", "bf16")],
)
def test_right_artefacts_pass(family: str, cache: str, tmp_path: Path) -> None:
    done = export_tiny(tmp_path, family, cache_dtype=cache)
    rows = compare(done.folder, tmp_path / "model")
    assert [row.prompt for row in rows] == [400, 133, 7]
    new = verify_worker.GENERATED
    assert [row.compared for row in rows] == [400 + new, 133 + new, 7 + new]
    capacity = done.plan.capacities()
    assert [row.wrapped for row in rows] == [capacity.size, (capacity < 133 + new).sum(), 0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of the tiny llama in fp32; the model is beside it."""
    return export_tiny(tmp_path_factory.mktemp("exported")).folder


def test_a_window_one_token_too_wide_is_noticed(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify_worker._spans
    monkeypatch.setattr(verify_worker, "_spans", lambda *args: right(*args) + 1)
    with pytest.raises(VerificationError, match="99th percentile of the logits' differences"):
        compare(exported, exported.parent / "model")


def test_another_model_is_noticed(exported: Path, tmp_path: Path) -> None:
    """The smallest of changes to one weight matrix."""
    from safetensors.numpy import load_file, save_file

    other = save_tiny_model(tmp_path)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError):
        compare(exported, other)


def test_check() -> None:
    tolerance = TOLERANCE["float32"]
    good = Row(10, 16, 26, 1e-2, 9e-5 * 8, 9e-6 * 8, 8.0, 14, 15, 0)
    check(good, tolerance)
    for bad in ({"p99_diff": 1.1e-4 * 8}, {"mean_diff": 1.1e-5 * 8}, {"mean_diff": float("nan")}, {"same_tokens": 14}):
        with pytest.raises(VerificationError):
            check(dataclasses.replace(good, **bad), tolerance)


def test_export_verifies_and_keeps_the_report(tmp_path: Path) -> None:
    done = export_tiny(tmp_path, verify_tokens=200)
    report = json.loads((done.folder / "attnspan.json").read_text())["verify"]
    assert [row["prompt"] for row in report["rows"]] == [200, 66, 7]
    assert report["ran"] == AS_IT_IS
    assert "2 rings were overwritten" in text(report)
    assert [stage.name for stage in done.stages] == ["build graph", "write files", "verify"]
    assert all(stage.seconds > 0 and stage.peak_rss > 1e6 for stage in done.stages)
    Artefact.load(done.folder).check_hashes()


def test_a_short_text_overwrites_no_ring_and_says_so(exported: Path) -> None:
    rows = compare(exported, exported.parent / "model", 50)
    assert "no ring was overwritten" in text({"rows": [dataclasses.asdict(row) for row in rows]})


def test_a_wrong_artefact_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, write = save_tiny_model(tmp_path / "model"), artefact_module.write_model

    def wrong(graph: ir.Model, folder: Path) -> dict[str, object]:
        norm = graph.graph.initializers["model.norm.weight"]
        norm.const_value = ir.tensor(norm.const_value.numpy() * np.float32(1.01), name=norm.name)
        return write(graph, folder)

    monkeypatch.setattr(artefact_module, "write_model", wrong)
    with pytest.raises(VerificationError, match="differs from the model"):
        export_model(Options(str(model), tmp_path / "out", n_max=512, verify_tokens=100))
    assert [x.name for x in tmp_path.iterdir()] == ["model"]

"""Families that `build` does not know, traced: artefacts against transformers, and what cannot be traced."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from test_export_families import TOLERANCE, exported, generate
from tiny_models import FAMILIES, save_tiny_model
from transformers import AutoModelForCausalLM

from attnspan.export.frontends.choose import layer_windows, normal_form
from attnspan.export.source import open_source
from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan

TRACED: dict[str, dict[str, Any]] = {
    # LayerNorm, attention and MLP side by side, no positions in layers that do not slide, scaled logits, RoPE of pairs.
    "cohere2": {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
    # Norms after attention and MLP, two RoPEs.
    "olmo3": {"sliding_window": 90, "layer_types": ["full_attention", "sliding_attention"]},
}


@pytest.fixture(params=TRACED)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(FAMILIES, request.param, TRACED[request.param])
    return save_tiny_model(tmp_path / "model", request.param)


def test_traced_is_what_transformers_computes(folder: Path, tmp_path: Path) -> None:
    out = exported(folder, tmp_path / "out", 1.0)
    windows = layer_windows(open_source(str(folder)).config)
    assert Plan.load(out).windows == tuple(windows)
    assert sorted(map(str, windows)) == [str(max(w for w in windows if w)), "None"]
    got, tokens = generate(out)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    assert want[389:-1].argmax(-1).tolist() == tokens[390:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no_such_model"}, "model_type is 'no_such_model', which transformers does not know; families that"),
        ({"model_type": None}, "model_type is None, which transformers does not know"),
        ({"model_type": "cohere2", "layer_types": ["chunked_attention"] * 2}, "layers of type chunked_attention"),
        (
            {"model_type": "glm4", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic', which cannot",
        ),
    ],
)
def test_refusals(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = open_source(str(save_tiny_model(tmp_path)))
    with pytest.raises(UserError) as error:
        normal_form(dataclasses.replace(source, config=source.config | change), 512)
    assert message in str(error.value)


def test_traced_in_fp32_only(tmp_path: Path) -> None:
    source = open_source(str(save_tiny_model(tmp_path)))
    with pytest.raises(UserError, match="model_type is 'glm4', which is traced, in fp32 only"):
        normal_form(dataclasses.replace(source, config=source.config | {"model_type": "glm4"}), 512, ir.DataType.FLOAT16)

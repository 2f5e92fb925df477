"""The shape read from a config, and plans made without calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape
from attnspan.planner.uniform import uniform

SHAPE = ModelShape("tiny", layers=2, heads=6, kv_heads=3, head_dim=64)


@given(st.floats(0.001, 1), st.integers(128, 65536))
def test_uniform_has_the_density_asked_for(density: float, n_max: int) -> None:
    plan = uniform(SHAPE, density, n_max)
    # Rounding up adds less than a block, the smallest span at most 128 tokens.
    assert min(density, 1) - 1e-9 <= plan.density() <= density + 128 / n_max


@given(st.integers(1, 12), st.floats(0.05, 0.95), st.floats(0, 1))
def test_spread_keeps_the_mean(kv_heads: int, density: float, share: float) -> None:
    spread = share * min(density, 1 - density) * 0.999
    plan = uniform(ModelShape("x", 2, kv_heads, kv_heads), density, 8192, spread)
    betas = [rule.beta for rule in plan.rules[1]]
    assert np.mean(betas) == pytest.approx(density, abs=1e-8)
    assert betas == sorted(betas)
    if kv_heads > 1:
        assert betas[-1] - betas[0] == pytest.approx(2 * spread, abs=1e-8)


def test_density_one_is_dense() -> None:
    plan = uniform(SHAPE, 1, 8192)
    assert {rule.mode for layer in plan.rules for rule in layer} == {"dense"}
    assert (plan.capacities() == 8192).all()


@pytest.mark.parametrize(
    ("density", "spread", "words"),
    [
        (0, 0, "density is 0.*--density"),
        (-0.5, 0, "density is -0.5.*--density"),
        (1.2, 0, "density is 1.2.*--density"),
        (float("nan"), 0, "density is nan.*--density"),
        (0.5, 0.5, "spread is 0.5.*--spread"),
        (0.8, 0.3, "at most 0.2.*--spread"),
        (0.5, -0.1, "spread is -0.1.*--spread"),
        (1, 0.1, "--spread"),
    ],
)
def test_uniform_refuses(density: float, spread: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        uniform(SHAPE, density, 8192, spread)


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def test_shape_from_config(tmp_path: Path) -> None:
    folder = tmp_path / "SmolLM"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shape = ModelShape.from_config(folder)
    assert (shape.id, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == ("SmolLM", 30, 9, 3, 64)
    assert shape == ModelShape.from_config(folder / "config.json") == ModelShape.from_config(CONFIG, "SmolLM")
    assert shape.group == 3
    # The hash does not depend on what is written out and what is derived, nor on run-time keys.
    same = [CONFIG | {"head_dim": 64}, CONFIG | {"rope_theta": 1e6}, {"text_config": CONFIG}]
    assert {ModelShape.from_config(config).config_hash for config in same} == {shape.config_hash}
    other = ModelShape.from_config(CONFIG | {"vocab_size": 49153})
    assert other.config_hash != shape.config_hash
    assert len(shape.config_hash or "") == 16
    heads = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    assert ModelShape.from_config(heads).kv_heads == 9


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "lacks 'num_hidden_layers'"),
        (CONFIG | {"num_attention_heads": 10}, "multiple"),
        (CONFIG | {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (CONFIG | {"num_hidden_layers": "30"}, "num_hidden_layers is '30'"),
        (CONFIG | {"hidden_size": None}, "hidden_size is None"),
    ],
)
def test_bad_configs_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ModelShape.from_config(config)


def test_bad_config_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        ModelShape.from_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        ModelShape.from_config(tmp_path)

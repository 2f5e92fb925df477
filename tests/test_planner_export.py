"""Plans on their way into an export: another n_max, and what a target computes in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attnspan.export.pipeline import choose_plan, open_model
from attnspan.export.source import Source
from attnspan.export.targets import choose_form
from attnspan.planner.choices import Choices
from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.rules import HeadRule
from attnspan.planner.unified import Limits, plan_unified
from attnspan.planner.uniform import uniform

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "hidden_size": 256, "max_position_embeddings": 16384,
}  # fmt: skip
SOURCE = Source("m", Path("m"), "safetensors", CONFIG, {})
SHAPE = SOURCE.shape


def unified() -> Plan:
    rules = (HeadRule("span", 0.0, 0.5), HeadRule("dense"))
    loss, none = np.zeros((1, 2, 2, 2)), np.zeros((2, 2, 2))
    loss[..., 0] = 1.0
    limits = Limits(gpu_kv=5 * 2**20, read={4096: 0.9})
    return plan_unified(
        Choices(SHAPE, 8192, rules, (4096,), loss, none, none), limits, provenance={"options": {"gpu_kv": "5MiB"}}
    )


def test_budgets_are_for_one_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a plan takes of its budgets is not said of a longer one, for which nobody counted it."""
    unified().save(tmp_path / "plan.json")
    same = choose_plan(SOURCE, tmp_path / "plan.json", None, 8192)
    assert {"bounds", "memory", "read", "options"} <= same.provenance.keys()
    assert not capsys.readouterr().err
    longer = choose_plan(SOURCE, tmp_path / "plan.json", None, 16384)
    assert (longer.n_max, longer.rules, longer.provenance["method"]) == (16384, same.rules, "unified")
    assert not {"bounds", "memory", "read", "options"} & longer.provenance.keys()
    said = capsys.readouterr().err
    assert "the budgets of --plan are for its n_max, 8192; at 16384 it may break them" in said
    assert len(said.strip().splitlines()) == 1
    uniform(SHAPE, 0.5, 8192).save(tmp_path / "plan.json")
    assert choose_plan(SOURCE, tmp_path / "plan.json", None, 16384).provenance["method"] == "uniform"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "fix"), [("hybrid", "fp32 only; give --dtype fp32"), ("tensorrt", "change --target or MODEL")]
)
def test_an_onnx_file_needs_a_target_in_fp32(target: str, fix: str) -> None:
    with pytest.raises(UserError, match=f"target {target} would compute in .*{fix}"):
        open_model("model.onnx", None, choose_form(target))

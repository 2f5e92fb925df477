"""The real model, end to end, against PyTorch with the same plan as a mask: ragged rows, rings that wrap, 256 greedy steps."""

from __future__ import annotations

from pathlib import Path

import demo_model
import pytest

from attnspan.cpu_runtime.library import library_path
from attnspan.export.pipeline import Options, export_model
from attnspan.export.source import read_model
from attnspan.export.verify_worker import compare
from attnspan.planner.uniform import uniform
from attnspan.runtime.artefact import Artefact

pytestmark = pytest.mark.model

GENERATED = 256
PROMPT = 1300  # the rows have 1300, 433 and 7 tokens; rings of 384, 768 and 1152 slots a layer


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    uniform(read_model(str(demo_model.gguf()))[0], 0.5, 1600, spread=0.25).save(file)
    return file


@pytest.mark.parametrize("cache", ["fp32", "bf16"])
def test_logits_and_tokens(plan: Path, tmp_path: Path, cache: str) -> None:
    model = demo_model.gguf()
    export_model(Options(model=str(model), out=tmp_path / "out", plan=plan, cache_dtype=cache, library=library_path()))
    rows = compare(Artefact.load(tmp_path / "out"), model, PROMPT, GENERATED)
    assert [row.prompt for row in rows] == [1300, 433, 7]
    assert rows[0].wrapped >= 60  # two of three rings of every layer
    assert rows[1].wrapped >= 30
    for row in rows:
        assert row.generated == GENERATED
        assert row.compared >= GENERATED + 7
        if cache == "fp32":
            assert row.max_diff <= 2e-4
            assert row.exact_tokens == GENERATED
        else:
            assert row.max_diff <= 2e-2 * row.max_logit
            assert row.same_tokens == GENERATED

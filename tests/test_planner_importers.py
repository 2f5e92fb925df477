"""Published MoA plans: which query head goes to which KV head, and what folding costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.planner.errors import UserError
from attnspan.planner.importers import import_moa
from attnspan.planner.rules import HeadRule

EXCERPT = Path(__file__).parent / "data" / "moa_llama_3.2_1b_two_layers.json"


def write(folder: Path, alphas: Any, betas: Any) -> Path:
    path = folder / "moa_alpha_beta.json"
    path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return path


def mean_span(alpha: float, beta: float, lengths: tuple[int, ...]) -> float:
    rule = HeadRule("span", alpha, beta)
    return sum(min(rule.span(n), n) for n in lengths) / len(lengths)


def test_excerpt_of_a_published_plan() -> None:
    """Each KV head gets the rule of that member of its four query heads which keeps most on average."""
    raw = json.loads(EXCERPT.read_text())
    plan, report = import_moa(EXCERPT, 32, 8, head_dim=64)
    assert (plan.model.layers, plan.model.heads, plan.model.kv_heads) == (2, 32, 8)
    for layer in range(2):
        for kv_head in range(8):
            heads = range(4 * kv_head, 4 * kv_head + 4)  # Hugging Face groups neighbours
            members = [(raw["alphas"][layer][h], raw["betas"][layer][h]) for h in heads]
            rule = plan.rules[layer][kv_head]
            assert (rule.alpha, rule.beta) in members
            spans = [mean_span(*member, (2048, 4096, 8192)) for member in members]
            assert mean_span(rule.alpha, rule.beta, (2048, 4096, 8192)) == max(spans)
    pairs = [(a, b) for row_a, row_b in zip(raw["alphas"], raw["betas"], strict=True) for a, b in zip(row_a, row_b, strict=True)]
    for n in (2048, 4096, 8192):
        assert report.density_query[n] == pytest.approx(np.mean([mean_span(a, b, (n,)) for a, b in pairs]) / n)
        assert report.density_kv[n] == plan.density(n) >= report.density_query[n]
    text = "\n".join(report.lines())
    assert "4 query heads to one KV head" in text
    assert f"{plan.density():.3f}" in text


def test_one_query_head_per_kv_head_changes_nothing() -> None:
    plan, report = import_moa(EXCERPT, 32, 32)
    raw = json.loads(EXCERPT.read_text())
    assert [[rule.alpha for rule in layer] for layer in plan.rules] == raw["alphas"]
    assert [[rule.beta for rule in layer] for layer in plan.rules] == raw["betas"]
    assert report.density_kv == pytest.approx(report.density_query)
    assert report.groups_short == 0


def test_folds(tmp_path: Path) -> None:
    """Rules that cross: 4096 + 0*N is the longer one up to 8k, 0 + 0.75*N beyond."""
    path = write(tmp_path, [[4096, 0]], [[0, 0.75]])
    pick = {n_max: import_moa(path, 2, 1, "max", n_max)[0].rules[0][0] for n_max in (2048, 4096, 8192, 65536)}
    assert [pick[n].alpha for n in (2048, 4096, 8192, 65536)] == [4096, 4096, 0, 0]
    plan, report = import_moa(path, 2, 1, "max", 8192)
    assert (report.groups, report.groups_of_one_rule, report.groups_short) == (1, 0, 1)
    assert report.largest_shortfall == 4096 - 3072  # at 4096 tokens
    assert plan.provenance["fold"] == "max"
    plan, report = import_moa(path, 2, 1, "mean", 8192)
    assert plan.rules[0][0] == HeadRule("span", 2048, 0.375)
    assert report.density_kv[8192] == pytest.approx((2048 + 0.375 * 8192) / 8192)
    assert report.largest_shortfall == 6144 - 5120  # at 8192 tokens


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1000, 8192, 20000]))
@settings(max_examples=40)
def test_max_keeps_at_least_the_mean_of_its_members(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    layers: int,
    kv: int,
    group: int,
    n_max: int,
) -> None:
    grid = st.tuples(st.sampled_from([-1024, 0, 1024, 4096, 8192]), st.sampled_from([0, 0.125, 0.5, 1]))
    row = st.lists(grid, min_size=kv * group, max_size=kv * group)
    rules = data.draw(st.lists(row, min_size=layers, max_size=layers))
    alphas, betas = ([[pair[i] for pair in row] for row in rules] for i in (0, 1))
    path = write(tmp_path_factory.mktemp("plan"), alphas, betas)
    _, report = import_moa(path, kv * group, kv, "max", n_max)
    assert sum(n * d for n, d in report.density_kv.items()) >= (sum(n * d for n, d in report.density_query.items()) - 1e-6)


@pytest.mark.parametrize(
    ("alphas", "betas", "words"),
    [
        ([[0, 0, 0]], [[0.5, 0.5, 0.5]], "3 query heads in layer 0, not 4; change --heads"),
        ([[0] * 4] * 2, [[1] * 4], "2 layers of alphas, 1 of betas"),
        ([[0] * 4], [[1, 1, 1, 2]], r"betas\[0\]\[3\] is 2"),
        ([[0, 0, "x", 0]], [[1] * 4], r"alphas\[0\]\[2\] is 'x'"),
        ([], [], "list of layers"),
        ({}, [[1] * 4], "list of layers"),
    ],
)
def test_bad_moa_files_are_refused(tmp_path: Path, alphas: Any, betas: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        import_moa(write(tmp_path, alphas, betas), 4, 2)


def test_bad_options_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [[0] * 4], [[0.5] * 4])
    with pytest.raises(UserError, match=r"fold is 'min'.*max, mean.*--fold"):
        import_moa(path, 4, 2, "min")
    with pytest.raises(UserError, match="multiple of kv_heads"):
        import_moa(path, 4, 3)
    with pytest.raises(UserError, match="kv_heads is 0"):
        import_moa(path, 4, 0)
    with pytest.raises(UserError, match=r"n_max is 0.*--n-max"):
        import_moa(path, 4, 2, n_max=0)
    path.write_text('{"alphas": []}')
    with pytest.raises(UserError, match="'alphas' and 'betas'"):
        import_moa(path, 4, 2)

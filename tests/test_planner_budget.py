"""Rule grids, loss tables, budgets, decode times, and the plans made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.planner.budget import Budget
from attnspan.planner.choose import plan_from
from attnspan.planner.cost import allocated_bytes, kept_slots
from attnspan.planner.decode_cost import DecodeCost
from attnspan.planner.errors import UserError
from attnspan.planner.grid import FULL, fine_grid, reference_grid, rule_grid
from attnspan.planner.losses import LossTable, monotone, stretched
from attnspan.planner.pareto import front
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.problem import InfeasibleError
from attnspan.planner.rules import HeadRule
from attnspan.planner.synthetic import synthetic_curves

SHAPE = ModelShape("m", 6, 8, 4, 64)


def pairs(rules: tuple[HeadRule, ...]) -> list[tuple[float, float]]:
    return sorted((rule.alpha, rule.beta) for rule in rules)


def test_reference_grid() -> None:
    wanted = [
        (1024.0 * a, b / 8)
        for a in range(-2, 9)
        for b in range(9)
        if 1024 * a + b * 1024 <= 8192 and 1024 * a + b * 2048 <= 16384 and 1024 * a + b * 256 > 0
    ]
    assert pairs(reference_grid()) == wanted
    assert len(wanted) == 48
    assert FULL in reference_grid()


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(128, 40000), min_size=1, max_size=4))
def test_fine_grid(lengths: list[int]) -> None:
    rules = fine_grid(lengths)
    assert FULL in rules
    shortest = [min(rules[0].span(n), n) for n in lengths]
    assert shortest == [128] * len(lengths)
    spans = [tuple(min(rule.span(n), n) for n in sorted(set(lengths))) for rule in rules]
    assert len(set(spans)) == len(rules)
    assert spans == sorted(spans, key=lambda each: each[::-1])


def test_rule_grid() -> None:
    # At 2048 alone 1024 + 0*N and 0 + .5*N are the same span: the proportional rule stays. 2048 + 0*N is the full one.
    assert pairs(rule_grid([0, 1024, 2048], [0, 0.5], [2048])) == [(0, 0.5), (0, 1)]
    assert pairs(rule_grid([0, 1024], [0, 0.5], [2048, 4096])) == [(0, 0.5), (0, 1), (1024, 0), (1024, 0.5)]
    assert pairs(rule_grid([-1024], [0.5, 0.625], [2048])) == [(-1024, 0.625), (0, 1)]
    for wrong in ([], [64], [0.5]):
        with pytest.raises(UserError, match="length"):
            rule_grid([0], [0.5], wrong)


def test_monotone_raises_what_noise_lowered() -> None:
    curve = np.array([[[9.0, 9.0, 3.0, -1.0, 2.0, 0.5]]])
    assert monotone({320: curve})[320].tolist() == [[[3.0, 3.0, 3.0, 2.0, 2.0, 0.0]]]
    assert curve[0, 0, 3] == -1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), blocks=st.integers(2, 20))
def test_monotone(seed: int, blocks: int) -> None:
    curve = np.random.default_rng(seed).normal(size=(2, 3, blocks + 1))
    out = monotone({blocks * 64: curve})[blocks * 64]
    assert (np.diff(out, axis=-1) <= 0).all()
    assert (out[..., -1] == 0).all()
    assert (out[..., 2:-1] >= curve[..., 2:-1]).all()
    for b in range(2, blocks):
        assert out[..., b] == pytest.approx(np.maximum(curve[..., b:-1].max(axis=-1), 0))


def test_loss_table_reads_the_curves() -> None:
    curves = synthetic_curves(6, 4, (256, 512), seed=1)
    rules = (HeadRule("span", 128, 0), HeadRule("span", 0, 0.5), HeadRule("span", 100, 0.25), FULL)
    table = LossTable.from_curves(curves, rules)
    # 100 + 0.25*256 = 164 tokens are 3 blocks; 100 + 0.25*512 = 228 are 4
    assert table.loss[0] == pytest.approx(curves[256][..., [2, 2, 3, 4]])
    assert table.loss[1] == pytest.approx(curves[512][..., [2, 4, 4, 8]])
    plan = Plan(SHAPE, 512, [[rules[(layer + h) % 4] for h in range(4)] for layer in range(6)])
    choice = table.indices(plan)
    assert [[rules[i] for i in layer] for layer in choice] == [list(layer) for layer in plan.rules]
    wanted = sum(curves[512][i, h, rule.span(512) // 64] for i, layer in enumerate(plan.rules) for h, rule in enumerate(layer))
    assert table.of(plan)[512] == pytest.approx(wanted)
    assert table.of(choice) == table.of(plan)
    dense = Plan(SHAPE, 512, [[HeadRule("dense")] * 4] * 6)
    assert table.of(dense) == {256: 0, 512: 0}
    with pytest.raises(UserError, match=r"beta 0\.75.*add it to the grid"):
        table.indices(Plan(SHAPE, 512, [[HeadRule("span", 0, 0.75)] * 4] * 6))


@pytest.mark.parametrize(
    ("curves", "words"),
    [
        ({100: np.zeros((1, 1, 2))}, "length of curves is 100"),
        ({160: np.zeros((1, 1, 3))}, r"\[layers, kv_heads, 4\]"),
        ({256: np.zeros((1, 1, 4))}, r"\[layers, kv_heads, 5\]"),
        ({256: np.full((1, 1, 5), np.nan)}, "finite"),
        ({256: np.zeros((1, 1, 5)), 512: np.zeros((2, 1, 9))}, "layers and KV heads"),
        ({256: -np.ones((1, 1, 5))}, "at least 0"),
        ({}, "--lengths"),
    ],
)
def test_wrong_curves(curves: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        LossTable.from_curves(curves, (FULL,))


def test_rows_cost_what_the_plan_costs() -> None:
    rules = reference_grid()
    cost = DecodeCost(fixed=0.1, per_slot=2e-5, head_dim=64, group=2, dtype="int8", threads=1)
    budget = Budget({8192: 0.5, 2048: 0.6}, {8000: 40e6}, {4096: 9.0}, "int8", cost)
    rows = budget.rows(rules, SHAPE)
    choice = np.random.default_rng(0).integers(0, len(rules), (6, 4))
    plan = Plan(SHAPE, 8192, [[rules[i] for i in layer] for layer in choice])
    costs = dict(zip(rows.names, rows.of(choice), strict=True))
    assert list(costs) == [
        "density at 2048 tokens",
        "density at 8192 tokens",
        "kv bytes at 8000 tokens",
        "milliseconds at 4096 tokens",
    ]
    assert costs["density at 2048 tokens"] == pytest.approx(plan.density(2048))
    assert costs["kv bytes at 8000 tokens"] == allocated_bytes(Plan(SHAPE, 8000, plan.rules), "int8")
    assert costs["milliseconds at 4096 tokens"] == pytest.approx(6 * 0.1 + 2e-5 * kept_slots(plan, 4096))
    assert rows.bound.tolist() == [0.6, 0.5, 40e6, 9.0]


def test_density_is_bounded_at_the_lengths_and_n_max() -> None:
    assert Budget.of_density(0.5, (4096, 2048), 10000).density == {2048: 0.5, 4096: 0.5, 10000: 0.5}


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"density": {2048: 0.05}}, r"density at 2048 tokens is bounded by 0.05: .* need 0.125, 150.0% more; raise --density"),
        ({"kv_bytes": {8192: 5e6}}, r"kv bytes at 8192 tokens .* 4.77 MiB: .* need 6.00 MiB, 25.8% more; raise --kv-bytes"),
        ({"density": {2048: 0.0}}, "above 0"),
        ({"density": {2048: 1.1}}, "--density"),
        ({"density": {100: 0.5}}, "length of a bound"),
        ({"kv_bytes": {8192: float("nan")}}, "--kv-bytes"),
        ({"milliseconds": {8192: 1.0}}, "--cost-table"),
        ({"cache_dtype": "fp8"}, "--cache-dtype"),
        ({}, "--density"),
    ],
)
def test_budgets_that_cannot_be(budget: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Budget(**budget).rows(reference_grid(), SHAPE)


def test_bytes_and_milliseconds_need_the_size_of_a_head() -> None:
    unknown = ModelShape("m", 6, 8, 4)
    with pytest.raises(UserError, match="--head-dim"):
        Budget(kv_bytes={8192: 1e9}).rows(reference_grid(), unknown)
    cost = DecodeCost(0.1, 1e-5, 64, 2, "bf16", 1)
    with pytest.raises(UserError, match="--head-dim"):
        Budget(milliseconds={8192: 1e9}, decode_cost=cost).rows(reference_grid(), unknown)
    with pytest.raises(UserError, match="--dtype int8"):
        Budget(milliseconds={8192: 1e9}, decode_cost=cost, cache_dtype="int8").rows(reference_grid(), SHAPE)
    # Twice the head and twice the query heads of a group: four times as long a slot. A smaller group saves nothing.
    assert cost.scaled(ModelShape("m", 1, 16, 4, 128), "bf16") == (0.1, 4e-5)
    assert cost.scaled(ModelShape("m", 1, 4, 4, 64), "bf16") == (0.1, 1e-5)


def bench_file(folder: Path, points: list[tuple[int, float]], **changes: Any) -> Path:
    """A report of the benchmark: (kept tokens, milliseconds) of 8 KV heads of 128 numbers, bf16; and what must be ignored."""
    one = {"kernel": "attnspan", "phase": "decode", "dtype": "bf16", "batch": 1} | changes
    results = [one | {"kept_bytes": 2 * 8 * kept * 128 * 2, "median_ms": ms} for kept, ms in points]
    for other in ({"kernel": "torch-sdpa-bf16"}, {"phase": "prefill"}, {"dtype": "int8"}, {"batch": 4}):
        results.append(one | other | {"kept_bytes": 10**9, "median_ms": 1000.0})
    file = folder / "bench.json"
    file.write_text(json.dumps({"settings": {"heads": 32, "kv_heads": 8, "head_dim": 128, "threads": 2}, "results": results}))
    return file


def test_decode_cost_fits_a_line(tmp_path: Path) -> None:
    line = [(kept, 0.05 + 3e-5 * 8 * kept) for kept in (128, 1024, 8192, 32768)]
    cost = DecodeCost.load(bench_file(tmp_path, line))
    assert (cost.head_dim, cost.group, cost.dtype, cost.threads) == (128, 4, "bf16", 2)
    assert cost.fixed == pytest.approx(0.05)
    assert cost.per_slot == pytest.approx(3e-5)
    # A fixed part below 0 would promise time that nobody gets back.
    steep = DecodeCost.load(bench_file(tmp_path, [(1024, 0.1), (2048, 0.3)]))
    assert steep.fixed == 0
    assert 0.1 / 8192 < steep.per_slot < 0.3 / 16384


@pytest.mark.parametrize(
    ("points", "changes", "words"),
    [
        ([(1024, 1.0)], {}, "for 1 numbers of kept tokens .* at least 2"),
        ([(1024, 1.0), (1024, 1.1)], {}, "for 1 numbers"),
        ([(1024, 1.0), (2048, 1.1)], {"phase": "prefill"}, "for 0 numbers"),
        ([(1024, 2.0), (2048, 1.0)], {}, "longer contexts"),
        ([(1024, 0.0), (2048, 1.0)], {}, "median_ms is 0"),
    ],
)
def test_too_few_times(tmp_path: Path, points: list[tuple[int, float]], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DecodeCost.load(bench_file(tmp_path, points, **changes))


def test_cost_table_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="--cost-table"):
        DecodeCost.load(file)


def test_front() -> None:
    table = LossTable.from_curves(synthetic_curves(6, 4, seed=2), reference_grid())
    budget = Budget.of_density(0.5, table.lengths, 16384)
    rows = budget.rows(table.rules, SHAPE)
    seen: list[tuple[int, int]] = []
    found = front(table, rows, 2, points=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 30) for i in range(30)]  # 3 alone and 3 * 3^2
    assert len(found) > 3
    losses = np.array([list(each.losses.values()) for each in found])
    for i, mine in enumerate(losses):
        assert rows.met(found[i].choice)
        assert found[i].losses == table.of(found[i].choice)
        assert 0 <= found[i].gap <= 0.01
        assert not any((theirs <= mine).all() for j, theirs in enumerate(losses) if j != i)
    extent = losses.max(axis=0) - losses.min(axis=0)
    balance = ((losses - losses.min(axis=0)) / extent).mean(axis=1)
    assert balance == pytest.approx(np.sort(balance))


def test_front_of_one_length() -> None:
    table = LossTable.from_curves(synthetic_curves(6, 4, (2048,)), fine_grid([2048]))
    found = front(table, Budget.of_density(0.5, [2048], 2048).rows(table.rules, SHAPE))
    assert [each.objective for each in found] == ["least loss at 2048"]


def test_plans(tmp_path: Path) -> None:
    """From curves to files: bounds at lengths that no loss is known for, in bytes too; the plan says how it was made."""
    table = LossTable.from_curves(synthetic_curves(6, 4, (1024, 2048)), fine_grid([1024, 2048, 4096]))
    dense = allocated_bytes(Plan(SHAPE, 4096, [[FULL] * 4] * 6), "bf16")
    assert dense is not None
    budget = Budget({1024: 0.4, 2048: 0.4}, {4096: 0.3 * dense})
    plans = plan_from(table, budget, SHAPE, 4096, 3, points=3, provenance={"corpus": "made up"})
    assert plans
    for plan in plans:
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").rules == plan.rules
        assert max(plan.density(1024), plan.density(2048)) <= 0.4 + 1e-9
        kept = allocated_bytes(plan, "bf16")
        assert kept is not None
        assert kept <= 0.3 * dense * (1 + 1e-9)
        assert all(len(set(layer)) <= 3 for layer in plan.rules)
        assert plan.predicted_loss == table.of(plan)
        assert plan.solver_gap is not None
        assert plan.solver_gap <= 0.01
        assert plan.provenance["corpus"] == "made up"
        assert plan.provenance["bounds"]["density at 1024 tokens"]["bound"] == 0.4
    with pytest.raises(UserError, match="6 layers and 4 KV heads"):
        plan_from(table, budget, ModelShape("other", 7, 8, 4), 4096)
    with pytest.raises(InfeasibleError, match="--density"):
        plan_from(table, Budget.of_density(0.02, [1024], 4096), SHAPE, 4096)


def test_stretched_curves_keep_their_shares() -> None:
    rng = np.random.default_rng(0)
    curves = monotone({2048: rng.random((2, 3, 33)), 4096: rng.random((2, 3, 65))})
    longer = stretched(curves, 8192)
    assert list(longer) == [2048, 4096, 8192]
    np.testing.assert_allclose(longer[8192][..., ::2], curves[4096])
    assert (np.diff(longer[8192], axis=-1) <= 1e-15).all()
    # 78 blocks and 8 tokens: what loses nothing is the whole text.
    between = LossTable.from_curves(stretched(curves, 5000), (FULL, HeadRule("dense"), HeadRule("span", 0.0, 0.5)))
    assert between.lengths == (2048, 4096, 5000)
    assert (between.loss[-1, ..., :2] == 0).all()
    at, low = 2560 / 5000 * 64, 32
    wanted = curves[4096][..., low] + (at - low) * (curves[4096][..., low + 1] - curves[4096][..., low])
    np.testing.assert_allclose(between.loss[-1, ..., 2], wanted)
    assert list(stretched(curves, 4096)) == [2048, 4096]

"""The six plans published with MoA: the optimiser matches or beats each of them under the plan's own densities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnspan.planner.budget import Budget
from attnspan.planner.grid import reference_grid
from attnspan.planner.importers import import_moa
from attnspan.planner.losses import LossTable
from attnspan.planner.optimize import solve
from attnspan.planner.plan import Plan
from attnspan.planner.problem import Array, Problem
from attnspan.planner.synthetic import synthetic_curves

PUBLISHED = json.loads((Path(__file__).parent / "data" / "moa_plans.json").read_text())["plans"]
LENGTHS = (2048, 4096, 8192, 16384)


def folded(published: dict[str, Any], folder: Path) -> Plan:
    """The plan as `attnspan plan import` folds it to KV heads."""
    rules = [[published["rules"][ord(letter) - ord("a")] for letter in layer] for layer in published["layers"]]
    file = folder / "moa_alpha_beta.json"
    file.write_text(json.dumps({"alphas": [[r[0] for r in x] for x in rules], "betas": [[r[1] for r in x] for x in rules]}))
    return import_moa(file, published["heads"], published["kv_heads"], n_max=LENGTHS[-1])[0]


def test_the_copies_are_whole() -> None:
    shapes = {p["model"].split("/")[1]: (len(p["layers"]), p["heads"], p["kv_heads"]) for p in PUBLISHED}
    assert shapes == {
        "Llama-3-70B-Instruct-262k": (80, 64, 8),
        "Llama-3-8B-Instruct-262k": (32, 32, 8),
        "vicuna-13b-v1.5-16k": (40, 40, 40),
        "vicuna-7b-v1.5-16k": (32, 32, 32),
        "Llama-3.2-1B-Instruct": (16, 32, 8),
        "Llama-3.2-3B-Instruct": (28, 24, 8),
    }
    assert all(len(layer) == p["heads"] for p in PUBLISHED for layer in p["layers"])


def suited_curves(plan: Plan, seed: int) -> dict[int, Array]:
    """Losses that a good optimiser would answer with about this plan.

    A head loses w * (N/S - 1) at span S. The least sum under a budget of spans has S in proportion to the square root of w, so
    that w is the square of the span that the plan gives, but for 30 % of noise.
    """
    noise = np.exp(np.random.default_rng(seed).normal(0, 0.3, (plan.model.layers, plan.model.kv_heads, 1)))
    curves = {}
    for n in LENGTHS[:3]:
        span = np.maximum(np.arange(n // 64 + 1) * 64, 128)
        curves[n] = noise * (plan.spans(n)[..., None] / n) ** 2 * (n / span - 1)
    return curves


@pytest.mark.parametrize("suited", [False, True], ids=["any losses", "losses suited to the plan"])
@pytest.mark.parametrize("published", PUBLISHED, ids=[p["model"].split("/")[1] for p in PUBLISHED])
def test_beaten_at_every_length(published: dict[str, Any], suited: bool, tmp_path: Path) -> None:
    """At no more density anywhere and no more rules in a layer: less loss at 8k, and no more at 2k and 4k."""
    plan = folded(published, tmp_path)
    model = plan.model
    seed = len(published["layers"])
    curves = suited_curves(plan, seed) if suited else synthetic_curves(model.layers, model.kv_heads, seed=seed)
    table = LossTable.from_curves(curves, reference_grid())
    theirs = table.indices(plan)
    most = max(len(set(layer)) for layer in theirs.tolist())
    rows = Budget(density={n: plan.density(n) for n in LENGTHS}).rows(table.rules, model)
    assert most == 2
    assert rows.met(theirs)
    losses = table.of(theirs)

    mean = solve(Problem(table.loss.mean(axis=0), rows, most), gap=0.002)
    assert mean.gap <= 0.002
    assert mean.loss < np.mean(list(losses.values()))

    problem = Problem(table.loss[2], rows + table.rows({n: losses[n] for n in (2048, 4096)}), most)
    found = solve(problem, gap=0.002, seconds=20)
    assert problem.met(found.choice)
    assert found.loss < losses[8192]
    ours = table.of(found.choice)
    assert all(ours[n] <= losses[n] * (1 + 1e-9) for n in ours)
    better = Plan(model, LENGTHS[-1], [[table.rules[i] for i in layer] for layer in found.choice])
    assert all(better.density(n) <= plan.density(n) + 1e-9 for n in LENGTHS)

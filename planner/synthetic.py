"""Made-up losses of realistic shape, to try and time the optimiser without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnspan.planner.budget import Budget
from attnspan.planner.grid import reference_grid
from attnspan.planner.losses import LossTable
from attnspan.planner.optimize import solve
from attnspan.planner.plan import Plan
from attnspan.planner.problem import Array, Problem, Solution
from attnspan.planner.rules import BLOCK, MIN_SPAN
from attnspan.planner.shape import ModelShape

PROFILED = (2048, 4096, 8192)
N_MAX = 16384


def synthetic_curves(layers: int, kv_heads: int, lengths: Sequence[int] = PROFILED, seed: int = 0) -> dict[int, Array]:
    """Loss curves by length, float64 [layers, kv_heads, N/64 + 1], as `LossTable.from_curves` takes them.

    A head loses in two ways when its span S is cut: by distance, with a power law of its own reach (64 to 8192 tokens, so that
    local heads saturate early), and by share, (1 - S/N)^q, as heads do that look for something anywhere in the text. How much a
    head matters is log-normal over heads (sigma 2) and over layers (sigma .7): a few heads make up most of the loss.
    """
    rng = np.random.default_rng(seed)
    shape = (layers, kv_heads, 1)
    weight = np.exp(rng.normal(0, 2, shape) + rng.normal(0, 0.7, (layers, 1, 1)))
    reach = np.exp(rng.uniform(np.log(64), np.log(8192), shape))
    power, by_share, steep = rng.uniform(0.5, 2, shape), rng.beta(0.5, 2, shape), rng.uniform(0.5, 2, shape)
    out = {}
    for n in lengths:
        span = np.maximum(np.arange(n // BLOCK + 1) * BLOCK, MIN_SPAN).astype(np.float64)
        by_distance = (1 + span / reach) ** -power - (1 + n / reach) ** -power
        out[n] = weight * ((1 - by_share) * by_distance + by_share * (1 - span / n) ** steep)
    return out


@dataclass(frozen=True)
class Synthetic:
    """A solved instance: the plan, the optimiser's answer, the losses it was computed from."""

    plan: Plan
    solution: Solution
    table: LossTable

    @property
    def gap(self) -> float:
        """Proven relative gap."""
        return self.solution.gap

    @property
    def seconds(self) -> float:
        """Wall time of the optimiser."""
        return self.solution.seconds


def optimize_synthetic(layers: int, kv_heads: int, max_rules_per_layer: int | None = 2, seed: int = 0) -> Synthetic:
    """Solve made-up losses of a model's shape: the reference's grid, density at most 0.5 at 2k, 4k, 8k and 16k."""
    table = LossTable.from_curves(synthetic_curves(layers, kv_heads, seed=seed), reference_grid())
    shape = ModelShape("synthetic", layers, kv_heads, kv_heads)
    rows = Budget.of_density(0.5, PROFILED, N_MAX).rows(table.rules, shape)
    solution = solve(Problem(table.loss.mean(axis=0), rows, max_rules_per_layer))
    rules = [[table.rules[i] for i in layer] for layer in solution.choice]
    made = {"method": "optimize_synthetic", "seed": seed}
    plan = Plan(shape, N_MAX, rules, provenance=made, predicted_loss=table.of(solution.choice), solver_gap=solution.gap)
    return Synthetic(plan, solution, table)

"""From losses and a budget to plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspan.planner.budget import Budget
from attnspan.planner.errors import UserError
from attnspan.planner.losses import LossTable
from attnspan.planner.pareto import front
from attnspan.planner.plan import Plan
from attnspan.planner.shape import ModelShape


def plan_from(
    table: LossTable,
    budget: Budget,
    shape: ModelShape,
    n_max: int,
    max_rules_per_layer: int | None = 2,
    points: int = 5,
    gap: float = 0.01,
    seconds: float = 10.0,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Plan]:
    """The plans of the Pareto front over the profiled lengths, the most balanced first; see `pareto.front` for the parameters.

    points 1 gives the best plan for each profiled length alone. Each plan knows its predicted losses, its proven gap, and in its
    provenance, added to the one given, the bounds and what was minimised. UserError when the table is for another shape or the
    budget cannot be met.
    """
    if table.loss.shape[1:3] != (shape.layers, shape.kv_heads):
        layers, kv_heads = table.loss.shape[1:3]
        raise UserError(
            f"losses are for {layers} layers and {kv_heads} KV heads: {shape.id!r} has {shape.layers} and {shape.kv_heads}; "
            "calibrate this model"
        )
    rows = budget.rows(table.rules, shape)
    plans = []
    for each in front(table, rows, max_rules_per_layer, points, gap, seconds, progress):
        made = {
            "method": "optimise",
            "objective": each.objective,
            "loss": each.solution.loss,
            "loss_lower_bound": each.solution.lower_bound,
            "bounds": {name: {"cost": cost, "bound": bound} for name, cost, bound in each.solution.costs},
            "rules_in_grid": len(table.rules),
            "max_rules_per_layer": max_rules_per_layer,
        }
        plans.append(
            Plan(
                shape,
                n_max,
                [[table.rules[i] for i in layer] for layer in each.solution.choice],
                provenance=dict(provenance or {}) | made,
                predicted_loss=each.losses,
                solver_gap=each.solution.gap,
            )
        )
    return plans

"""Candidate plans: from profiles, through a loss table and the optimiser, to plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from attnspan.calibration.estimators import Rounds, curves
from attnspan.calibration.item_profile import Curve
from attnspan.planner.budget import Budget
from attnspan.planner.grid import FULL
from attnspan.planner.losses import LossTable, monotone, stretched
from attnspan.planner.optimize import solve
from attnspan.planner.plan import Plan
from attnspan.planner.problem import Array, Choice, Problem, Rows
from attnspan.planner.rules import HeadRule
from attnspan.planner.shape import ModelShape


@dataclass(frozen=True)
class Maker:
    """Everything that turns loss curves into a plan, but the curves."""

    shape: ModelShape
    n_max: int
    rules: tuple[HeadRule, ...]
    budget: Budget
    max_rules: int | None
    estimator: str

    def table(self, history: Rounds) -> LossTable:
        """Losses of every rule from one round of profiles or several, at the profiled lengths and, stretched, at n_max."""
        return self.table_of(curves(history, self.estimator))

    def table_of(self, known: Mapping[int, Curve]) -> LossTable:
        """Losses of every rule from curves by length."""
        return LossTable.from_curves(monotone(stretched(known, self.n_max)), self.rules)

    def rows(self, share: float = 1.0) -> Rows:
        """The budget's rows; share < 1: that part of the way from what the dense model costs to the bound."""
        rows = self.budget.rows(self.rules, self.shape)
        full = np.full((self.shape.layers, self.shape.kv_heads), self.rules.index(FULL))
        return replace(rows, bound=np.maximum(rows.bound, rows.of(full) + share * (rows.bound - rows.of(full))))

    def balanced(self, table: LossTable, share: float = 1.0) -> Plan:
        """The plan with the least sum of losses, each length's in units of what the smallest rules lose there."""
        worst = table.loss.max(axis=-1).sum(axis=(1, 2))
        loss = (table.loss / np.where(worst > 0, worst, 1)[:, None, None, None]).sum(axis=0)
        solution = solve(Problem(loss, self.rows(share), self.max_rules))
        return self.plan(table, solution.choice, solution.gap)

    def plan(self, table: LossTable, choice: Choice, gap: float | None = None) -> Plan:
        """The plan of rule indices [layers, kv_heads]."""
        rules = [[self.rules[i] for i in layer] for layer in choice.tolist()]
        return Plan(self.shape, self.n_max, rules, predicted_loss=table.of(choice), solver_gap=gap)


TRIES = 300
"""Random moves tried before a search ends for want of one that keeps the bounds."""


class Neighbours:
    """Plans one move away that cost no more (`refine.Neighbour`): one head keeps more, others less until the budget holds again.

    The predicted losses propose, with a good share of chance; the search measures.
    """

    def __init__(self, maker: Maker, table: LossTable) -> None:
        self.maker, self.table = maker, table
        self.problem = Problem(table.loss.sum(axis=0), maker.rows(), maker.max_rules)

    def __call__(self, rng: np.random.Generator, plan: Plan) -> Plan | None:
        """A neighbour of a plan that was made of the grid's rules; None when no move was found."""
        start = self.table.indices(plan)
        for _ in range(TRIES):
            choice = self._move(rng, start)
            if choice is not None and self.problem.met(choice) and not (choice == start).all():
                return self.maker.plan(self.table, choice)
        return None

    def _move(self, rng: np.random.Generator, start: Choice) -> Choice | None:
        loss, cost = self.problem.loss, self.problem.rows.cost.max(axis=0)  # [layers, kv_heads, rules]
        choice = start.copy()
        up = self._step(rng, choice, loss, cost, wider=True)
        for _ in range(4):
            if up is None or self.problem.rows.met(choice):
                break
            up = self._step(rng, choice, loss, cost, wider=False, spare=up)
        return choice if up is not None else None

    def _step(
        self,
        rng: np.random.Generator,
        choice: Choice,
        loss: Array,
        cost: Array,
        wider: bool,
        spare: tuple[int, int] | None = None,
    ) -> tuple[int, int] | None:
        """Changes one head of `choice`, drawn by the predicted loss it saves (or adds) per cost; returns the head to spare
        next.
        """
        now_cost = np.take_along_axis(cost, choice[..., None], -1)
        now_loss = np.take_along_axis(loss, choice[..., None], -1)
        further = cost > now_cost + 1e-15 if wider else cost < now_cost - 1e-15
        if spare is not None:
            further[spare] = False
        if self.problem.limit is not None:
            # Where a layer has its number of rules, only those: a new one would need all heads of the other moved at once.
            for layer, used in enumerate(map(set, choice.tolist())):
                if len(used) >= self.problem.limit:
                    further[layer, :, [r for r in range(loss.shape[-1]) if r not in used]] = False
        if not further.any():
            return None
        rate = (now_loss - loss) / np.abs(np.where(further, cost - now_cost, 1.0))
        # Gumbel noise on the ranks: about every e-th rank a factor e less likely.
        rank = np.argsort(np.argsort(-np.where(further, rate, -np.inf), axis=None)).reshape(rate.shape)
        noisy = np.where(further, -rank / max(further.sum() / 8, 1) + rng.gumbel(size=rate.shape), -np.inf)
        at = np.unravel_index(int(noisy.argmax()), noisy.shape)
        choice[at[:2]] = at[2]
        return spare if spare is not None else (int(at[0]), int(at[1]))

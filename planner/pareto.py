"""Plans that trade the losses at the profiled lengths against each other: the Pareto front under one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from attnspan.planner.losses import LossTable
from attnspan.planner.optimize import solve
from attnspan.planner.problem import SLACK, Array, Choice, InfeasibleError, Problem, Rows, Solution
from attnspan.planner.rules import check_int

TIE_BREAK = 1e-3
"""Weight of the losses at the other lengths: enough to choose among equals, too little to matter otherwise."""


@dataclass(frozen=True)
class Point:
    """A solution of the front, its predicted loss by length, and what was asked for in words."""

    solution: Solution
    losses: Mapping[int, float]
    objective: str

    @property
    def choice(self) -> Choice:
        """Rule indices int64 [layers, kv_heads]."""
        return self.solution.choice

    @property
    def gap(self) -> float:
        """Proven relative gap of the question it answers."""
        return self.solution.gap


def front(
    table: LossTable,
    rows: Rows,
    max_rules_per_layer: int | None = 2,
    points: int = 5,
    gap: float = 0.01,
    seconds: float = 10.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """Non-dominated solutions under the rows, the most balanced first: least mean of the losses, each scaled to its range.

    Epsilon constraints, as in MoA's reference: each length in turn is minimised while the loss at each other one stays below
    one of points - 1 levels between its best and its worst value; the ranges are those of the solutions for one length alone,
    which are all there is for points 1. Three lengths and five points are 51 questions; one that an earlier answer settles is
    not solved. Each stops at the relative gap, or after the given seconds. progress(done, total) is called after each.
    InfeasibleError when the rows cannot be met.
    """
    check_int("points of the front", points, 1, 100, "; change --points")
    count = len(table.lengths)
    total = count + (count * (points - 1) ** (count - 1) if count > 1 else 0)

    def ask(primary: int, levels: Mapping[int, float]) -> Point:
        weights = np.where(np.arange(count) == primary, 1.0, TIE_BREAK)
        limited = rows + table.rows(levels) if levels else rows
        solution = solve(Problem(np.tensordot(weights, table.loss, 1), limited, max_rules_per_layer), gap=gap, seconds=seconds)
        words = [f"least loss at {table.lengths[primary]}", *(f"at {n} at most {level:.6g}" for n, level in levels.items())]
        return Point(solution, table.of(solution.choice), ", ".join(words))

    alone = []
    for primary in range(count):
        alone.append(ask(primary, {}))
        progress(primary + 1, total)
    found, done = list(alone), count
    values = np.array([_losses(each) for each in alone])
    best, worst = values.min(axis=0), values.max(axis=0)
    for primary in range(count if count > 1 else 0):
        others = [i for i in range(count) if i != primary]
        lengths = [table.lengths[i] for i in others]
        answers: list[tuple[Array, Point | None]] = [(np.full(len(others), np.inf), alone[primary])]
        # From the loosest levels to the tightest, so that an answer may settle the questions that follow.
        for steps in product(range(points - 1, 0, -1), repeat=len(others)):
            level = best[others] + (worst - best)[others] * np.array(steps) / (points - 1)
            if not _settled(answers, level, lengths):
                answer = None
                try:
                    answer = ask(primary, dict(zip(lengths, level.tolist(), strict=True)))
                    found.append(answer)
                except InfeasibleError:
                    pass  # the losses at the other lengths cannot be that low together
                answers.append((level, answer))
            done += 1
            progress(done, total)
    return _balanced_first(_non_dominated(found))


def _balanced_first(points: list[Point]) -> list[Point]:
    values = np.array([_losses(each) for each in points])
    best, worst = values.min(axis=0), values.max(axis=0)
    share = ((values - best) / np.where(worst > best, worst - best, np.inf)).mean(axis=-1)
    return [points[i] for i in np.argsort(share, kind="stable")]


def _losses(point: Point) -> Array:
    return np.array(list(point.losses.values()))


def _settled(answers: Sequence[tuple[Array, Point | None]], level: Array, lengths: Sequence[int]) -> bool:
    """Whether a question with looser levels had no answer, or one that meets these levels too."""
    for looser, answer in answers:
        if (looser >= level).all():
            if answer is None:
                return True
            if all(answer.losses[n] <= most * (1 + SLACK) for n, most in zip(lengths, level, strict=True)):
                return True
    return False


def _non_dominated(found: Sequence[Point]) -> list[Point]:
    """Those that no other matches or beats at every length (to nine digits); of equals the first stays."""
    kept = []
    for i, each in enumerate(found):
        mine = _losses(each)
        beaten = False
        for j, other in enumerate(found):
            theirs = _losses(other)
            same = np.allclose(mine, theirs, rtol=1e-9, atol=0)
            beaten |= j < i if same else bool((theirs <= mine * (1 + 1e-9)).all())
        if not beaten:
            kept.append(each)
    return kept

"""One plan of spans, dense heads and sampled heads: each gets what loses least, under bounds on memory, reads and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from attnspan.planner.choices import Choices, check_kinds
from attnspan.planner.errors import UserError
from attnspan.planner.limits import Limits
from attnspan.planner.optimize import solve
from attnspan.planner.plan import Plan
from attnspan.planner.problem import Choice, InfeasibleError, Problem, Rows, relative_gap, take
from attnspan.planner.rules import MODES

__all__ = ["Limits", "plan_unified", "plans_by_kinds"]


def plan_unified(
    choices: Choices,
    limits: Limits,
    kinds: Iterable[str] | None = None,
    max_rules_per_layer: int | None = None,
    gap: float = 0.001,
    seconds: float = 30.0,
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan with the least predicted loss, averaged over the lengths of the choices, that keeps all bounds.

    kinds: of heads, by default all that there are choices of; UserError when there are none of one.
    Its solver_gap is proven; `seconds` bounds each of the problems solved. A plan of several kinds is never predicted to lose
    more than one of fewer of them, whatever the gap: these are solved too. Provenance tells the bounds and what the plan takes of
    them. InfeasibleError, saying what breaks, by how much and what would do, when no plan keeps the bounds.
    """
    every = plans_by_kinds(choices, limits, kinds, max_rules_per_layer, gap, seconds, provenance)
    return list(every.values())[-1]


def plans_by_kinds(
    choices: Choices,
    limits: Limits,
    kinds: Iterable[str] | None = None,
    max_rules_per_layer: int | None = None,
    gap: float = 0.001,
    seconds: float = 30.0,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Plan]:
    """As `plan_unified`, and the plans of fewer kinds that keep the bounds before it; names are kinds joined by +."""
    wanted = _wanted(choices, kinds)
    out: dict[str, Plan] = {}
    best: dict[tuple[str, ...], tuple[float, list[list[Any]]]] = {}
    for some in (part for size in range(1, len(wanted) + 1) for part in combinations(wanted, size)):
        whole = len(some) == len(wanted)
        allowed = choices.of_kinds(some)
        loss = allowed.loss.mean(axis=0)
        try:
            rows = limits.rows(allowed)
            solution = solve(Problem(loss, rows, max_rules_per_layer), gap=gap, seconds=seconds)
        except InfeasibleError as error:
            if whole:
                raise _what_would(error, limits, allowed, max_rules_per_layer) from None
            continue
        choice, least = solution.choice, solution.loss
        for fewer, (theirs, rules) in best.items():
            if set(fewer) <= set(some) and theirs < least:
                choice, least = _indices(allowed, rules), theirs
        best[some] = least, [[allowed.rules[i] for i in layer] for layer in choice.tolist()]
        proven = relative_gap(least, min(solution.lower_bound, least))
        out["+".join(some)] = _plan(allowed, limits, rows, choice, proven, provenance)
    return out


def _wanted(choices: Choices, kinds: Iterable[str] | None) -> tuple[str, ...]:
    there = choices.kinds()
    if kinds is None:
        return tuple(kind for kind in MODES if kind in there)
    wanted = check_kinds(kinds)
    for kind in wanted:
        if kind not in there:
            fix = "measure sampling first" if kind == "lsh" else "change the grid"
            raise UserError(f"no choice is of the kind {kind}, which --kinds names: leave it out, or {fix}")
    return wanted


def _indices(choices: Choices, rules: list[list[Any]]) -> Choice:
    known = {rule: i for i, rule in enumerate(choices.rules)}
    return np.array([[known[rule] for rule in layer] for layer in rules], np.int64)


def _plan(choices: Choices, limits: Limits, rows: Rows, choice: Choice, gap: float, provenance: Mapping[str, Any] | None) -> Plan:
    losses = {n: float(take(loss, choice).sum()) for n, loss in zip(choices.lengths, choices.loss, strict=True)}
    lengths = sorted({*choices.lengths, *limits.read})
    read = {str(n): float(take(limits.read_bytes(choices, n), choice).sum()) / limits.dense_bytes(choices, n) for n in lengths}
    made = {
        "method": "unified",
        "target": limits.target,
        "cache_dtype": limits.cache_dtype,
        "kinds": list(dict.fromkeys(choices.kinds())),
        "bounds": {
            name: {"cost": cost, "bound": bound}
            for name, cost, bound in zip(rows.names, rows.of(choice).tolist(), rows.bound.tolist(), strict=True)
        },
        "read": read,
        "memory": limits.memory(choices, choice),
        "rules_in_grid": len(choices.rules),
    }
    rules = [[choices.rules[i] for i in layer] for layer in choice.tolist()]
    told = dict(provenance or {}) | made
    return Plan(choices.shape, choices.n_max, rules, provenance=told, predicted_loss=losses, solver_gap=gap)


def _what_would(error: InfeasibleError, limits: Limits, choices: Choices, max_rules: int | None) -> InfeasibleError:
    """The error with, for each bound of several that cannot be kept together, the least value that could be, given the others."""
    costs = limits.costs(choices)
    bounds = np.array([bound for _, _, bound, _ in costs])
    stacked = np.stack([cost for *_, cost in costs])
    if len(costs) < 2 or any(cost.min(axis=-1).sum() > bound * (1 + 1e-9) for _, _, bound, cost in costs):
        return error  # one alone is out of reach, which the message says
    ways = []
    for i, (kind, n, bound, cost) in enumerate(costs):
        rest = [j for j in range(len(costs)) if j != i]
        others = Rows(tuple(str(j) for j in rest), stacked[rest], bounds[rest])
        try:
            least = solve(Problem(np.ascontiguousarray(cost), others, max_rules), gap=0.001, seconds=10.0).loss
        except InfeasibleError:
            continue
        ways.append(limits.would_do(choices, kind, n, bound, least))
    if not ways:
        return error
    return InfeasibleError(f"no plan keeps all bounds together; with the others as they are it takes {', or '.join(ways)}")

"""What HiGHS solves for the optimiser: the master, linear and integer, and the whole problem in two forms."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array, hstack

from attnspan.planner.problem import Array, Choice, Problem

Mask = npt.NDArray[np.bool_]
Index = npt.NDArray[np.int64]
Constraint = tuple[csr_array, Any, Any]
"""A matrix over the variables, and the least and the most that its product may be."""


def master(loss: Array, cost: Array, bound: Array, groups: csr_array, slack: bool = False) -> tuple[float, Array]:
    """Least loss of a mix of columns, the weights of each group summing to 1, under the rows; and the price of each row.

    loss float64 [columns], cost [rows, columns], bound [rows], groups [groups, columns] with a 1 where a column belongs.
    Prices, [rows], are at least 0. With `slack` the loss is replaced by the excess over the bounds, summed over rows.
    Infinite when no mix meets the bounds.
    """
    rows, columns = cost.shape
    if slack:
        loss = np.concatenate([np.zeros(columns), np.ones(rows)])
        cost = np.hstack([cost, -np.eye(rows)])
        groups = hstack([groups, coo_array((groups.shape[0], rows))], format="csr")
    found = linprog(loss, A_ub=cost, b_ub=bound, A_eq=groups, b_eq=np.ones(groups.shape[0]), method="highs")
    if found.status == 2:
        return np.inf, np.ones(rows)
    if found.status != 0:
        raise RuntimeError(f"HiGHS: {found.message}")
    return float(found.fun), np.maximum(-found.ineqlin.marginals, 0.0)


def combine(loss: Array, cost: Array, bound: Array, groups: csr_array, gap: float, seconds: float) -> Index | None:
    """One column of each group, in the order of the groups, with the least loss found under the rows; None if none is found."""
    # Presolve has nothing to gain here, and its way back sometimes prints a line to standard output.
    found = _milp(loss, [(csr_array(cost), -np.inf, bound), (groups, 1, 1)], len(loss), gap, seconds, presolve=False)
    if found.x is None:
        return None
    pick = np.flatnonzero(found.x > 0.5)
    group = groups.tocsc().indices[pick]  # one entry a column
    return pick[np.argsort(group)] if len(pick) == groups.shape[0] else None


def exact(problem: Problem, keep: Mask, gap: float, seconds: float) -> tuple[Choice | None, float]:
    """Solve a problem in its plain form: a choice (None if none is found) and a lower bound; infinite: there is no choice.

    Only the rules in keep, bool [layers, kv_heads, rules], are considered. x is 1 where a head has a rule, y where a layer does.
    """
    layers, heads, rules = problem.loss.shape
    layer, head, rule = np.nonzero(keep)
    uses, use = np.unique(layer * rules + rule, return_inverse=True)  # y: one for each (layer, rule) kept, and that of each x
    x, y = np.arange(len(layer)), len(layer) + np.arange(len(uses) if problem.limit is not None else 0)
    size = len(x) + len(y)
    constraints: list[Constraint] = [(_entries(layer * heads + head, x, layers * heads, size), 1, 1)]
    if problem.limit is not None:
        constraints.append((_entries(x, x, len(x), size) - _entries(x, y[use], len(x), size), -np.inf, 0))
        constraints.append((_entries(uses // rules, y, layers, size), -np.inf, problem.limit))
    return _solve(problem, (layer, head, rule), constraints, size, gap, seconds)


def exact_by_masks(problem: Problem, masks: list[list[Mask]], gap: float, seconds: float) -> tuple[Choice | None, float]:
    """Solve a problem whose layers use one mask each, bool [kv_heads, rules], of a list: a choice or None, and a lower bound.

    x is 1 for the rule of a head under a mask, z for the mask that a layer uses. The linear form of this is as tight as the
    bound by prices; in the plain form fractions of many rules slip under the limit.
    """
    heads = problem.loss.shape[1]
    owner = np.repeat(np.arange(len(masks)), [len(each) for each in masks])  # layer of each mask
    mask, head, rule = np.nonzero(np.concatenate([np.stack(each) for each in masks]))
    x, z = np.arange(len(mask)), len(mask) + np.arange(len(owner))
    size = len(x) + len(z)
    every = np.arange(len(owner) * heads)  # each mask and head
    linked = _entries(mask * heads + head, x, len(every), size) - _entries(every, z[every // heads], len(every), size)
    constraints: list[Constraint] = [(linked, 0, 0), (_entries(owner, z, len(masks), size), 1, 1)]
    return _solve(problem, (owner[mask], head, rule), constraints, size, gap, seconds)


def _entries(row: Index, column: Index, rows: int, columns: int) -> csr_array:
    return csr_array((np.ones(len(row)), (row, column)), shape=(rows, columns))


def _solve(
    problem: Problem, at: tuple[Index, Index, Index], constraints: list[Constraint], size: int, gap: float, seconds: float
) -> tuple[Choice | None, float]:
    """Solve under the rows and more constraints. The first variables stand for the rules at (layer, head, rule).

    Only these need to be told to be integers: the others follow. (HiGHS 1.12 lost answers when they were told as well.)
    """
    rest = (0, size - len(at[0]))
    cost = csr_array(np.pad(problem.rows.cost[:, *at], ((0, 0), rest)))
    found = _milp(np.pad(problem.loss[at], rest), [(cost, -np.inf, problem.rows.bound), *constraints], len(at[0]), gap, seconds)
    bound = -np.inf if found.mip_dual_bound is None else float(found.mip_dual_bound)
    if found.x is None:
        return None, np.inf if found.status == 2 else bound
    layer, head, rule = (index[found.x[: len(at[0])] > 0.5] for index in at)
    choice = np.zeros(problem.loss.shape[:2], np.int64)
    choice[layer, head] = rule
    return choice, bound


def _milp(loss: Array, constraints: list[Constraint], integers: int, gap: float, seconds: float, presolve: bool = True) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns when the time is over; the result says so too
        found = milp(
            loss,
            constraints=[LinearConstraint(*each) for each in constraints],
            integrality=np.arange(len(loss)) < integers,
            bounds=Bounds(0, 1),
            options={"time_limit": max(seconds, 0.1), "mip_rel_gap": gap, "presolve": presolve},
        )
    if found.status in (2, 4) and presolve:  # HiGHS 1.12 can lose its answers on presolve's way back, and then says infeasible
        return _milp(loss, constraints, integers, gap, seconds, presolve=False)
    return found

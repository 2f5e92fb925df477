"""The problem the optimiser solves, and its solution: one rule per KV head, least loss, under linear upper bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.rules import check_int

Array = npt.NDArray[np.float64]
Choice = npt.NDArray[np.int64]
"""A rule index for each head: int64 [layers, kv_heads]."""

SLACK = 1e-9
"""Relative excess of a bound that is rounding; half a millionth of the cost of one block in the largest models planned for."""


class InfeasibleError(UserError):
    """No choice of rules meets the bounds."""


def take(values: Array, choice: Choice) -> Array:
    """values[..., layer, kv_head, choice[layer, kv_head]]: float64 [..., layers, kv_heads]."""
    layer, head = np.indices(choice.shape)
    return np.asarray(values[..., layer, head, choice])


@dataclass(frozen=True)
class Rows:
    """Upper bounds: in each row, the costs of the chosen rules sum to at most the bound.

    cost float64 [rows, layers, kv_heads, rules], bound float64 [rows], both at least 0 and in the unit that the name of the
    row is read in.
    """

    names: tuple[str, ...]
    cost: Array
    bound: Array

    def __post_init__(self) -> None:
        if self.cost.ndim != 4 or not len(self.names) == len(self.cost) == len(self.bound):
            raise UserError(f"rows have {len(self.names)} names, costs {list(self.cost.shape)}, bounds {list(self.bound.shape)}")
        if not (np.isfinite(self.cost).all() and np.isfinite(self.bound).all()):
            raise UserError("a cost or a bound is no finite number")
        if (self.cost < 0).any() or (self.bound < 0).any():
            raise UserError("a cost or a bound is below 0")

    def of(self, choice: Choice) -> Array:
        """What a choice costs in each row: float64 [rows]."""
        return np.asarray(take(self.cost, choice).sum(axis=(1, 2)))

    def met(self, choice: Choice) -> bool:
        """Whether a choice keeps every bound, up to rounding."""
        return bool((self.of(choice) <= self.bound * (1 + SLACK) + 1e-300).all())

    def __add__(self, other: Rows) -> Rows:
        cost, bound = np.concatenate([self.cost, other.cost]), np.concatenate([self.bound, other.bound])
        return Rows(self.names + other.names, cost, bound)


@dataclass(frozen=True)
class Problem:
    """Least sum of losses (float64 [layers, kv_heads, rules]) under the rows, with at most max_rules distinct rules a layer.

    max_rules None is no limit. UserError on other shapes or values.
    """

    loss: Array
    rows: Rows
    max_rules: int | None = None

    def __post_init__(self) -> None:
        if self.loss.shape != self.rows.cost.shape[1:] or 0 in self.loss.shape:
            raise UserError(f"losses have the shape {list(self.loss.shape)}, costs {list(self.rows.cost.shape)}: they do not fit")
        if not np.isfinite(self.loss).all() or (self.loss < 0).any():
            raise UserError("a loss is below 0 or no finite number")
        if self.max_rules is not None:
            check_int("rules per layer", self.max_rules, 1, 65536, "; change --max-rules-per-layer")

    @property
    def limit(self) -> int | None:
        """max_rules where it binds: None when a layer has no more heads or rules than that."""
        return None if self.max_rules is None or self.max_rules >= min(self.loss.shape[1:]) else self.max_rules

    def loss_of(self, choice: Choice) -> float:
        """Sum of the losses of a choice."""
        return float(take(self.loss, choice).sum())

    def met(self, choice: Choice) -> bool:
        """Whether a choice keeps every bound and the limit of rules per layer."""
        limit = self.limit
        return self.rows.met(choice) and (limit is None or all(len(set(layer)) <= limit for layer in choice.tolist()))

    def scaled(self, loss_unit: float) -> Problem:
        """The same problem with all bounds 1 and losses in the given unit: what solvers with absolute tolerances need."""
        # A bound of 0 only admits heads whose cost is 0: any scale will do.
        most = self.rows.cost.max(axis=-1).sum(axis=(1, 2))
        unit = np.where(self.rows.bound > 0, self.rows.bound, np.where(most > 0, most, 1.0))
        rows = Rows(self.rows.names, self.rows.cost / unit[:, None, None, None], self.rows.bound / unit)
        return Problem(self.loss / loss_unit, rows, self.max_rules)

    @cached_property
    def largest(self) -> float:
        """Loss when every head has its worst rule."""
        return float(self.loss.max(axis=-1).sum())


@dataclass(frozen=True)
class Solution:
    """A choice that meets the bounds, and the proof of how good it is.

    No choice has a loss below lower_bound; seconds is the time it took; costs is (name, cost, bound) by row.
    """

    choice: Choice
    loss: float
    lower_bound: float
    seconds: float
    costs: Sequence[tuple[str, float, float]]

    @property
    def gap(self) -> float:
        """(loss - lower_bound) / loss: the part of the loss that a better choice could at most save."""
        return relative_gap(self.loss, self.lower_bound)


def relative_gap(loss: float, bound: float) -> float:
    """(loss - bound) / loss, in [0, 1]; 1 when one of them is not known yet."""
    if not (np.isfinite(loss) and np.isfinite(bound)):
        return 1.0
    return min(1.0, (loss - bound) / loss) if loss > bound else 0.0

"""The optimiser: one rule for each KV head, least predicted loss under a budget, with a proof of how good the answer is.

Only the rows of the budget tie the layers together. Give each row a price, and every layer can be solved on its own by trying
all its sets of at most m rules (`pricing`); for any prices at all, the sum of these solutions less the price of the budget is
a lower bound on the loss (Lagrange). What a layer answers is a *column*: a complete choice for its heads. From the columns
seen so far, a small linear program (the master) mixes the cheapest affordable plan, and its dual values are better prices.
Repeating this (column generation; Dantzig and Wolfe 1960) closes in on the best bound in about ten rounds. A mix is no plan,
but it splits no more layers than there are rows, so that taking one whole column a layer (an integer program of a few hundred
columns) loses little. When the proof still leaves too wide a gap, which happens to models of few heads, the rules that the
bound has ruled out are removed and the rest is solved in full.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np
from scipy.sparse import csr_array

from attnspan.planner import highs
from attnspan.planner.errors import UserError
from attnspan.planner.pricing import near_best, price
from attnspan.planner.problem import Array, Choice, InfeasibleError, Problem, Solution, relative_gap

METHODS = ("columns", "mip")
ROUNDS = 200
"""Rounds of column generation at most; ten are usual."""
TIGHTER = 1 - 2e-6
"""HiGHS lets a row exceed its bound by 1e-6 of it: an answer that does is computed again under bounds this much tighter."""


def solve(problem: Problem, method: str = "columns", gap: float = 0.005, seconds: float = 60.0) -> Solution:
    """Choose a rule for every head. Stops when the relative gap is proven to be at most `gap`, or after about `seconds`.

    method `columns` is the one described above; `mip` gives the whole problem to HiGHS, which takes minutes where columns
    take a second: an oracle for small problems. InfeasibleError (a UserError) when no choice meets the bounds.
    """
    if method not in METHODS:
        raise UserError(f"method is {method!r}: must be one of {', '.join(METHODS)}")
    start = perf_counter()
    search = _Search(problem.scaled(problem.largest or 1.0), gap, start + seconds)
    if method == "columns":
        search.scan()
        search.generate()
        search.combine()
    else:
        search.measure_in(1e-4)  # HiGHS takes an absolute gap of 1e-6 for none
    if relative_gap(search.best, search.bound) > gap and search.left() > 0:
        search.close()
    if search.choice is None:
        raise InfeasibleError(f"no choice of rules was found in {seconds:g} s that meets {_list(problem)}: raise one of them")
    loss = problem.loss_of(search.choice)
    bound = max(search.bound * search.unit * (problem.largest or 1.0), 0.0)
    # What is left after rounding is no gap.
    bound = loss if loss - bound <= 1e-12 * problem.largest else bound
    costs = list(zip(problem.rows.names, problem.rows.of(search.choice).tolist(), problem.rows.bound.tolist(), strict=True))
    return Solution(search.choice, loss, bound, perf_counter() - start, costs)


def _list(problem: Problem) -> str:
    return ", ".join(f"{name} at most {bound:g}" for name, bound in zip(problem.rows.names, problem.rows.bound, strict=True))


@dataclass
class _Search:
    """State of one run: the columns, the best prices and bound, the best choice. All losses in one unit, all row bounds 1."""

    problem: Problem
    gap: float
    deadline: float
    unit: float = 1.0
    columns: list[tuple[int, Choice]] = field(default_factory=list)  # (layer, rule of each head [kv_heads])
    known: set[tuple[int, bytes]] = field(default_factory=set)
    bound: float = -np.inf
    prices: Array = field(default_factory=lambda: np.empty(0))
    best: float = np.inf
    choice: Choice | None = None

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - perf_counter()

    def offer(self, choice: Choice | None) -> None:
        """Keep a choice if it meets the bounds and is the best so far."""
        if choice is not None and self.problem.met(choice) and self.problem.loss_of(choice) < self.best:
            self.choice, self.best = choice, self.problem.loss_of(choice)

    def ask(self, prices: Array, loss: bool = True) -> tuple[float, int]:
        """Let every layer answer to the prices of the rows: the bound this proves, and how many answers are new columns.

        Without `loss` rules cost nothing but the prices: a bound above 0 proves that the rows cannot be met.
        """
        values = np.tensordot(prices, self.problem.rows.cost, 1)
        total, choice = price(values + self.problem.loss if loss else values, self.problem.limit)
        bound = total - float(prices @ self.problem.rows.bound)
        if loss and bound > self.bound:
            self.bound, self.prices = bound, prices
        self.offer(choice)
        before = len(self.known)
        for layer, picked in enumerate(choice):
            key = (layer, picked.tobytes())
            if key not in self.known:
                self.known.add(key)
                self.columns.append((layer, picked))
        return bound, len(self.known) - before

    def scan(self) -> None:
        """First columns and a first choice: equal prices from next to nothing to prohibitive."""
        rows = len(self.problem.rows.bound)
        for level in np.geomspace(1e-9, 1e3, 25):
            self.ask(np.full(rows, level))
        if self.choice is not None:
            self.measure_in(self.best)

    def measure_in(self, unit: float) -> None:
        """Change the unit of the loss to a typical one: around 1, the tolerances of HiGHS mean what they say."""
        if 0 < unit < np.inf:
            self.unit *= unit
            self.problem = replace(self.problem, loss=self.problem.loss / unit)
            self.bound, self.prices, self.best = self.bound / unit, self.prices / unit, self.best / unit

    def table(self) -> tuple[Array, Array, Array, csr_array]:
        """The columns as the master wants them: loss, cost, bound and groups; a group is a layer."""
        layer = np.array([layer for layer, _ in self.columns])
        picked = np.stack([picked for _, picked in self.columns])
        at = (layer[:, None], np.arange(picked.shape[1]), picked)
        groups = csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))), shape=(len(self.problem.loss), len(layer)))
        return self.problem.loss[at].sum(-1), self.problem.rows.cost[:, *at].sum(-1), self.problem.rows.bound, groups

    def generate(self) -> None:
        """Column generation, until the master and the bound agree."""
        if self.choice is None:
            self.make_affordable()
            self.measure_in(highs.master(*self.table())[0])
        for _ in range(ROUNDS):
            value, prices = highs.master(*self.table())
            if value - self.bound <= self.gap / 50 * abs(value) or self.left() < 0:
                return
            # The master's prices swing wildly at first; half-way to the best ones so far they settle sooner.
            if not self.ask((self.prices + prices) / 2)[1] and not self.ask(prices)[1]:
                return

    def make_affordable(self) -> None:
        """Add columns until some mix meets the rows; InfeasibleError when it is proven that none does, not even a mix."""
        for _ in range(ROUNDS):
            excess, prices = highs.master(*self.table(), slack=True)
            if excess <= 1e-7:
                return
            bound, new = self.ask(prices, loss=False)
            if bound > 1e-7:
                names = [name for name, each in zip(self.problem.rows.names, prices, strict=True) if each > 1e-9]
                raise InfeasibleError(
                    f"no choice of rules meets {' and '.join(names)}{' together' if len(names) > 1 else ''}: "
                    f"the best mix exceeds the bounds by {excess:.2%} in all; raise one of them, or allow more rules per layer"
                )
            if not new:
                return  # layers with too many sets of rules to try: `close` will tell

    def combine(self) -> None:
        """The best choice made of one known column a layer."""
        loss, cost, bound, groups = self.table()
        for tighter in (1.0, TIGHTER):
            pick = highs.combine(loss, cost, bound * tighter, groups, self.gap / 4, min(self.left(), 2.0))
            if pick is None:
                return
            choice = np.stack([self.columns[i][1] for i in pick])
            self.offer(choice)
            if self.problem.met(choice):
                return

    def close(self) -> None:
        """Solve the whole problem with the rules that the bound does not rule out.

        At the best prices, whatever makes a layer's answer worse by more than the gap makes the bound exceed the best loss
        known: no better choice has it.
        """
        keep, masks = self.not_ruled_out()
        proven = np.inf
        for tighter in (1.0, TIGHTER):
            problem = replace(self.problem, rows=replace(self.problem.rows, bound=self.problem.rows.bound * tighter))
            if masks is None:
                choice, bound = highs.exact(problem, keep, self.gap / 2, self.left())
            else:
                choice, bound = highs.exact_by_masks(problem, masks, self.gap / 2, self.left())
            proven = bound if tighter == 1 else proven
            self.offer(choice)
            if choice is None or self.problem.met(choice):
                break
        if self.choice is None and proven == np.inf:
            raise InfeasibleError(f"no choice of rules meets {', '.join(self.problem.rows.names)} together: raise one of them")
        if proven <= self.best * (1 + 1e-6):  # otherwise it contradicts the choice in hand
            self.bound = max(self.bound, min(proven, self.best))

    def not_ruled_out(self) -> tuple[highs.Mask, list[list[highs.Mask]] | None]:
        """The rules that a better choice may have, bool [layers, kv_heads, rules]; and by set of rules, where that is smaller."""
        everything = np.ones(self.problem.loss.shape, np.bool_)
        if self.choice is None or not np.isfinite(self.bound):
            return everything, None
        values = self.problem.loss + np.tensordot(self.prices, self.problem.rows.cost, 1)
        excess = self.best - self.bound + 1e-9 * abs(self.best)
        masks = []
        for value in values:
            found = near_best(value, self.problem.limit, excess)
            if found is None:
                return everything, None
            masks.append(found)
        keep = np.stack([np.any(found, axis=0) for found in masks])
        small = sum(int(mask.sum()) for found in masks for mask in found) <= 2 * keep.sum()
        return keep, masks if small and self.problem.limit is not None else None

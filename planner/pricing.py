"""The best rules of every layer when each rule has a price: the inner problem of the optimiser, one small problem a layer."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

from attnspan.planner.problem import Array, Choice

MOST_TRIED = 2_000_000
"""Subsets times heads that one layer may enumerate: about 10 ms."""


def price(values: Array, max_rules: int | None) -> tuple[float, Choice]:
    """The cheapest choice of rules for values float64 [layers, kv_heads, rules], each layer on its own.

    Returns a lower bound on the least sum of values when no layer has more than max_rules distinct rules, and a choice int64
    [layers, kv_heads] that keeps this limit. The choice attains the bound, unless a layer has too many subsets to try.
    """
    choice = values.argmin(axis=-1)
    least = np.take_along_axis(values, choice[..., None], axis=-1)[..., 0].sum(axis=-1)
    if max_rules is not None:
        useful = _undominated(values)
        for layer, picked in enumerate(choice):
            used = np.unique(picked)
            if len(used) > max_rules:  # otherwise the free choice keeps the limit already
                rules = np.flatnonzero(useful[layer])
                exact = comb(len(rules), max_rules) * len(picked) <= MOST_TRIED
                subset = _best_subset(values[layer], rules if exact else used, max_rules)
                if not exact:
                    subset = _exchange(values[layer], subset, rules)
                choice[layer] = subset[values[layer][:, subset].argmin(axis=-1)]
                if exact:
                    least[layer] = values[layer][np.arange(len(picked)), choice[layer]].sum()
    return float(least.sum()), choice


def near_best(value: Array, max_rules: int | None, excess: float) -> list[npt.NDArray[np.bool_]] | None:
    """What a layer may use if the sum of its values (float64 [kv_heads, rules]) exceeds the least possible by at most `excess`.

    Each such choice fits one of the masks bool [kv_heads, rules] that are returned, which allow max_rules rules each. None when
    there are too many subsets to try.
    """
    low = value.min(axis=-1, keepdims=True)
    if max_rules is None:
        return [value <= low + excess]
    most = price(value[None], max_rules)[0] + excess
    rules = np.flatnonzero((value - low).min(axis=0) + low.sum() <= most)
    size = min(max_rules, len(rules))
    if comb(len(rules), size) * len(value) > MOST_TRIED:
        return None
    members = _subsets(len(rules), size)
    total = _sums(value[:, rules], members)
    masks = {}
    for i in np.flatnonzero(total <= most):
        subset = rules[members[:, i]]
        mask = np.zeros(value.shape, np.bool_)
        mask[:, subset] = total[i] + value[:, subset] - value[:, subset].min(axis=-1, keepdims=True) <= most
        masks[mask.tobytes()] = mask  # subsets that differ in a rule of no use are one
    return list(masks.values())


def _undominated(values: Array) -> npt.NDArray[np.bool_]:
    """Rules that no other rule of the layer matches or beats for every head: bool [layers, rules]; one of equals stays."""
    rules = values.shape[-1]
    earlier = np.arange(rules)[:, None] < np.arange(rules)
    out = np.empty((len(values), rules), np.bool_)
    for layer, value in enumerate(values):
        beats = (value[:, :, None] <= value[:, None, :]).all(axis=0)  # [a, b]: a is never worse than b
        out[layer] = ~(beats & (~beats.T | earlier)).any(axis=0)
    return out


@lru_cache(maxsize=256)
def _subsets(n: int, size: int) -> npt.NDArray[np.int64]:
    """All subsets of the given size of range(n): int64 [size, subsets]."""
    flat = np.fromiter((i for subset in combinations(range(n), size) for i in subset), np.int64, comb(n, size) * size)
    return np.ascontiguousarray(flat.reshape(-1, size).T)


def _best_subset(value: Array, rules: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """The subset of `rules` with the least sum over heads of the best value; value is float64 [kv_heads, rules].

    When every subset of `rules` is too many, those left out one by one with the least harm.
    """
    while len(rules) > size and comb(len(rules), size) * len(value) > MOST_TRIED:
        left = [np.delete(rules, i) for i in range(len(rules))]
        rules = min(left, key=lambda some: float(value[:, some].min(axis=-1).sum()))
    if len(rules) <= size:
        return rules
    members = _subsets(len(rules), size)
    return rules[members[:, _sums(value[:, rules], members).argmin()]]


def _sums(value: Array, members: npt.NDArray[np.int64]) -> Array:
    """Sum over heads of the best value in each subset: float64 [subsets]."""
    total = np.zeros(members.shape[1])
    for head in value:
        best = head[members[0]]
        for member in members[1:]:
            np.minimum(best, head[member], out=best)
        total += best
    return total


def _exchange(value: Array, subset: npt.NDArray[np.int64], rules: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Replace one member of the subset by another rule while that helps."""
    best = float(value[:, subset].min(axis=-1).sum())
    while True:
        trials = [np.append(np.delete(subset, i), rule) for i in range(len(subset)) for rule in rules]
        sums = [float(value[:, trial].min(axis=-1).sum()) for trial in trials]
        if min(sums) >= best - 1e-12 * abs(best):
            return subset
        best, subset = min(sums), trials[int(np.argmin(sums))]

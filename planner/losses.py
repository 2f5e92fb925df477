"""What each rule costs in quality: the predicted loss of every rule for every KV head, at the profiled lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.plan import MAX_TOKENS, Plan
from attnspan.planner.problem import Array, Choice, Rows, take
from attnspan.planner.rules import BLOCK, MIN_SPAN, HeadRule, check_int, span_tokens

Curves = Mapping[int, Array]
"""Loss curves by length N, float64 [layers, kv_heads, blocks + 1], blocks of 64 tokens, the last perhaps of fewer: entry b is the
rise of the loss when a head keeps b blocks."""


def monotone(curves: Curves) -> dict[int, Array]:
    """The curves made fit for a table: 0 at the full span, never below 0, never rising with the span.

    Estimates are noisy: a value is raised to the largest one at any longer span, which is the safe side. Entries below the
    smallest span (128 tokens) repeat that of the smallest.
    """
    out = {}
    for n, curve in curves.items():
        values = np.array(_check_curve(n, curve))
        values[..., -1] = 0.0
        values[..., : MIN_SPAN // BLOCK] = 0.0  # no such spans: they must not raise others
        values = np.maximum.accumulate(np.maximum(values, 0.0)[..., ::-1], axis=-1)[..., ::-1]
        out[n] = np.ascontiguousarray(values)
    return out


def stretched(curves: Curves, n: int) -> dict[int, Array]:
    """The curves and one more, for a text of n tokens longer than any profiled: the longest's, at the same share of the length.
    n need not be whole blocks: the last entry is that of the whole text.

    A head that looks for something anywhere in the text loses by share. A local head loses by distance and is given more than it
    needs. Without it, nothing would speak for keeping anything at lengths that only the budget knows.
    """
    longest = max(curves)
    if n <= longest:
        return dict(curves)
    blocks = -(-n // BLOCK)
    known = _check_curve(longest, curves[longest])
    at = np.minimum(np.arange(blocks + 1) * BLOCK / n, 1) * (known.shape[-1] - 1)
    low = np.minimum(at.astype(int), known.shape[-1] - 2)
    values = known[..., low] + (at - low) * (known[..., low + 1] - known[..., low])
    return dict(curves) | {n: values}


def _check_curve(n: int, curve: npt.ArrayLike) -> Array:
    blocks = -(-check_int("length of curves", n, MIN_SPAN, MAX_TOKENS, "; change --lengths") // BLOCK)
    values = np.asarray(curve, np.float64)
    if values.ndim != 3 or values.shape[-1] != blocks + 1:
        raise UserError(f"curves at {n} have the shape {list(values.shape)}: must be [layers, kv_heads, {blocks + 1}]")
    if not np.isfinite(values).all():
        raise UserError(f"curves at {n} hold {np.count_nonzero(~np.isfinite(values))} values that are no finite number")
    return values


@dataclass(frozen=True)
class LossTable:
    """Predicted rise of the loss by length, layer, KV head and rule: float64 [lengths, layers, kv_heads, rules], at least 0.

    Losses of heads add (a first-order model); lengths rise. UserError on other shapes or values.
    """

    rules: tuple[HeadRule, ...]
    lengths: tuple[int, ...]
    loss: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "lengths", tuple(check_int("length of losses", n, MIN_SPAN, MAX_TOKENS) for n in self.lengths))
        object.__setattr__(self, "loss", np.asarray(self.loss, np.float64))
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise UserError(f"lengths of the losses are {list(self.lengths)}: must rise; change --lengths")
        wanted = (len(self.lengths), len(self.rules))
        if self.loss.ndim != 4 or self.loss.shape[::3] != wanted or 0 in self.loss.shape:
            shape = f"[{wanted[0]}, layers, kv_heads, {wanted[1]}]"
            raise UserError(f"losses have the shape {list(self.loss.shape)}: must be {shape} (lengths, rules)")
        if not (np.isfinite(self.loss).all() and self.loss.min() >= 0):
            raise UserError(f"losses range from {self.loss.min():g} to {self.loss.max():g}: must be finite and at least 0")

    @classmethod
    def from_curves(cls, curves: Curves, rules: Sequence[HeadRule]) -> LossTable:
        """Read off the curves what each rule loses at each length: the entry at its span, as `monotone` made them."""
        tables = []
        alpha, beta = [rule.alpha for rule in rules], [rule.beta for rule in rules]
        for n in sorted(curves):
            curve = _check_curve(n, curves[n])
            if curve.shape[:2] != curves[min(curves)].shape[:2]:
                first = list(curves[min(curves)].shape[:2])
                raise UserError(
                    f"curves at {n} are for {list(curve.shape[:2])} layers and KV heads, not {first} as at {min(curves)}"
                )
            tables.append(curve[..., np.minimum(span_tokens(alpha, beta, n) // BLOCK, curve.shape[-1] - 1)])
        return cls(tuple(rules), tuple(sorted(curves)), np.stack(tables) if tables else np.empty(0))

    def of(self, kept: Plan | Choice) -> dict[int, float]:
        """Predicted loss by length of a plan, or of rule indices int [layers, kv_heads]."""
        choice = self.indices(kept) if isinstance(kept, Plan) else np.asarray(kept)
        return {n: float(take(loss, choice).sum()) for n, loss in zip(self.lengths, self.loss, strict=True)}

    def indices(self, plan: Plan) -> Choice:
        """Index into `rules` of each head's rule: int64 [layers, kv_heads]. UserError when the plan has other rules."""
        known = {(rule.alpha, rule.beta): i for i, rule in enumerate(self.rules)}
        wanted = [[(rule.alpha, rule.beta) for rule in layer] for layer in plan.rules]
        missing = {pair for layer in wanted for pair in layer} - known.keys()
        if missing:
            alpha, beta = min(missing)
            raise UserError(f"the plan has the rule alpha {alpha:g}, beta {beta:g}: no loss is known for it; add it to the grid")
        choice = np.array([[known[pair] for pair in layer] for layer in wanted], np.int64)
        if choice.shape != self.loss.shape[1:3]:
            raise UserError(f"the plan has {choice.shape} layers and KV heads: losses are known for {self.loss.shape[1:3]}")
        return choice

    def rows(self, limits: Mapping[int, float]) -> Rows:
        """Limits on the loss at some of the lengths as rows of a problem."""
        where = [self.lengths.index(n) for n in limits]
        return Rows(tuple(f"loss at {n} tokens" for n in limits), self.loss[where], np.array([*limits.values()], np.float64))

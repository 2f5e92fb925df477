"""Everything that a head may be given, with what each costs in quality: spans, the whole text, samples of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from attnspan.planner.errors import UserError
from attnspan.planner.losses import LossTable
from attnspan.planner.problem import Array
from attnspan.planner.rules import MODES, SINK, HeadRule, span_tokens
from attnspan.planner.shape import ModelShape

__all__ = ["Choices", "check_kinds"]


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """The kinds of heads wanted, without repeats; UserError on others or none."""
    given = tuple(dict.fromkeys(kinds))
    wrong = [kind for kind in given if kind not in MODES]
    if wrong or not given:
        raise UserError(f"kinds are {','.join(given)!r}: must be some of {','.join(MODES)}; change --kinds")
    return given


@dataclass(frozen=True)
class Choices:
    """Rules with their predicted loss by length, layer and KV head, in nats per token; for sampled ones also what they draw.

    loss float64 [lengths, layers, kv_heads, rules]: KL divergence from the dense model when this head alone has the rule; those
    of heads add. drawn float64 [layers, kv_heads, rules]: share of the keys that are sampled (neither sinks nor window) that a
    step attends to, by any query head of the group; read: bytes of the index that it reads for each of them. Both 0 but for lsh.
    lengths rise and end with n_max or before. UserError on other shapes.
    """

    shape: ModelShape
    n_max: int
    rules: tuple[HeadRule, ...]
    lengths: tuple[int, ...]
    loss: Array
    drawn: Array
    read: Array

    def __post_init__(self) -> None:
        wanted = (self.shape.layers, self.shape.kv_heads, len(self.rules))
        if self.loss.shape != (len(self.lengths), *wanted) or self.drawn.shape != wanted or self.read.shape != wanted:
            raise UserError(f"choices have losses {self.loss.shape} and draws {self.drawn.shape}: must end in {wanted}")
        if len(set(self.rules)) != len(self.rules):
            raise UserError("choices hold a rule twice")

    @property
    def table(self) -> LossTable:
        """The losses as the optimiser takes them."""
        return LossTable(self.rules, self.lengths, self.loss)

    def of_kinds(self, kinds: Iterable[str]) -> Choices:
        """Those of some modes. UserError when nothing is left."""
        wanted = check_kinds(kinds)
        keep = [i for i, rule in enumerate(self.rules) if rule.mode in wanted]
        if not keep:
            raise UserError(f"no choice is of the kinds {','.join(wanted)}; change --kinds, or measure sampling first")
        rules = tuple(self.rules[i] for i in keep)
        return dataclasses.replace(
            self, rules=rules, loss=self.loss[..., keep], drawn=self.drawn[..., keep], read=self.read[..., keep]
        )

    def slots(self, n: int) -> Array:
        """Tokens that a head with each rule keeps at n tokens, [rules]."""
        return np.minimum(self._spans(n), n).astype(np.float64)

    def capacities(self) -> Array:
        """Slots that it owns in an artefact for n_max, [rules]."""
        return self._spans(self.n_max).astype(np.float64)

    def _spans(self, n: int) -> Array:
        alpha, beta = [rule.alpha for rule in self.rules], [rule.beta for rule in self.rules]
        return span_tokens(alpha, beta, n).astype(np.float64)

    def sampled(self, n: int) -> Array:
        """Keys that a step at n tokens samples, [rules]; 0 for rules that do not, and for texts so short that a step is exact."""
        from attnspan.planner.lsh_grid import dense_below

        keys = [
            0.0 if rule.lsh is None or n < dense_below(rule.lsh) else max(n - SINK - rule.lsh.window, 0) for rule in self.rules
        ]
        return np.array(keys)

    def rows(self, n: int) -> Array:
        """Rows of keys and values that a step at n tokens attends to, [layers, kv_heads, rules]."""
        sampled = self.sampled(n)
        return self.slots(n) - sampled + self.drawn * sampled

    def index_bytes(self, n: int) -> Array:
        """Bytes of the index that a step at n tokens reads, [layers, kv_heads, rules]."""
        return self.read * self.sampled(n)

    def kinds(self) -> Sequence[str]:
        """Mode of each rule."""
        return [rule.mode for rule in self.rules]

"""Where each row of a batch stands: its length, its tokens, the spans in force."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.rules import span_tokens

__all__ = ["SequenceState"]


class SequenceState:
    """Rows of one batch and what their caches hold.

    lengths: int32 [batch], tokens in the cache of each row. tokens: the ids behind them. pending: the token
    sampled last, not yet in the cache (None: there is none). text: what cache and pending token spell, where
    that is known (a prompt given as text), so that a second turn can continue it.
    """

    def __init__(self, plan: Plan, batch: int) -> None:
        self.n_max = plan.n_max
        self.batch = batch
        self.lengths = np.zeros(batch, dtype=np.int32)
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.pending: list[int | None] = [None] * batch
        self.text: list[str | None] = [None] * batch
        rules = np.array([[(rule.alpha, rule.beta) for rule in layer] for layer in plan.rules], dtype=np.float64)
        self._alpha, self._beta = rules[:, None, :, 0], rules[:, None, :, 1]
        self._limits = plan.limits[:, None, None]
        self._idle = np.array(plan.sinks, dtype=np.int32)[:, None, None] + 1

    def spans(self, lengths: npt.NDArray[np.int32], active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """Spans in force when rows have that many tokens: int32 [layers, rows, kv_heads].

        Prefill of a prompt that brings its row to n tokens uses S(n) for all its chunks; a decode step at
        length n uses S(n + 1). A row that is not active gets the least span, as its output is not used.
        """
        spans = np.minimum(span_tokens(self._alpha, self._beta, lengths[None, :, None]), self._limits)
        return np.where(active[None, :, None], spans, self._idle)

    def check_row(self, row: int) -> int:
        """Return row when the batch has it; UserError otherwise."""
        if not 0 <= row < self.batch:
            raise UserError(f"row is {row}: the session has rows 0 to {self.batch - 1}; change its batch")
        return int(row)

    def check_room(self, row: int, new: int) -> None:
        """Raise UserError when `new` more tokens do not fit in a row."""
        length = int(self.lengths[row])
        if length + new > self.n_max:
            raise UserError(
                f"row {row} holds {length} tokens and {new} more make {length + new}: the artefact was built "
                f"for n_max = {self.n_max}; shorten it, reset the row, or export with a larger --n-max"
            )

    def advance(self, row: int, tokens: Sequence[int]) -> None:
        """Note that tokens are now in the cache of a row."""
        self.lengths[row] += len(tokens)
        self.tokens[row].extend(tokens)
        self.pending[row] = None
        self.text[row] = None

    def copy(self, row: int, to: int) -> None:
        """Make row `to` stand where `row` stands."""
        self.restore(to, self.tokens[row], self.pending[row], self.text[row])

    def restore(self, row: int, tokens: Sequence[int], pending: int | None, text: str | None) -> None:
        """Note that the cache of a row holds tokens, with what is pending and what they spell."""
        self.tokens[row] = list(tokens)
        self.lengths[row] = len(tokens)
        self.pending[row] = pending
        self.text[row] = text

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Forget rows (default all). Slots need no clearing: each is written before it is read."""
        for row in range(self.batch) if rows is None else rows:
            row = self.check_row(row)
            self.lengths[row] = 0
            self.tokens[row].clear()
            self.pending[row] = None
            self.text[row] = None

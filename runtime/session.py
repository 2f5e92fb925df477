"""What every session is: rows of tokens with caches, extended by prompts and steps. Backends compute chunks and steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.portable import chunks
from attnspan.planner.rules import check_int
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.generate import IDLE, Generation, OnProgress
from attnspan.runtime.sampling import Sampling
from attnspan.runtime.snapshot import SavedRow, Views, fill, read_row, write_row
from attnspan.runtime.state import SequenceState
from attnspan.runtime.text import OnText, Prompt, TextGenerator
from attnspan.runtime.tokenizer import Tokenizer

__all__ = ["CHUNK", "RowCaches", "RowSession"]

CHUNK = 512
"""Tokens of a prompt computed at a time: enough for full matrix speed, few enough for little memory."""


class RowCaches(Protocol):
    """The caches and indexes of all rows, wherever they are."""

    def views(self, row: int, length: int) -> Views:
        """What a row of `length` tokens has in use, as arrays of this machine's memory: the caches themselves, or copies."""

    def store(self, row: int, length: int, views: Views) -> None:
        """Take back what `views` gave, filled with other values."""

    def copy(self, row: int, to: int, length: int) -> None:
        """Copy what a row of `length` tokens has in use to another row."""


class RowSession(ABC):
    """Rows with lengths of their own. Prompts are prefilled row by row in chunks, decode steps take all rows together.

    Not to be used by two threads at once.
    """

    _caches: RowCaches
    _chunk: int
    """Most tokens of a prompt that are computed at a time."""

    def __init__(self, artefact: Artefact, batch: int) -> None:
        self.artefact = artefact
        self.batch = check_int("batch", batch, 1, 65536, "; change --batch")
        self.vocab_size = artefact.vocab_size
        self.state = SequenceState(artefact.plan, self.batch)
        self._text = TextGenerator(self, artefact)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens in the cache of each row, int32 [batch]."""
        return self.state.lengths.copy()

    @property
    def kv_bytes(self) -> int:
        """Bytes of all caches, for n_max tokens in every row."""
        return self.artefact.kv_bytes(self.batch)

    @property
    def state_bytes(self) -> int:
        """Bytes of the indexes of sampled heads in every row; they come on top of the caches."""
        return self.artefact.state_bytes(self.batch)

    @property
    def tokenizer(self) -> Tokenizer:
        """The artefact's tokenizer; UserError when it has none."""
        return self._text.tokenizer

    @property
    @abstractmethod
    def backend(self) -> dict[str, str | int | None]:
        """What runs the model, as `attnspan run --json` tells it."""

    def prefill(
        self, row: int, tokens: Sequence[int], keep: int = 1, on_progress: OnProgress | None = None
    ) -> npt.NDArray[np.float32]:
        """Append tokens to a row; logits of the last `keep` of them, fp32 [keep, vocab].

        All chunks use the spans of the length that the row has afterwards. on_progress is called as (row,
        tokens done, tokens in all) before the first chunk and after each. UserError: no tokens, ids outside
        the vocabulary, more than n_max. An exception or Ctrl-C while a chunk is computed leaves the row empty.
        """
        row = self.state.check_row(row)
        ids = self._check_tokens(tokens)
        total = len(ids)
        check_int("keep", keep, 1, max(total, 1), f": the prompt of row {row} has {total} tokens")
        self.state.check_room(row, total)
        final = self.state.lengths[row : row + 1] + np.int32(total)
        span = self.state.spans(final, np.ones(1, dtype=bool))
        logits = np.empty((keep, self.vocab_size), dtype=np.float32)
        unkept = total - keep
        if on_progress is not None:
            on_progress(row, 0, total)
        for start, end in self._chunks(int(self.state.lengths[row]), total):
            wanted = logits[max(start - unkept, 0) : end - unkept] if end > unkept else None
            try:
                self._compute_chunk(row, ids[start:end], span, wanted)
                self.state.advance(row, ids[start:end].tolist())
            except BaseException:
                # Rings and indexes may be ahead of the length by now, and cannot go back.
                self.state.reset([row])
                raise
            if on_progress is not None:
                on_progress(row, end, total)
        return logits

    def decode(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Append one token to each row, [batch]; logits of what follows, fp32 [batch, vocab].

        A row given IDLE (-1) takes no part: its length and what later steps read of its cache stay, its
        logits mean nothing. UserError as in `prefill`.
        """
        step = np.asarray(tokens, dtype=np.int64)
        if step.shape != (self.batch,):
            raise UserError(f"decode got tokens of shape {list(step.shape)}: must be [{self.batch}], one a row")
        active = step != IDLE
        rows = np.flatnonzero(active).tolist()
        self._check_tokens(step[active])
        for row in rows:
            self.state.check_room(row, 1)
        # An idle row computes token 0 and writes it to the slot of its next token, which overwrites it. A full row has no next
        # token and loses its last one: nothing can follow that would read it.
        lengths = np.minimum(self.state.lengths, np.int32(self.artefact.n_max - 1))
        span = self.state.spans(self.state.lengths + 1, active)
        logits = self._compute_step(np.where(active, step, 0), lengths, span)
        for row in rows:
            self.state.advance(row, [int(step[row])])
        return logits

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Empty rows (default all)."""
        self.state.reset(rows)

    def fork(self, row: int, to: int) -> None:
        """Make row `to` a copy of `row`: caches, indexes, tokens. Both go on from there on their own."""
        row, to = self.state.check_row(row), self.state.check_row(to)
        if row == to:
            return
        self.state.reset([to])
        self._caches.copy(row, to, int(self.state.lengths[row]))
        self.state.copy(row, to)

    def save(self, path: str | Path, row: int = 0) -> None:
        """Write what a row holds to one file, which `load` of a session over the same artefact reads.

        UserError when the file cannot be written.
        """
        row = self.state.check_row(row)
        state, artefact = self.state, self.artefact
        saved = SavedRow(artefact.fingerprint, artefact.model_id, state.tokens[row], state.pending[row], state.text[row], [])
        write_row(Path(path), saved, self._caches.views(row, int(state.lengths[row])))

    def load(self, path: str | Path, row: int = 0) -> None:
        """Let a row hold what was saved, in place of what it held.

        UserError, and the row stays as it was, when the file is not a saved row of this artefact, cut short or changed.
        """
        row = self.state.check_row(row)
        path = Path(path)
        with read_row(path) as (saved, file):
            length = len(saved.tokens)
            if length > self.artefact.n_max:
                raise UserError(f"{path} holds {length} tokens: the artefact takes {self.artefact.n_max} (n_max)")
            views = self._caches.views(row, length)
            saved.check(path, self.artefact.fingerprint, self.artefact.model_id, views)
            if saved.tokens:
                self._check_tokens(saved.tokens)
            if saved.pending is not None:
                self._check_tokens([saved.pending])
            self.state.reset([row])
            fill(file, views)
            self._caches.store(row, length, views)
        self.state.restore(row, saved.tokens, saved.pending, saved.text)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        *,
        continue_: bool = False,
        stop_tokens: frozenset[int] | None = None,
        on_text: OnText | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Generation]:
        """Generate one continuation a prompt (text, token ids, or messages); see `TextGenerator.generate`."""
        return self._text.generate(
            prompts,
            max_new_tokens,
            sampling,
            continue_=continue_,
            stop_tokens=stop_tokens,
            on_text=on_text,
            on_progress=on_progress,
        )

    def _chunks(self, length: int, total: int) -> list[tuple[int, int]]:
        """Where the chunks of `total` tokens begin and end, for a row that holds `length` before them."""
        if self.artefact.chunk is not None:
            return chunks(length, total, self._chunk, self.artefact.chunk, self.artefact.sink)
        starts = list(range(0, total, self._chunk))
        found = list(zip(starts, [*starts[1:], total], strict=True))
        # No chunk of a prompt is a single token if possible: sampled heads would sample it.
        if self.state_bytes and self._chunk > 2 and len(found) > 1 and found[-1] == (total - 1, total):
            found[-2:] = [(found[-2][0], total - 2), (total - 2, total)]
        return found

    @abstractmethod
    def _compute_chunk(
        self, row: int, tokens: npt.NDArray[np.int64], span: npt.NDArray[np.int32], logits: npt.NDArray[np.float32] | None
    ) -> None:
        """Append a chunk to a row, at its length of now. tokens [tokens]; span [layers, 1, kv_heads].

        logits [kept, vocab]: takes those of the last positions; None: none are wanted.
        """

    @abstractmethod
    def _compute_step(
        self, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], span: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        """One token for every row. tokens, lengths [batch]; span [layers, batch, kv_heads]; a new array [batch, vocab]."""

    def _check_tokens(self, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]:
        ids = np.ascontiguousarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or not ids.size:
            raise UserError(f"got token ids of shape {list(ids.shape)}: must be one or more in one dimension")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            wrong = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise UserError(f"token id {wrong} is not in the vocabulary: must be from 0 to {self.vocab_size - 1}")
        return ids

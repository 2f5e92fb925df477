"""An artefact of target `cpu`, ready to generate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime.binding import Caches, StepBuffers
from attnspan.cpu_runtime.loading import default_threads, open_session
from attnspan.planner.errors import UserError
from attnspan.planner.rules import check_int
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.generate import IDLE, Generation, OnProgress
from attnspan.runtime.memory import check_indexes_fit
from attnspan.runtime.sampling import Sampling
from attnspan.runtime.snapshot import SavedRow, fill, read_row, write_row
from attnspan.runtime.state import SequenceState
from attnspan.runtime.text import OnText, Prompt, TextGenerator
from attnspan.runtime.tokenizer import Tokenizer

__all__ = ["CHUNK", "Session"]

CHUNK = 512
"""Tokens of a prompt computed at a time: enough for full matrix speed, few enough for little memory."""
_CHUNK_WITHOUT_LIBRARY = 64
"""The function bodies keep the scores of a chunk against the whole cache in memory."""


class Session:
    """Runs an artefact with ONNX Runtime; `batch` rows, each with a length of its own.

    Prompts are prefilled row by row in chunks, decode steps take all rows together. Caches are allocated
    once and updated in place. threads None: the physical cores this process may use. library: path of the
    op library, None for the installed one or the artefact's; use_library False runs the ops as standard
    ONNX (slow). check_memory False: allow sampled heads whose caches and indexes, for n_max tokens in every
    row, are larger than the memory that is available; texts are to stay short. Not to be used by two threads
    at once. UserError: not an artefact for CPUs, no memory, ONNX Runtime older than 1.25.
    """

    def __init__(
        self,
        folder: str | Path | Artefact,
        *,
        batch: int = 1,
        threads: int | None = None,
        use_library: bool = True,
        library: str | Path | None = None,
        chunk: int | None = None,
        check_memory: bool = True,
    ) -> None:
        self.artefact = folder if isinstance(folder, Artefact) else Artefact.load(folder)
        if self.artefact.target != "cpu":
            raise UserError(
                f"{self.artefact.folder} was exported for target {self.artefact.target!r}: this runtime "
                "takes 'cpu'; export with --target cpu"
            )
        self.batch = check_int("batch", batch, 1, 65536, "; change --batch")
        self.threads = check_int("threads", threads or default_threads(), 1, 4096, "; change --threads")
        self.vocab_size = self.artefact.vocab_size
        self._session, self.library = open_session(self.artefact, threads=self.threads, use_library=use_library, library=library)
        self._chunk = check_int("chunk", chunk or (CHUNK if self.library else _CHUNK_WITHOUT_LIBRARY), 1, 2**20)
        self.state = SequenceState(self.artefact.plan, self.batch)
        self._caches = self._allocate(check_memory)
        self._rows: dict[int, StepBuffers] = {}
        self._tokens = np.zeros((self.batch, 1), dtype=np.int64)
        self._logits = np.zeros((self.batch, 1, self.vocab_size), dtype=np.float32)
        self._step = self._buffers(0, self.batch)
        self._step.set_tokens(self._tokens)
        self._step.set_logits(self._logits)
        self._text = TextGenerator(self, self.artefact)

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

    def prefill(
        self, row: int, tokens: Sequence[int], keep: int = 1, on_progress: OnProgress | None = None
    ) -> npt.NDArray[np.float32]:
        """Append tokens to a row; logits of the last `keep` of them, fp32 [keep, vocab].

        All chunks use the spans of the length that the row has afterwards. on_progress is called as (row,
        tokens done, tokens in all) before the first chunk and after each. UserError: no tokens, ids outside
        the vocabulary, more than n_max.
        """
        row = self.state.check_row(row)
        ids = self._check_tokens(tokens)
        total = len(ids)
        check_int("keep", keep, 1, max(total, 1), f": the prompt of row {row} has {total} tokens")
        self.state.check_room(row, total)
        if row not in self._rows:
            self._rows[row] = self._buffers(row, 1)
        buffers = self._rows[row]
        final = self.state.lengths[row : row + 1] + np.int32(total)
        buffers.span[:] = self.state.spans(final, np.ones(1, dtype=bool))
        logits = np.empty((1, keep, self.vocab_size), dtype=np.float32)
        unwanted = np.empty((1, 1, self.vocab_size), dtype=np.float32)
        if on_progress is not None:
            on_progress(row, 0, total)
        for start, end in self._chunks(total):
            chunk = ids[None, start:end]
            # The model computes one row of logits at least.
            first = max(total - keep, start)
            buffers.set_logits(logits[:, first - (total - keep) : end - (total - keep)] if first < end else unwanted)
            buffers.set_tokens(chunk)
            buffers.length[0] = self.state.lengths[row]
            buffers.run()
            self.state.advance(row, chunk[0].tolist())
            if on_progress is not None:
                on_progress(row, end, total)
        return logits.reshape(keep, self.vocab_size)

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
        np.copyto(self._tokens[:, 0], np.where(active, step, 0))
        np.minimum(self.state.lengths, self.artefact.n_max - 1, out=self._step.length)
        self._step.span[:] = self.state.spans(self.state.lengths + 1, active)
        self._step.run()
        for row in rows:
            self.state.advance(row, [int(step[row])])
        return self._logits[:, 0].copy()

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Empty rows (default all)."""
        self.state.reset(rows)

    def fork(self, row: int, to: int) -> None:
        """Make row `to` a copy of `row`: caches, indexes, tokens. Both go on from there on their own."""
        row, to = self.state.check_row(row), self.state.check_row(to)
        if row == to:
            return
        length = int(self.state.lengths[row])
        self.state.reset([to])
        for (_, source), (_, target) in zip(self._caches.views(row, length), self._caches.views(to, length), strict=True):
            np.copyto(target, source)
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
            if len(saved.tokens) > self.artefact.n_max:
                raise UserError(f"{path} holds {len(saved.tokens)} tokens: the artefact takes {self.artefact.n_max} (n_max)")
            views = self._caches.views(row, len(saved.tokens))
            saved.check(path, self.artefact.fingerprint, self.artefact.model_id, views)
            if saved.tokens:
                self._check_tokens(saved.tokens)
            if saved.pending is not None:
                self._check_tokens([saved.pending])
            self.state.reset([row])
            fill(file, views)
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

    def _allocate(self, check: bool) -> Caches:
        """The caches and states. UserError with the numbers when there is no memory for them."""
        kv, states = self.kv_bytes, self.state_bytes
        where = f"{self.batch} rows of {self.artefact.n_max} tokens"
        if check:
            check_indexes_fit(kv, states, where, "lower the batch, or")
        try:
            return Caches(self.artefact, self.batch, in_place=self.library is not None)
        except MemoryError:
            indexes = f" and indexes of {states / 1e9:.1f} GB" if states else ""
            raise UserError(
                f"no memory for caches of {kv / 1e9:.1f} GB{indexes} ({where}): "
                "lower the batch, or export with a smaller --n-max or --density"
            ) from None

    def _chunks(self, total: int) -> list[tuple[int, int]]:
        """Where the chunks of `total` tokens begin and end. None is a single token if possible: sampled heads would sample it."""
        starts = list(range(0, total, self._chunk))
        if len(starts) > 1 and total - starts[-1] == 1 and self._chunk > 2 and self.state_bytes:
            starts[-1] -= 1
        return list(zip(starts, [*starts[1:], total], strict=True))

    def _buffers(self, start: int, count: int) -> StepBuffers:
        return StepBuffers(self._session, self._caches, self.artefact, start, count)

    def _check_tokens(self, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]:
        ids = np.ascontiguousarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or not ids.size:
            raise UserError(f"got token ids of shape {list(ids.shape)}: must be one or more in one dimension")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            wrong = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise UserError(f"token id {wrong} is not in the vocabulary: must be from 0 to {self.vocab_size - 1}")
        return ids

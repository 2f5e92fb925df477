"""The session of a service: steps as wide as the rows in use, and memory of rows given back."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime import Session
from attnspan.runtime.artefact import CACHE_BYTES, Artefact
from attnspan.runtime.generate import IDLE

__all__ = ["EXACT_KEPT", "BatchSession", "kept", "kv_bytes"]

PROBE = 48
"""Tokens before the step that `check_widths` compares, as many as the cache of any artefact holds."""
EXACT_KEPT = 1024 * 256
"""Tokens kept by all heads of a layer, in all rows, up to which the op library cuts the caches of a row into the same pieces
whatever the other rows hold (`kShortChunk * kManyTasks` of cpu_runtime/src/span.cc); beyond, last bits of long rows may
differ."""


def kept(artefact: Artefact, tokens: int) -> int:
    """Tokens that all KV heads of the fullest layer keep for a row of so many tokens."""
    layers = [0] * artefact.layers
    for part in artefact.parts:
        layers[part.layer] += sum(min(tokens, capacity) for capacity in part.capacity)
    return max(layers)


def kv_bytes(artefact: Artefact, tokens: int) -> int:
    """Bytes of caches and indexes that a row touches until it holds that many tokens."""
    slots = sum(min(tokens, capacity) for part in artefact.parts for capacity in part.capacity)
    return 2 * slots * artefact.head_dim * CACHE_BYTES[artefact.cache_dtype] + artefact.state_bytes(1)


class BatchSession(Session):
    """A session whose steps compute the first 1, 2, 4, ... rows, as many as hold the active ones, in place of all.

    A width is used when its logits have the same bits as those of a full step: `check_widths` finds that out, once, on the
    machine at hand. So the tokens of a row never depend on who else is there.
    """

    def __init__(self, artefact: Artefact, *, batch: int, **options: Any) -> None:
        super().__init__(artefact, batch=batch, **options)
        # The system would make huge pages of what rows leave at the edges of theirs, and the memory given back would return.
        for array in self._caches.past:
            memory, _ = _mapping(array)
            if memory is not None and hasattr(mmap, "MADV_NOHUGEPAGE"):
                memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.widths: list[int] = [batch]
        self._steps = {batch: (self._step, self._tokens, self._logits)}
        self._width = batch
        self.check_widths()

    def check_widths(self) -> None:
        """Compare steps of each width with full ones, on tokens of no meaning."""
        narrow = [1 << power for power in range((self.batch - 1).bit_length())]
        for width in narrow:
            buffers, of_tokens, of_logits = self._buffers(0, width), self._tokens[:width], self._logits[:width]
            buffers.set_tokens(of_tokens)
            buffers.set_logits(of_logits)
            self._steps[width] = buffers, of_tokens, of_logits
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, PROBE + self.batch, dtype=np.int64)
        self.prefill(0, tokens[:PROBE].tolist())
        for row in range(1, self.batch):
            self.fork(0, row)
        # A step writes the same values to the same slots each time: the lengths do not move.
        lengths, active = self.state.lengths, np.ones(self.batch, dtype=bool)
        step = (tokens[PROBE:], lengths, self.state.spans(lengths + 1, active))
        self._width = self.batch
        full = self._compute_step(*step)
        for width in narrow:
            self._width = width
            if np.array_equal(self._compute_step(*step), full[:width]):
                self.widths.append(width)
        self.widths.sort()
        for row in range(self.batch):
            self.release(row)

    def decode(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """As every session's; rows beyond the last active one are not computed, nor returned, where that changes no bit."""
        active = np.flatnonzero(np.asarray(tokens) != IDLE)
        used = int(active[-1]) + 1 if active.size else 1
        self._width = next(width for width in self.widths if width >= used)
        return super().decode(tokens)

    def release(self, row: int) -> None:
        """Empty a row and give its memory back to the system, in whole pages."""
        self.reset([row])
        for array in self._caches.past:
            memory, first = _mapping(array)
            size = array[row].nbytes
            start = -(-(first + row * size) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (first + (row + 1) * size) // mmap.PAGESIZE * mmap.PAGESIZE
            if memory is not None and end > start:
                memory.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _compute_step(
        self, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], span: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        width, whole = self._width, (self._step, self._tokens, self._logits)
        self._step, self._tokens, self._logits = self._steps[width]
        try:
            return super()._compute_step(tokens[:width], lengths[:width], span[:, :width])
        finally:
            self._step, self._tokens, self._logits = whole


def _mapping(array: npt.NDArray[Any]) -> tuple[mmap.mmap | None, int]:
    """The anonymous memory behind an array, and where in it the array begins, in bytes; None: it is elsewhere."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return None, 0
    return base, array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data

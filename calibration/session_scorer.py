"""Logits of an exported artefact, through the runtime that will run it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime.session import Session
from attnspan.runtime.artefact import Artefact

__all__ = ["SessionScorer"]


class SessionScorer:
    """An artefact of target `cpu` or `hybrid`, on the CPU.

    Sequences are prefilled, with the spans of their whole length in force; with sampled heads, which attend to all of a prompt,
    only up to the first answer, and the tokens from there on are decode steps.
    """

    def __init__(self, folder: str | Path | Artefact, threads: int | None = None) -> None:
        """threads None: the physical cores this process may use. UserError when the folder is no artefact for CPUs."""
        self.session = Session(folder, threads=threads)

    def logits(self, tokens: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.float32]:
        """Logits [tokens - first, vocab] at positions first to the last; UserError beyond n_max."""
        self.session.reset()
        if not self.session.state_bytes:
            return self.session.prefill(0, tokens.tolist(), keep=len(tokens) - first)
        self.session.state.check_room(0, len(tokens))
        if first:
            self.session.prefill(0, tokens[:first].tolist())
        return np.concatenate([self.session.decode([token]) for token in tokens[first:]])

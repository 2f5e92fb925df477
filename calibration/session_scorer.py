"""Logits of an exported artefact, through the runtime that will run it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime.session import Session
from attnspan.runtime.artefact import Artefact

__all__ = ["SessionScorer"]


class SessionScorer:
    """An artefact of target `cpu`; each sequence is prefilled with the spans of its whole length in force."""

    def __init__(self, folder: str | Path | Artefact, threads: int | None = None) -> None:
        """threads None: the physical cores this process may use. UserError when the folder is no artefact for CPUs."""
        self.session = Session(folder, threads=threads)

    def logits(self, tokens: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.float32]:
        """Logits [tokens - first, vocab] at positions first to the last; UserError beyond n_max."""
        self.session.reset()
        return self.session.prefill(0, tokens.tolist(), keep=len(tokens) - first)

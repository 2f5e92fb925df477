"""One exact prompt for everybody: computed by the dense artefact, kept in a folder, put into the rows of any other artefact.

A folder a document: kv.npy, the cache as stored, [layers, 2 (key, value), kv_heads, tokens, head_dim]; for question i tail_i.npy,
the same for its prompt but the last token; true_i.npy, the dense model's log-probabilities at its answer, [answer, vocab].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from equal_bytes_documents import Document, Question

from attnspan.cpu_runtime.session import Session
from attnspan.planner.files import whole_folder

Array = npt.NDArray[Any]


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of each row, computed in fp64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)), np.float32)


@dataclass(frozen=True)
class Prompt:
    """A document that was computed."""

    document: Document
    folder: Path

    def context(self) -> Array:
        """[layers, 2, kv_heads, tokens, head_dim], mapped from its file."""
        return np.asarray(np.load(self.folder / "kv.npy", mmap_mode="r"))

    def tail(self, question: Question) -> Array:
        """Like `context`, of the question's prompt but its last token."""
        return np.asarray(np.load(self.folder / f"tail_{question.name}.npy"))

    def true(self, question: Question) -> npt.NDArray[np.float32]:
        """The dense model's log-probabilities of what follows, [answer, vocab]."""
        return np.asarray(np.load(self.folder / f"true_{question.name}.npy"))


def computed(session: Session, document: Document, folder: Path) -> Prompt:
    """The document's prompt and the dense answers to all its questions; from the folder where it is there already.

    session: the dense artefact's, with two rows.
    """
    prompt = Prompt(document, folder / document.name)
    if prompt.folder.is_dir():
        return prompt
    session.reset()
    session.prefill(0, document.tokens)
    length = len(document.tokens)
    with whole_folder(prompt.folder) as work:
        np.save(work / "kv.npy", _stored(session, 0, 0, length))
        for question in document.questions:
            session.fork(0, 1)
            asked = [*question.prompt, *question.answer[:-1]]
            logits = session.prefill(1, asked, keep=len(question.answer))
            np.save(work / f"tail_{question.name}.npy", _stored(session, 1, length, length + len(question.prompt) - 1))
            np.save(work / f"true_{question.name}.npy", log_softmax(logits))
    return prompt


def _stored(session: Session, row: int, start: int, end: int) -> Array:
    """What a row of the dense artefact holds of positions start to end, [layers, 2, kv_heads, tokens, head_dim]."""
    artefact = session.artefact
    views = [view for _, view in session._caches.views(row, end)]
    shape = (artefact.layers, 2, artefact.kv_heads)
    return np.stack([view[start:end] for view in views]).reshape(*shape, end - start, artefact.head_dim)


def fill(session: Session, row: int, prompt: Prompt, question: Question) -> None:
    """Let a row hold the document and the question's prompt but its last token: what the row's heads keep of them.

    Indexes begin empty: the next step makes them from the caches.
    """
    document, context, tail = prompt.document, prompt.context(), prompt.tail(question)
    tokens = [*document.tokens, *question.prompt[:-1]]
    parts = {part.name: part for part in session.artefact.parts}
    for name, array in zip(session._caches.names, session._caches.past, strict=True):
        kind, part = name.split(".", 1)
        if kind == "state":
            array[row] = 0
            continue
        first, of = 0, parts[part]
        for head, capacity in zip(of.heads, of.capacity, strict=True):
            slots = array[row, first : first + capacity]
            sources = [context[of.layer, :, head], tail[of.layer, :, head]]
            if kind == "kv":
                width = slots.shape[-1] // 2
                _place([x[0] for x in sources], slots[:, :width], of.sink)
                _place([x[1] for x in sources], slots[:, width:], of.sink)
            else:
                _place([x[int(kind == "value")] for x in sources], slots, of.sink)
            first += capacity
    session.state.restore(row, tokens, None, None)


def _place(parts: Sequence[Array], slots: Array, sink: int) -> None:
    """Write tokens [tokens, dim], given in parts one after another, where a ring keeps them: those that it still holds."""
    capacity, start = len(slots), 0
    total = sum(len(part) for part in parts)
    oldest = sink + max(total - capacity, 0)  # behind the sinks, the last capacity - sink are left
    for part in parts:
        end = start + len(part)
        spans = [(start, min(end, sink))] if total > capacity else [(start, end)]
        if total > capacity:
            spans.append((max(start, oldest), end))
        for low, high in spans:
            while low < high:
                slot = low if low < capacity else sink + (low - sink) % (capacity - sink)
                count = min(high - low, capacity - slot)
                slots[slot : slot + count] = part[low - start : low - start + count]
                low += count
        start = end

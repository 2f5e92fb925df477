"""Generation from text and conversations: tokenizer, chat template, streaming, second turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from attnspan.planner.errors import UserError
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.generate import Backend, Generation, OnProgress, generate
from attnspan.runtime.sampling import Sampling
from attnspan.runtime.tokenizer import StreamDecoder, Tokenizer

__all__ = ["OnText", "Prompt", "TextGenerator", "as_prompts"]

OnText = Callable[[int, str], None]
"""Called as (row, piece of text) as soon as a piece is complete."""
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Plain text, token ids, or the messages of a conversation."""


class TextGenerator:
    """Generates on a backend in terms of text, with the tokenizer of an artefact."""

    def __init__(self, backend: Backend, artefact: Artefact) -> None:
        self._backend = backend
        self._artefact = artefact

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when first needed: token ids do without one."""
        return Tokenizer(self._artefact.folder)

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
        """Generate one continuation a prompt, prompt r in row r.

        prompts: text (encoded as it is, with the tokenizer's BOS), token ids, or messages (through the chat
        template); one of them or a list. continue_ False: all rows start empty. continue_ True: the prompt
        follows what the row holds; messages are the whole conversation, of which the part that the row has
        already computed is not computed again. stop_tokens None: those of the model; an empty set: none.
        `text` of a Generation is None when ids were given to a model without a tokenizer.json.
        """
        state = self._backend.state
        rows = as_prompts(prompts)
        if not rows or len(rows) > state.batch:
            raise UserError(f"{len(rows)} prompts: the session takes 1 to {state.batch}; change its batch")
        if not continue_:
            state.reset()
        inputs, texts = [], []
        for row, prompt in enumerate(rows):
            ids, text = self._encode(row, prompt, continue_)
            inputs.append(ids)
            texts.append(text)
        wants_text = on_text is not None or not all(text is None for text in texts)
        spells = wants_text or (self._artefact.folder / "tokenizer.json").is_file()
        decoders = [StreamDecoder(self.tokenizer) for _ in rows] if spells else []
        pieces: list[list[str]] = [[] for _ in rows]

        def give(row: int, piece: str) -> None:
            if piece:
                pieces[row].append(piece)
                if on_text is not None:
                    on_text(row, piece)

        stop = self._artefact.stop_tokens if stop_tokens is None else stop_tokens
        results = generate(
            self._backend,
            inputs,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=stop,
            on_token=(lambda row, token: give(row, decoders[row].push(token))) if spells else None,
            on_progress=on_progress,
        )
        for row, result in enumerate(results):
            if spells:
                give(row, decoders[row].flush())
                result.text = "".join(pieces[row])
            before = texts[row]
            if before is not None:
                state.text[row] = before + self.tokenizer.decode(result.tokens, skip_special=False)
        return results

    def _encode(self, row: int, prompt: Prompt, continue_: bool) -> tuple[list[int], str | None]:
        """Tokens to append to a row, and the text the row then spells where that is known."""
        state = self._backend.state
        if isinstance(prompt, str):
            if continue_ and state.lengths[row]:
                held = state.text[row]
                return self.tokenizer.encode(prompt, special=False), None if held is None else held + prompt
            return self.tokenizer.encode(prompt), prompt
        if len(prompt) and isinstance(prompt[0], Mapping):
            full = self.tokenizer.render(prompt)  # type: ignore[arg-type]
            held = state.text[row]
            if held is not None and len(full) > len(held) and full.startswith(held):
                return self.tokenizer.encode(full[len(held) :], special=False), full
            # A new conversation, or a template that rewrote what was said: the cache cannot be cut back.
            state.reset([row])
            return self.tokenizer.encode(full, special=False), full
        return [int(token) for token in prompt], None  # type: ignore[arg-type]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, whether one was given or several."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    items = list(prompts)
    if not items:
        raise UserError("no prompt: give text, token ids or messages")
    if isinstance(items[0], int | np.integer | Mapping):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]

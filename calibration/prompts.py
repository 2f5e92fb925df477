"""From text to items: chat templates, exact lengths, where the answer's tokens are."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from attnspan.calibration.items import Item
from attnspan.calibration.tasks.base import Sample, Task
from attnspan.calibration.texts import TextSource
from attnspan.planner.errors import UserError

__all__ = ["Coder", "build_item", "encode_sample", "follow", "lead_tokens", "turns"]

SLACK = 8
"""Tokens that an item may be short of its length before its context is cut anew."""
TRIES = 6


class Coder(Protocol):
    """What is needed of a tokenizer; `attnspan.runtime.tokenizer.Tokenizer` has it."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; special: with what the tokenizer adds around a text."""
        ...

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """Text of tokens."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether `render` works."""
        ...

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation."""
        ...


def lead_tokens(coder: Coder) -> list[int]:
    """What the tokenizer puts before a text (BOS), without what it puts behind."""
    bare, full = coder.encode("x", special=False), coder.encode("x")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def follow(coder: Coder, text: str) -> list[int]:
    """Tokens of a text that goes on another (some tokenizers put a space before the first word of a text)."""
    anchor, both = coder.encode("x", special=False), coder.encode("x" + text, special=False)
    return both[len(anchor) :] if both[: len(anchor)] == anchor else coder.encode(text, special=False)


def turns(coder: Coder, questions: Sequence[str]) -> list[str]:
    """A conversation of so many questions, cut where the replies go: texts before the first, between them, not after the last."""
    mark = "\0reply\0"
    messages: list[dict[str, str]] = []
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": mark}]
    parts = coder.render(messages[:-1]).split(mark)
    if len(parts) != len(questions):
        raise UserError("the model's chat template leaves out what was said before; use --plain")
    return parts


def _encode(coder: Coder, context: str, question: str, reply: str, plain: bool) -> list[int]:
    if question and coder.has_chat_template and not plain:
        text = coder.render([{"role": "user", "content": f"{context}\n\n{question}"}]) + reply
        return coder.encode(text, special=False)
    if question:
        context, reply = f"{context}\n\n{question}", f"\n\n{reply}"
    return lead_tokens(coder) + coder.encode(context + reply, special=False)


def encode_sample(coder: Coder, sample: Sample, plain: bool = False) -> tuple[list[int], int]:
    """All tokens of a sample, and the position of the first token of its answer.

    Prompt and answer are encoded as one text, as a model sees text; the answer starts at the first token that is not the
    prompt's alone.
    """
    prompt = _encode(coder, sample.context, sample.question, sample.prefix, plain)
    full = _encode(coder, sample.context, sample.question, sample.prefix + sample.answer, plain)
    same = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return full, same


def build_item(
    task: Task, coder: Coder, source: TextSource, length: int, depth: float, seed: int, index: int = 0, plain: bool = False
) -> Item:
    """The item number `index` of a task at a length and depth; the same seed makes the same item.

    It has at most `length` tokens, the answer's included, and misses few. UserError when the length is too small for the task
    or no text is as long.
    """
    room, best = length, None
    for _ in range(TRIES):
        rng = np.random.default_rng([seed, zlib.crc32(task.name.encode()), length, round(depth * 1e6), index])
        sample = task.build(rng, source, room, depth)
        tokens, first = encode_sample(coder, sample, plain)
        missing = length - len(tokens)
        if missing >= 0 and (best is None or len(tokens) > len(best[0])):
            best = tokens, first, sample
        if 0 <= missing <= SLACK:
            break
        room += missing - (1 if missing < 0 else 0)
        if room < 1:
            break
    if best is None:
        raise UserError(f"length {length} is too short for the task {task.name!r}; change --lengths")
    tokens, first, sample = best
    if length - len(tokens) > length // 8:
        raise UserError(f"the task {task.name!r} fills {len(tokens)} tokens of length {length} at most; change --lengths")
    return Item(np.array(tokens), np.arange(first, len(tokens)), task.name, length, sample.depth)

"""What a task makes: a long context, something to answer about it, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from attnspan.calibration.texts import TextSource

__all__ = ["Build", "Sample", "Task", "digits", "hide"]


@dataclass(frozen=True)
class Sample:
    """One document with one answer, as text.

    question empty: the document goes on with `prefix` and the answer, as plain text. Otherwise the context and the question are
    what a user says (through the chat template where there is one), and the reply starts with `prefix`. Where a prefix ends in
    white space the answer is digits, which no tokenizer merges with it.
    """

    context: str
    question: str
    prefix: str
    answer: str
    depth: float | None = None


Build = Callable[[np.random.Generator, TextSource, int, float], Sample]
"""(random numbers, source of filler, tokens of context, depth 0 to 1) -> a sample with a context of about, and not above, so many
tokens."""


@dataclass(frozen=True)
class Task:
    """A task by its name; by_depth: whether the depth of the answer in the context can be chosen; scored: whether getting every
    token of the answer right means something (it does not where the answer is running text)."""

    name: str
    build: Build
    by_depth: bool = True
    scored: bool = True


def digits(rng: np.random.Generator, count: int) -> str:
    """A number of so many digits, the first not zero."""
    return str(rng.integers(10 ** (count - 1), 10**count))


def hide(source: TextSource, sentences: Sequence[str], hidden: Sequence[tuple[float, str]]) -> str:
    """The passage with each hidden sentence put behind the sentence that ends nearest to its depth (a share of the passage's
    tokens, 0 to 1); depth 0 is behind the first sentence, so that nothing hidden starts the text."""
    ends = np.cumsum([len(source.encode(sentence)) for sentence in sentences])
    places: list[list[str]] = [[] for _ in sentences]
    for depth, text in hidden:
        places[int(np.abs(ends - depth * ends[-1]).argmin())].append(text)
    return "".join(sentence + "".join(" " + text for text in place) for sentence, place in zip(sentences, places, strict=True))

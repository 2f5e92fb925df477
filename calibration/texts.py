"""Real long texts shipped with the package, and passages cut from them by tokens."""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable
from functools import cache, cached_property
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError

__all__ = ["CALIBRATION", "EVALUATION", "HELD_OUT", "TEXTS", "Encode", "TextSource", "load", "split_sentences"]

Encode = Callable[[str], list[int]]
"""Text to token ids, without BOS or EOS."""
CALIBRATION = ("moby_dick",)
"""Texts that calibration draws from; evaluation never does."""
HELD_OUT = ("northanger_abbey",)
"""Texts that plans are validated on."""
EVALUATION = ("persuasion",)
"""Texts that evaluation draws from; calibration and validation never do."""
TEXTS = CALIBRATION + HELD_OUT + EVALUATION

_ABBREVIATED = re.compile(r"(?:^|[\s(\"'])(?:Mr|Mrs|Dr|St|Capt|Col|Gen|Rev|Esq|Messrs|No|Vol|vol|viz|[A-Z])\.$")
# The end of a sentence: a stop, perhaps quotes or brackets after it, a space, then a capital, a digit or a quote.
_END = re.compile(r"[.!?][\"')\]]*(?=\s+[\"'(\[]?[A-Z0-9])")


@cache
def load(name: str) -> str:
    """A text of the package by its name; paragraphs are parted by an empty line."""
    if name not in TEXTS:
        raise UserError(f"no text is named {name!r}: must be one of {', '.join(TEXTS)}")
    data = files("attnspan.calibration").joinpath("data", f"{name}.txt.xz").read_bytes()
    return lzma.decompress(data).decode("utf-8")


def split_sentences(text: str) -> list[str]:
    """Sentences with the white space before them: joined they are the text."""
    out: list[str] = []
    for paragraph in re.findall(r"\s*\S.*(?:\n(?!\n).*)*", text):
        start = 0
        for match in _END.finditer(paragraph):
            if not _ABBREVIATED.search(paragraph[: match.end()][-12:]):
                out.append(paragraph[start : match.end()])
                start = match.end()
        out.append(paragraph[start:])
    return out


class TextSource:
    """Texts from which passages of a given number of tokens are cut, at the ends of sentences."""

    def __init__(self, encode: Encode, texts: list[str]) -> None:
        """`texts`: each passage comes from one of them, drawn by size."""
        self.encode = encode
        self._texts = [split_sentences(text) for text in texts]

    @classmethod
    def named(cls, encode: Encode, names: tuple[str, ...]) -> TextSource:
        """A source of texts of the package."""
        return cls(encode, [load(name) for name in names])

    @cached_property
    def _ends(self) -> list[npt.NDArray[np.int64]]:
        """Tokens up to the end of each sentence, by text."""
        return [np.cumsum([0] + [len(self.encode(sentence)) for sentence in text]) for text in self._texts]

    @property
    def longest(self) -> int:
        """Tokens of the longest text: no passage can be longer."""
        return max(int(ends[-1]) for ends in self._ends)

    def passage(self, rng: np.random.Generator, tokens: int) -> list[str]:
        """Consecutive sentences of about, and not above, so many tokens (counted sentence by sentence).

        All but the first are whole; the first lost words at its start where that was needed to come within a few tokens of the
        number. Joined they are the text of the passage. UserError when no text is long enough.
        """
        room = np.array([max(int(ends[-1]) - tokens, 0) for ends in self._ends], np.float64)
        if tokens < 1:
            raise UserError(f"the length is too short by {1 - tokens} tokens for what is hidden in the text; change --lengths")
        if not room.any():
            raise UserError(f"a passage of {tokens} tokens: the longest text has {self.longest}; change --lengths")
        which = int(rng.choice(len(room), p=room / room.sum()))
        sentences, ends = self._texts[which], self._ends[which]
        # The passage ends with the last sentence below a random token, and reaches back from there.
        last = int(np.searchsorted(ends, rng.integers(tokens, int(ends[-1]), endpoint=True), side="right")) - 1
        last = max(last, int(np.searchsorted(ends, tokens)))
        first = int(np.searchsorted(ends, int(ends[last]) - tokens))
        chosen = sentences[first:last]
        part = self._tail(sentences[first - 1], tokens - int(ends[last] - ends[first])) if first else ""
        chosen = [part, *chosen] if part else chosen
        if not chosen:
            raise UserError(f"{tokens} tokens are left for the text: no words of it are so short; change --lengths")
        return [chosen[0].lstrip(), *chosen[1:]]

    def _tail(self, sentence: str, tokens: int) -> str:
        """The most last words of a sentence that fit."""
        starts = [match.start() for match in re.finditer(r"\s+\S", sentence)]
        low, high = 0, len(starts)
        while low < high:
            middle = (low + high) // 2
            if len(self.encode(sentence[starts[middle] :])) <= tokens:
                high = middle
            else:
                low = middle + 1
        return sentence[starts[low] :] if low < len(starts) else ""

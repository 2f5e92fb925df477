"""Documents with many questions each: prose with facts hidden in it, and lists of words of which some appear often.

A question is asked behind its document, on its own: the tokens of the document are the same for all of them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from attnspan.calibration.prompts import Coder, follow, lead_tokens
from attnspan.calibration.tasks import frequency, multikey, needle
from attnspan.calibration.tasks.base import digits, hide
from attnspan.calibration.texts import EVALUATION, TextSource
from attnspan.planner.errors import UserError
from attnspan.planner.rules import check_int

KEYS = 6
"""Facts of one form ("The weight of the apple is ...") in a document, each of them asked for."""
DEPTHS = 5
"""Places of a pass key, by turns from the first sentence to the last."""
PROSE_TOKENS = 64
"""What is decoded of a text that goes on; also the room that is kept for questions."""
COMMON, RARE, RARE_TIMES = 3, 9, 3
"""Words of a list that are frequent; rare ones that each of them is compared with; how often a rare one appears."""
TOKENS_A_TIME = 68
"""A frequent word appears once in so many tokens of a list, whatever its length: 30 times in 2048."""
LIST = "Below is a list of words. Some appear more often than others. Memorize the ones that appear most often.\n\n"
MOST_OFTEN = "\n\nThe word that appears most often in the list above is"
LEAST = 512
"""Tokens of the shortest document."""
TASKS = ("passkey", "needle", "multikey", "prose", "frequency")
KINDS = {"passkey": "prose", "needle": "prose", "multikey": "prose", "prose": "prose", "frequency": "list"}
"""The kind of document that a task is asked about."""


@dataclass(frozen=True)
class Question:
    """prompt: tokens behind the document, the document's last one first, so that there is one at least; answer: tokens that are
    decoded; right: for task `frequency`, whether the answer is a frequent word, else True. depth: 0 to 1, or None."""

    task: str
    number: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    right: bool = True
    depth: float | None = None

    @property
    def name(self) -> str:
        """Unique within its document."""
        return f"{self.task}.{self.number}"


@dataclass(frozen=True)
class Document:
    """tokens: all but the last one of the context, which begins every question's prompt. length: the most that the context, a
    prompt and its answer have together."""

    kind: str
    length: int
    index: int
    tokens: tuple[int, ...]
    questions: tuple[Question, ...]

    @property
    def name(self) -> str:
        """Unique within a seed."""
        return f"{self.kind}-{self.length}-{self.index}"


def build(kind: str, coder: Coder, length: int, index: int, seed: int = 0) -> Document:
    """Document number `index` of a kind ("prose" or "list") and length in tokens; the same arguments make the same document."""
    check_int("length", length, LEAST, 2**30, "; change --lengths")
    source = TextSource.named(lambda text: coder.encode(text, special=False), EVALUATION)
    room = length - PROSE_TOKENS - 8
    while True:
        rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), length, index])
        context, asked = (_prose if kind == "prose" else _list)(rng, source, room, index)
        tokens = lead_tokens(coder) + coder.encode(context, special=False)
        questions = tuple(_question(coder, tokens[-1], *each) for each in asked)
        over = len(tokens) + max(len(q.prompt) - 1 + len(q.answer) for q in questions) - length
        if over <= 0:
            return Document(kind, length, index, tuple(tokens[:-1]), questions)
        room -= over


Asked = tuple[str, int, str, str, bool, float | None]
"""Task, number, prompt, answer, right, depth."""


def _prose(rng: np.random.Generator, source: TextSource, room: int, index: int) -> tuple[str, list[Asked]]:
    """A passage with a pass key, a sentence about San Francisco and KEYS facts in it, cut where a sentence ends."""
    depth, other = (i % DEPTHS / (DEPTHS - 1) for i in (index, index + 2))
    key = digits(rng, 5)
    attributes, things = rng.permutation(multikey.ATTRIBUTES)[:KEYS], rng.permutation(multikey.THINGS)[:KEYS]
    names = [f"{a} of the {t}" for a, t in zip(attributes, things, strict=True)]
    values = [digits(rng, 5) for _ in names]
    places = ((rng.permutation(KEYS) + rng.uniform(0, 1, KEYS)) / KEYS).tolist()
    hidden = [(depth, f"The pass key is {key}. Remember it. {key} is the pass key."), (other, needle.THING + needle.ANSWER)]
    for at, name, value in zip(places, names, values, strict=True):
        hidden.append((at, f"The {name} is {value}. Remember it: the {name} is {value}."))
    size = room - sum(len(source.encode(" " + text)) for _, text in hidden)
    sentences = source.passage(rng, size + 2 * PROSE_TOKENS)
    cut = len(sentences) - 1
    while cut > 1 and (
        len(source.encode("".join(sentences[cut:]))) < PROSE_TOKENS + 8 or len(source.encode("".join(sentences[:cut]))) > size
    ):
        cut -= 1
    asked: list[Asked] = [
        ("passkey", 0, "\n\nThe pass key is ", key, True, depth),
        ("needle", 0, f"\n\n{needle.THING}", needle.ANSWER, True, other),
        ("prose", 0, "", "".join(sentences[cut:]), True, None),
    ]
    for i, (at, name, value) in enumerate(zip(places, names, values, strict=True)):
        asked.append(("multikey", i, f"\n\nThe {name} is ", value, True, at))
    return hide(source, sentences[:cut], hidden), asked


def _list(rng: np.random.Generator, source: TextSource, room: int, index: int) -> tuple[str, list[Asked]]:
    """Made-up words, shuffled; frequent and rare ones are offered as the most frequent."""
    words = [a + b + c for a in frequency.ONSETS for b in frequency.MIDDLES for c in frequency.CODAS]
    words = [str(word) for word in rng.permutation(words)]
    order: list[tuple[float, str]] = []
    left, often, count = room - len(source.encode(LIST)), round(room / TOKENS_A_TIME), 0
    for count, word in enumerate(words):
        times = often if count < COMMON else RARE_TIMES
        left -= times * len(source.encode(f" {word},"))
        if left < 0:
            break
        order += [(rng.random(), word) for _ in range(times)]
    rare = rng.permutation(words[COMMON:count])[:RARE]
    if len(rare) < RARE:
        raise UserError(f"a list of {room} tokens has {len(rare)} rare words: {RARE} are needed; change --lengths")
    asked: list[Asked] = [
        ("frequency", i, MOST_OFTEN, f" {word}", i < COMMON, None) for i, word in enumerate([*words[:COMMON], *rare])
    ]
    return LIST + ", ".join(word for _, word in sorted(order)), asked


def _question(
    coder: Coder, last: int, task: str, number: int, prompt: str, answer: str, right: bool, at: float | None
) -> Question:
    """Prompt and answer are encoded as one text, as a model sees text."""
    before, both = follow(coder, prompt) if prompt else [], follow(coder, prompt + answer)
    if both[: len(before)] != before:
        raise ValueError(f"the tokenizer merges {prompt!r} with {answer!r}")
    return Question(task, number, (last, *before), tuple(both[len(before) :][:PROSE_TOKENS]), right, at)

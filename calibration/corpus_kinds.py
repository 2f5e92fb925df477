"""Documents whose end asks for what stands far back (facts hidden in prose, sentences, records), and plain prose.

Their wordings are not those of the evaluation tasks, so that a plan is never tested on the sentences it was made with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attnspan.calibration.tasks.base import digits, hide
from attnspan.calibration.texts import TextSource

__all__ = ["KINDS", "WEIGHTS", "Ask", "Document"]

FACTS = 6
COPIES = 4
RECORDS = (8, 24)
"""Fewest and most records of a list."""
ASKED_RECORDS = 4
PROSE_TOKENS = 256
WEIGHTS = {"prose": 2.0}
"""What a document counts in the losses; 1 if not here. Retrieval is so much more sensitive that prose would hardly be heard."""
COPY_WORDS, COPY_TOKENS = 8, 16
"""Words quoted of a sentence, and the most tokens asked for of what follows them."""


@dataclass(frozen=True)
class Ask:
    """One question: the reply starts with `stem`, the answer follows it.

    limit: the most tokens of the answer, None for those of `answer`; own: whether the model's own answer takes its place.
    """

    stem: str
    answer: str
    limit: int | None = None
    own: bool = True


@dataclass(frozen=True)
class Document:
    """A context and the questions asked at its end, one after the other; chat: whether they make sense as questions of a user."""

    context: str
    asks: tuple[Ask, ...]
    chat: bool = False


NAMES = (
    "Alice", "Bernard", "Clara", "Daniel", "Edith", "Felix", "Greta", "Harold", "Irene", "Jonas", "Kitty", "Lucas", "Martha",
    "Nelson", "Olga", "Patrick", "Quentin", "Rosa", "Simon", "Theresa", "Ulrich", "Vera", "Walter", "Yvonne",
)  # fmt: skip
THINGS = (
    "anchor", "barrel", "bell", "bottle", "bridge", "cabin", "carriage", "chest", "church", "clock", "compass", "curtain", "desk",
    "drawer", "gate", "harbour", "ladder", "ledger", "lighthouse", "map", "oven", "piano", "portrait", "rope", "statue", "stove",
    "suitcase", "tower", "trumpet", "wagon",
)  # fmt: skip
WORDS = (
    "acorn", "autumn", "bishop", "butter", "castle", "cherry", "copper", "daisy", "dragon", "eagle", "falcon", "forest", "ginger",
    "hazel", "ivory", "jasmine", "lemon", "marble", "meadow", "ocean", "olive", "pepper", "raven", "ribbon", "river", "saffron",
    "silver", "thunder", "tiger", "velvet", "walnut", "winter",
)  # fmt: skip
NUMBERED = (
    "{name}'s ticket bears the number",
    "The {thing} can only be opened with the code",
    "On the back of the {thing} {name} found the figure",
    "The telephone of {name} answers to",
    "The {thing} was sold to {name} for guineas numbering",
    "In the register the {thing} is entered under",
    "{name} wrote down how many steps lead to the {thing}:",
    "The account that {name} keeps for the {thing} stands at",
)
WORDED = (
    "The secret word of {name} is",
    "On the {thing} there is painted a single word,",
    "{name} named the new {thing}",
    "To be let in, {name} has to say",
    "The favourite thing of {name} is",
    "Inside the {thing} lies nothing but",
)
TAILS = ("", "", " Remember it.", " Do not forget this.", " Keep it in mind: {answer}.", " {answer} it is, and nothing else.")


def facts(rng: np.random.Generator, source: TextSource, tokens: int) -> Document:
    """Prose with six facts in it, numbers and words, all asked for in another order."""
    names, things = rng.permutation(NAMES), rng.permutation(THINGS)
    words = rng.permutation(WORDS)
    wordings = [*rng.permutation(NUMBERED)[: FACTS - 2], *rng.permutation(WORDED)[:2]]
    asks, needles = [], []
    for i, wording in enumerate(wordings):
        stem = str(wording).format(name=names[i], thing=things[i])
        numbered = i < FACTS - 2
        answer = digits(rng, int(rng.integers(3, 8))) if numbered else str(words[i])
        tail = str(rng.choice(TAILS)).format(answer=answer)
        # Digits stand alone behind a space; a word has its space in its token.
        asks.append(Ask(stem + " ", answer) if numbered else Ask(stem, " " + answer))
        needles.append(f"{stem} {answer}.{tail}")
    depths = rng.uniform(0, 1, FACTS)
    order = rng.permutation(FACTS)
    passage = source.passage(rng, tokens - sum(len(source.encode(" " + needle)) for needle in needles))
    context = hide(source, passage, list(zip(depths.tolist(), needles, strict=True)))
    return Document(context, tuple(asks[i] for i in order), chat=True)


def copies(rng: np.random.Generator, source: TextSource, tokens: int) -> Document:
    """Prose, then the first words of some of its sentences: what came after them?"""
    passage = source.passage(rng, tokens)
    long = [i for i, sentence in enumerate(passage[1:-1], 1) if len(sentence.split()) >= 2 * COPY_WORDS]
    asks = []
    for i in rng.permutation(np.array(long, np.int64))[:COPIES]:
        words = passage[int(i)].split()
        rest = " " + " ".join(words[COPY_WORDS:])
        asks.append(Ask(" ".join(words[:COPY_WORDS]), rest, COPY_TOKENS))
    return Document("".join(passage), tuple(asks))


def records(rng: np.random.Generator, source: TextSource, tokens: int) -> Document:
    """Prose with a list of records in it, `name, thing: number`, and the beginnings of some of them."""
    count = int(rng.integers(*RECORDS, endpoint=True))
    pairs = rng.permutation([(name, thing) for name in NAMES for thing in THINGS])[:count]
    values = [(f"{name}, {thing}: ", digits(rng, 4)) for name, thing in pairs]
    table = "\n\n" + "\n".join(stem + value for stem, value in values) + "\n\n"
    depth, asked = float(rng.uniform(0, 1)), rng.permutation(count)[:ASKED_RECORDS]
    context = hide(source, source.passage(rng, tokens - len(source.encode(table))), [(depth, table)])
    return Document(context, tuple(Ask(*values[int(i)]) for i in asked))


def prose(rng: np.random.Generator, source: TextSource, tokens: int) -> Document:
    """Prose that goes on. Its own words are the supervision: greedy continuations of small models run in circles."""
    words = "".join(source.passage(rng, tokens + PROSE_TOKENS)).split(" ")
    end = len(words)
    while end > 1 and len(source.encode(" " + " ".join(words[end:]))) < PROSE_TOKENS:
        end -= 1
    return Document(" ".join(words[:end]), (Ask("", " " + " ".join(words[end:]), PROSE_TOKENS, own=False),))


KINDS: dict[str, Callable[[np.random.Generator, TextSource, int], Document]] = {
    "facts": facts,
    "copies": copies,
    "records": records,
    "prose": prose,
}
"""(random numbers, source of filler, tokens of context) -> a document."""

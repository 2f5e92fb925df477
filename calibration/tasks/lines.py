"""LongEval: a record of many lines, each with a random number; the number of one line is asked for."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np

from attnspan.calibration.tasks.base import Sample, Task
from attnspan.calibration.texts import TextSource
from attnspan.planner.errors import UserError

HEAD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain "
    "line index. Now the record start:\n\n"
)
QUESTION = "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number."
HIGHEST = 50_000


@cache
def word_lists() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(first words: adjectives, verbs and nouns by turns; nouns) of the package wonderwords."""
    try:
        folder = files("wonderwords.assets")
    except ModuleNotFoundError:
        raise UserError("the task 'lines' needs wonderwords: pip install attnspan[calibrate], or change --tasks") from None
    names = ("adjectivelist", "verblist", "nounlist")
    adjectives, verbs, nouns = (tuple(folder.joinpath(f"{name}.txt").read_text("utf-8").split()) for name in names)
    return adjectives + verbs + nouns, nouns


def record(rng: np.random.Generator, source: TextSource, tokens: int) -> list[tuple[str, int]]:
    """Line indices, all different, and their numbers: as many lines as fit in so many tokens."""
    first, nouns = word_lists()
    out: dict[str, int] = {}
    used = 0
    while True:
        key = f"{first[rng.integers(len(first))]}-{nouns[rng.integers(len(nouns))]}"
        value = int(rng.integers(1, HIGHEST, endpoint=True))
        if key in out:
            continue
        used += len(source.encode(_line(key, value)))
        if used > tokens:
            return list(out.items())
        out[key] = value


def _line(key: str, value: int) -> str:
    return f"line {key}: REGISTER_CONTENT is <{value}>\n"


def build(rng: np.random.Generator, source: TextSource, tokens: int, depth: float) -> Sample:
    """As LongEval asks, but that no line index appears twice; the reply is begun with the words of its reference answer."""
    room = tokens - len(source.encode(HEAD))
    lines = record(rng, source, room) if room > 0 else []
    if not lines:
        raise UserError(f"a record in {tokens} tokens has no line; change --lengths")
    key, value = lines[round(depth * (len(lines) - 1))]
    context = HEAD + "".join(_line(*line) for line in lines).rstrip("\n")
    return Sample(context, QUESTION.format(key=key), f"The <REGISTER_CONTENT> in line {key} is <", str(value), depth)


TASK = Task("lines", build)

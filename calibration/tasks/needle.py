"""Needle in a haystack: one odd sentence in English prose, and a question about it."""

from __future__ import annotations

import numpy as np

from attnspan.calibration.tasks.base import Sample, Task, hide
from attnspan.calibration.texts import TextSource

QUESTION = "What is the best thing to do in San Francisco?"
THING = "The best thing to do in San Francisco is eat"
ANSWER = " a sandwich and sit in Dolores Park on a sunny day."


def build(rng: np.random.Generator, source: TextSource, tokens: int, depth: float) -> Sample:
    """The needle of the usual benchmark; the reply is begun with the words of the needle, up to
    where "is to eat" would be as good an answer."""
    needle = THING + ANSWER
    passage = source.passage(rng, tokens - len(source.encode(" " + needle)))
    return Sample(hide(source, passage, [(depth, needle)]), QUESTION, THING, ANSWER, depth)


TASK = Task("needle", build)

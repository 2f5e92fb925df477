"""Passkey: a number hidden in English prose, asked for at the end."""

from __future__ import annotations

import numpy as np

from attnspan.calibration.tasks.base import Sample, Task, digits, hide
from attnspan.calibration.texts import TextSource


def build(rng: np.random.Generator, source: TextSource, tokens: int, depth: float) -> Sample:
    """A document that goes on with "The pass key is " and the five digits said once in it."""
    key = digits(rng, 5)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    passage = source.passage(rng, tokens - len(source.encode(" " + needle)))
    return Sample(hide(source, passage, [(depth, needle)]), "", "\n\nThe pass key is ", key, depth)


TASK = Task("passkey", build)

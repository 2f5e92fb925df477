"""Multi-key retrieval (RULER): several alike needles in English prose, one of which is asked for."""

from __future__ import annotations

import numpy as np

from attnspan.calibration.tasks.base import Sample, Task, digits, hide
from attnspan.calibration.texts import TextSource

KEYS = 4
ATTRIBUTES = ("weight", "price", "age", "height", "code", "score", "rank", "length", "depth", "speed", "value", "distance")
THINGS = (
    "apple", "basket", "candle", "diamond", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle", "lantern",
    "mirror", "needle", "orange", "pillow", "rabbit", "saddle", "table", "umbrella", "violin", "window", "yacht", "zebra",
)  # fmt: skip
PATTERN = r"The (\w+ of the \w+) is (\d+)\. Remember it: the \1 is \2\."
"""What a needle looks like."""


def build(rng: np.random.Generator, source: TextSource, tokens: int, depth: float) -> Sample:
    """Four numbers of different things; the one at the depth asked for is the answer, the others lie anywhere.

    Each is said twice, and no two share a word, so that a model of 135M parameters can tell them apart: with needles that differ
    in one word ("the magic number of ...") it gets every fourth wrong even when it sees everything.
    """
    keys = [f"{a} of the {t}" for a, t in zip(rng.permutation(ATTRIBUTES)[:KEYS], rng.permutation(THINGS)[:KEYS], strict=True)]
    values = [digits(rng, 5) for _ in keys]
    needles = [f"The {key} is {value}. Remember it: the {key} is {value}." for key, value in zip(keys, values, strict=True)]
    depths = [depth, *rng.uniform(0, 1, KEYS - 1).tolist()]
    passage = source.passage(rng, tokens - sum(len(source.encode(" " + needle)) for needle in needles))
    context = hide(source, passage, list(zip(depths, needles, strict=True)))
    return Sample(context, "", f"\n\nThe {keys[0]} is ", values[0], depth)


TASK = Task("multikey", build)

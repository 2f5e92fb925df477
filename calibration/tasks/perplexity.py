"""Perplexity of plain long English: every token from some position on is predicted."""

from __future__ import annotations

import re
from bisect import bisect_left

import numpy as np

from attnspan.calibration.tasks.base import Sample, Task
from attnspan.calibration.texts import TextSource

MOST = 1024
"""Tokens predicted: the last half, but no more than these; their logits have to fit in memory."""


def build(rng: np.random.Generator, source: TextSource, tokens: int, depth: float) -> Sample:
    """A passage whose end is the answer. The depth means nothing."""
    text = "".join(source.passage(rng, tokens))
    starts = [match.start() for match in re.finditer(r"\s+\S", text)]
    wanted = min(tokens // 2, MOST)
    cut = bisect_left(starts, -wanted, key=lambda start: -len(source.encode(text[start:])))
    start = starts[min(cut, len(starts) - 1)]
    return Sample(text[:start], "", "", text[start:])


TASK = Task("perplexity", build, by_depth=False, scored=False)

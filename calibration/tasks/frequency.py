"""Word frequency (RULER, common words extraction): a long list of words; which appear most often?"""

from __future__ import annotations

import numpy as np

from attnspan.calibration.tasks.base import Sample, Task
from attnspan.calibration.texts import TextSource

COMMON, TIMES = 3, 10
"""Words that are asked for, and how many times as often as all others they appear."""
RARE_TIMES = 2
QUESTION = "What are the three words that appear most often in the list above?"
ONSETS = ("b", "br", "c", "cr", "d", "dr", "f", "fl", "g", "gr", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t", "tr")
MIDDLES = ("a", "e", "i", "o", "u", "ai", "ea", "oo")
CODAS = ("b", "ck", "d", "ff", "g", "l", "m", "n", "nd", "nt", "p", "r", "rk", "rt", "sh", "st", "t", "x")


def build(rng: np.random.Generator, source: TextSource, tokens: int, depth: float) -> Sample:
    """Three made-up words ten times each, the others twice, shuffled and numbered; the most frequent are the answer, in the order
    of their first appearance. The depth means nothing."""
    vocabulary = [a + b + c for a in ONSETS for b in MIDDLES for c in CODAS]
    words = [str(word) for word in rng.permutation(vocabulary)]
    order, ranks = [], rng.random(len(words) * TIMES)
    used = 0
    for i, word in enumerate(words):
        times = TIMES if i < COMMON else RARE_TIMES
        used += times * len(source.encode(f" 1000. {word}"))
        if used > tokens:
            break
        order += [(ranks[i * TIMES + k], word) for k in range(times)]
    order.sort()
    common = list(dict.fromkeys(word for _, word in order if word in words[:COMMON]))
    context = "Below is a numbered list of words. Some appear more often than others. Memorize the ones that appear most often.\n"
    context += " ".join(f"{i}. {word}" for i, (_, word) in enumerate(order, 1))
    return Sample(context, QUESTION, "The three words that appear most often in the list are:", " " + ", ".join(common))


TASK = Task("frequency", build, by_depth=False)

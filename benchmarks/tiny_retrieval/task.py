"""The retrieval task: documents of key lines in filler text, with questions about the keys at the end.

A document is BOS, then runs of filler with a line `LINE key value` after each, then questions `QUERY key value`. Every key has
one line, and every question asks for another key, so that its answer can only be read from that line. Fillers follow a fixed
Markov chain that depends on the last topic token: they keep local and middle-range heads busy. There is no text: all are ids.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

VOCABULARY = 640
PAD, BOS, LINE, QUERY = range(4)
TOPICS = range(8, 12)
FILLERS = range(16, 64)
VALUES = range(64, 128)
KEYS = range(128, 640)

TOPIC_CHANCE = 0.35  # of a new topic token before a run of filler
SUCCESSOR_ODDS = (0.7, 0.15, 0.1, 0.05)
_CHAIN_SEED = 20  # part of the task: another seed is another language


def successors() -> NDArray[np.int64]:
    """The Markov chain of the fillers: `[topics, fillers, 4]` filler tokens, likeliest first, with odds SUCCESSOR_ODDS."""
    rng = np.random.default_rng(_CHAIN_SEED)
    shape = (len(TOPICS), len(FILLERS))
    chain = [rng.permutation(len(FILLERS))[: len(SUCCESSOR_ODDS)] + FILLERS.start for _ in range(shape[0] * shape[1])]
    return np.array(chain, dtype=np.int64).reshape(*shape, len(SUCCESSOR_ODDS))


_CHAIN = successors().tolist()


def document(
    rng: np.random.Generator, tokens: int, queries: int, filler_mean: int, keys_in_use: int = len(KEYS)
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One document of exactly `tokens` tokens, and the positions of its answers.

    Args:
        rng: decides everything; the same state gives the same document.
        tokens: length n, at least 1 + 6 * queries.
        queries: number q of questions, at most `keys_in_use`.
        filler_mean: mean length of a run of filler, in tokens; lengths are uniform in 0..2 * filler_mean. What is left
            before the questions is filler too.
        keys_in_use: the document's keys are drawn from that many of the 512.

    Returns:
        tokens int64 `[n]`, and targets int64 `[q]`, the positions of the values after `QUERY key`: the logits one position
        earlier predict them.

    Raises:
        ValueError: the questions and their lines do not fit.
    """
    if not 0 < queries <= keys_in_use <= len(KEYS) or tokens < 1 + 6 * queries:
        raise ValueError(
            f"{queries} queries in {tokens} tokens with {keys_in_use} keys: must be at least 1 query, a key of at most "
            f"{len(KEYS)} for each, and 6 tokens for each and one more"
        )
    keys = rng.permutation(keys_in_use) + KEYS.start
    values = rng.integers(VALUES.start, VALUES.stop, keys_in_use)
    out = [BOS]
    filler = _Filler(rng, tokens)
    end = tokens - 3 * queries
    lines = 0
    while end - len(out) >= 3 and lines < keys_in_use:
        spare = end - len(out) - 3 * max(queries - lines, 1)  # what leaves room for a line of every question
        filler.run(out, min(int(rng.integers(0, 2 * filler_mean + 1)), spare))
        out += [LINE, int(keys[lines]), int(values[lines])]
        lines += 1
    filler.run(out, end - len(out))
    for line in rng.permutation(lines)[:queries]:
        out += [QUERY, int(keys[line]), int(values[line])]
    return np.array(out, dtype=np.int64), np.arange(end + 2, tokens, 3, dtype=np.int64)


class _Filler:
    """Writes runs of filler; topic and chain go on from one run to the next."""

    def __init__(self, rng: np.random.Generator, most: int) -> None:
        self.rng = rng
        self.topic = int(rng.integers(len(TOPICS)))
        self.last = int(rng.integers(len(FILLERS)))
        # Drawn in one go: a call of the generator for every token would cost more than the rest together.
        self.choices = iter(rng.choice(len(SUCCESSOR_ODDS), size=most, p=SUCCESSOR_ODDS).tolist())

    def run(self, out: list[int], length: int) -> None:
        """Append `length` tokens: perhaps a topic token first, then fillers."""
        if length > 1 and self.rng.random() < TOPIC_CHANCE:
            self.topic = int(self.rng.integers(len(TOPICS)))
            out.append(TOPICS[self.topic])
            length -= 1
        for _ in range(length):
            token = _CHAIN[self.topic][self.last][next(self.choices)]
            out.append(token)
            self.last = token - FILLERS.start

"""How well one method answers one item, and summaries of many: accuracy with its confidence interval, loss, KL, agreement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.calibration.items import Item
from attnspan.planner.errors import UserError

__all__ = ["Score", "Summary", "score", "summarise", "wilson"]

ROWS = 64
"""Rows of logits widened to fp64 at a time."""
Z = 1.959963984540054
"""Standard deviations of a 95 % interval."""
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """One method on one item.

    correct: every answer token is the most likely one, which is what greedy decoding would have written; nll: mean over answer
    tokens, in nats; kl: mean of KL(dense || method), in nats; top1: share of answer tokens where method and dense agree on the
    most likely one. kl and top1 are None where there was no dense model to compare with.
    """

    correct: bool
    tokens: int
    nll: float
    kl: float | None = None
    top1: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The score as a JSON object."""
        return asdict(self)


def answer_logits(logits: Logits, item: Item) -> Logits:
    """Those of the logits [positions from item.first on, vocab] that predict an answer token: [targets, vocab]."""
    expected = len(item.tokens) - item.first
    if len(logits) != expected:
        raise ValueError(f"got logits of {len(logits)} positions: must be {expected}")
    return logits[item.targets - 1 - item.first]


def score(logits: Logits, item: Item, dense: Logits | None, name: str) -> Score:
    """Score logits [targets, vocab] of answer tokens, against the dense model's if there are any. UserError when not finite."""
    wanted = item.tokens[item.targets]
    if int(wanted.max()) >= logits.shape[1]:
        raise UserError(f"token {int(wanted.max())} is not in the vocabulary ({logits.shape[1]}) of {name!r}: another tokenizer?")
    nll = kl = 0.0
    right = same = 0
    for first in range(0, len(wanted), ROWS):
        some = slice(first, first + ROWS)
        ours = _log_softmax(logits[some])
        nll -= float(ours[np.arange(len(ours)), wanted[some]].sum())
        choice = ours.argmax(1)
        right += int((choice == wanted[some]).sum())
        if dense is not None:
            theirs = _log_softmax(dense[some])
            kl += float((np.exp(theirs) * (theirs - ours)).sum())
            same += int((choice == theirs.argmax(1)).sum())
    count = len(wanted)
    if not math.isfinite(nll) or not math.isfinite(kl):
        raise UserError(f"{name!r} computes logits that are no numbers on item {item.id} ({item.kind}, {item.length} tokens); "
                        "try --dtype fp32")  # fmt: skip
    against = (None, None) if dense is None else (max(kl / count, 0.0), same / count)
    return Score(right == count, count, nll / count, *against)


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    x -= np.log(np.exp(x).sum(1, keepdims=True))
    return x


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson's score interval)."""
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"{right} right of {count}")
    share, z2 = right / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclass(frozen=True)
class Summary:
    """Many scores of one method: n items; accuracy and its 95 % interval (None for tasks that are not scored so); nll and ppl per
    answer token, over all tokens; kl and top1 likewise (None without a dense model)."""

    n: int
    accuracy: float | None
    low: float | None
    high: float | None
    nll: float
    ppl: float
    kl: float | None
    top1: float | None

    def to_dict(self) -> dict[str, Any]:
        """The summary as a JSON object."""
        return asdict(self)


def summarise(scores: Iterable[Mapping[str, Any]], scored: bool = True) -> Summary:
    """Summary of scores (as `Score.to_dict` writes them), one at least; scored: whether `correct` means something."""
    rows = list(scores)
    count = len(rows)
    weights = np.array([row["tokens"] for row in rows], np.float64)
    right = sum(bool(row["correct"]) for row in rows)
    low, high = wilson(right, count)

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows]
        return None if None in values else float(np.average(values, weights=weights))

    nll = mean("nll")
    assert nll is not None
    ppl = math.exp(min(nll, 700.0))
    if scored:
        return Summary(count, right / count, low, high, nll, ppl, mean("kl"), mean("top1"))
    return Summary(count, None, None, None, nll, ppl, mean("kl"), mean("top1"))

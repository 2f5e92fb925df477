"""What sampling does to the steps of one KV head: the mathematics, in NumPy.

A step's query weighs key j with w_j and puts out o = sum w V. What is drawn gives o + d instead, d at random; with the gradient
g of the loss in o, the loss changes by g . d to first order, and the model's answer by (g . d)^2 / 2 nats of KL divergence to
second order (Fisher). Both are sums over keys of d_j (g . V_j - g . o).

Sketches draw keys independently with probabilities that are known: a key that is missed takes w / (1 - w) of itself away, a drawn
one adds (w/p - w) / (1 + w/p - w). The expectation of (g . d)^2 is then the sum over keys of their own: no draw has to be made.
Hashes draw keys that are alike together: they are drawn as they would be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime.bench_lsh_draw import SignatureDraw, TablesDraw
from attnspan.cpu_runtime.bench_lsh_sketch import (
    BINS,
    GROUP,
    LEAST_SHARE,
    LEVELS,
    OFFSET_GROUPS,
    RANGE,
    SHARPNESS,
    rotation,
    sketches,
)
from attnspan.planner.lsh import inclusion, projection_of
from attnspan.planner.rules import SINK, LshParams

__all__ = ["Steps", "Tally", "log_inclusion", "tally"]

Floats = npt.NDArray[np.float32]
Result = npt.NDArray[np.float64]

NEARLY_ONE = 1 - 1e-6
"""Most of its softmax that a key is taken to weigh when it is missed."""
BISECTIONS = 24


@dataclass(frozen=True)
class Steps:
    """Decode steps of the query heads of one KV head.

    query, gradient [group, steps, dim]; key, value [tokens, dim]; position [steps]: where each step stands, rising; it sees the
    keys up to itself. scale multiplies the scores.
    """

    query: Floats
    gradient: Floats
    key: Floats
    value: Floats
    position: npt.NDArray[np.int64]
    scale: float


@dataclass(frozen=True)
class Tally:
    """By candidate, means over steps, float64 [candidates]. loss: (g . d)^2 / 2; error: |d|^2 / |o|^2; share: of the keys that
    are sampled, those that any query head of the group draws; read: bytes of the index for each sampled key."""

    loss: Result
    error: Result
    share: Result
    read: Result


class _Exact:
    """Everything about the steps that does not depend on what is drawn; Q = group * steps, the group first."""

    def __init__(self, steps: Steps) -> None:
        self.group, self.count, dim = steps.query.shape
        self.query, gradient = steps.query.reshape(-1, dim), steps.gradient.reshape(-1, dim)
        self.key, self.value, self.scale, self.position = steps.key, steps.value, steps.scale, steps.position
        self.age = np.tile(steps.position, self.group)[:, None] - np.arange(len(steps.key))  # [Q, tokens]
        score = np.where(self.age >= 0, (self.query @ steps.key.T) * np.float32(steps.scale), np.float32(-np.inf))
        self.weight = np.exp(score - score.max(1, keepdims=True))
        self.weight /= self.weight.sum(1, keepdims=True)
        self.gradient = gradient
        self.output = self.weight @ steps.value
        self.size = np.maximum((self.output.astype(np.float64) ** 2).sum(1), 1e-30)
        pull = gradient @ steps.value.T - (gradient * self.output).sum(1)[:, None]
        self.pull = pull * pull  # (g . V_j - g . o)^2
        apart = (steps.value**2).sum(1) - 2 * (self.output @ steps.value.T) + (self.output**2).sum(1)[:, None]
        self.apart = np.maximum(apart, 0)  # |V_j - o|^2
        # What is centred is what the index would have held at the first step.
        self.mean = steps.key[SINK : max(int(steps.position[0]) + 1 - GROUP, SINK + 1)].mean(0, dtype=np.float64)
        self.centred = steps.key - self.mean.astype(np.float32)

    def sampled(self, window: int) -> npt.NDArray[np.bool_]:
        """Which keys of a step are not exact: neither sinks nor the last `window`. [Q, tokens]"""
        mask: npt.NDArray[np.bool_] = self.age >= window
        mask[:, :SINK] = False
        return mask


def tally(steps: Steps, candidates: Sequence[LshParams]) -> Tally:
    """Measure candidates on the steps of one KV head; equal `window` and `index` share most of the work. Memory: a few arrays of
    [group * steps, tokens]."""
    exact = _Exact(steps)
    out = np.zeros((4, len(candidates)))
    order = sorted(range(len(candidates)), key=lambda i: (candidates[i].index, candidates[i].signature_bits or 0))
    measure = {"sketch": _sketched, "signature": _signed, "tables": _hashed}
    for index, members in groupby(order, key=lambda i: candidates[i].index):
        found = list(members)
        for i, each in zip(found, measure[index](exact, [candidates[i] for i in found]), strict=True):
            out[:, i] = each
    return Tally(*out)


Row = tuple[float, float, float, float]


def log_inclusion(exact_query: Floats, centred: Floats, params: Sequence[LshParams], scale: float, last: int) -> Iterator[Floats]:
    """log p of all keys [Q, tokens] for each of several sketches that differ in `fraction`; last: end of the keys that the
    offsets are found from."""
    from attnspan.planner.lsh import signs

    turn = rotation(signs(centred.shape[1], params[0].seed))
    level, factor = sketches(centred, turn)
    y = SHARPNESS * (((exact_query * np.float32(scale)) @ turn) @ (LEVELS[level] * factor[:, None]).T)
    begin = -(-SINK // GROUP)
    groups = max(last // GROUP - begin, 1)
    few = min(groups, OFFSET_GROUPS)
    some = begin + np.arange(few) * groups // few
    seen = y[:, (some[:, None] * GROUP + np.arange(GROUP)).ravel()]
    for each in params:
        assert each.fraction is not None
        floor = LEAST_SHARE * each.fraction
        y_c = y + _offsets(seen, each.fraction * seen.shape[1], floor)[:, None]
        yield np.clip(y_c, np.float32(np.log(floor)), np.float32(0))


def _offsets(y: Floats, wanted: float, floor: float) -> Floats:
    """For each row of y [Q, keys], c such that the sum of min(1, max(floor, e^(y + c))) is about `wanted`, from a histogram."""
    top = y.max(1, keepdims=True)
    at = np.minimum((top - y) * np.float32(BINS / RANGE), np.float32(BINS - 1)).astype(np.int64)
    count = np.bincount((at + BINS * np.arange(len(y))[:, None]).ravel(), minlength=BINS * len(y)).reshape(len(y), BINS)
    weight = np.exp(-(np.arange(BINS) + 0.5) * (RANGE / BINS))
    low, high = np.full(len(y), -10.0), np.full(len(y), RANGE + 10)
    for _ in range(BISECTIONS):
        c = (low + high) / 2
        few = (count * np.clip(weight * np.exp(c)[:, None], floor, 1)).sum(1) < wanted
        low, high = np.where(few, c, low), np.where(few, high, c)
    return np.asarray((low + high) / 2 - top[:, 0], np.float32)


def _sketched(exact: _Exact, params: Sequence[LshParams]) -> list[Row]:
    """Expectations, from the probabilities that sketches draw keys with."""
    missed = (exact.weight / (1 - np.minimum(exact.weight, np.float32(NEARLY_ONE)))) ** 2
    fractions = list(dict.fromkeys((p.fraction, p.seed) for p in params))
    kinds = [next(p for p in params if (p.fraction, p.seed) == kind) for kind in fractions]
    found: dict[tuple[float | None, int, int], Row] = {}
    windows = sorted({p.window for p in params})
    masks = {window: exact.sampled(window) for window in windows}
    last = int(exact.position[0]) + 1 - windows[0]
    read = -(-exact.key.shape[1] // 4) + 2.0
    # One pass for each seed: the rotation is the same.
    for seed in dict.fromkeys(p.seed for p in kinds):
        of_seed = [p for p in kinds if p.seed == seed]
        for p, log_p in zip(of_seed, log_inclusion(exact.query, exact.centred, of_seed, exact.scale, last), strict=True):
            chance = np.exp(log_p)
            raised = exact.weight / chance
            more = raised - exact.weight
            square = (1 - chance) * missed + chance * (more / (1 + more)) ** 2
            none = (1 - chance).reshape(exact.group, exact.count, -1).prod(0)  # drawn by no head of the group
            for window in windows:
                mask = masks[window]
                these = np.where(mask, square, 0)
                loss = np.einsum("qt,qt->q", these, exact.pull, dtype=np.float64) / 2
                error = np.einsum("qt,qt->q", these, exact.apart, dtype=np.float64) / exact.size
                keys = mask[: exact.count].sum()
                share = (1 - none)[mask[: exact.count]].sum() / max(keys, 1)
                # Heads of a group draw apart: their squares add.
                summed = loss.reshape(exact.group, -1).sum(0).mean()
                found[p.fraction, seed, window] = (float(summed), float(error.mean()), float(share), read)
    return [found[p.fraction, p.seed, p.window] for p in params]


def _signed(exact: _Exact, params: Sequence[LshParams]) -> list[Row]:
    """By the signatures of the plan's own projection."""
    out: list[Row] = []
    cosine = _cosines(exact)
    known: dict[tuple[int | None, int], npt.NDArray[np.uint16]] = {}
    for p in params:
        assert p.signature_bits is not None
        assert p.max_hamming is not None
        if (p.signature_bits, p.seed) not in known:
            draw = SignatureDraw(_projection(p, exact), [0])
            draw.index(0, exact.centred)
            known[p.signature_bits, p.seed] = draw.distances(exact.query)
        drawn = (known[p.signature_bits, p.seed] <= p.max_hamming) & exact.sampled(p.window)
        out.append((*_drawn(exact, p, drawn, cosine), p.signature_bits / 8))
    return out


def _hashed(exact: _Exact, params: Sequence[LshParams]) -> list[Row]:
    """By the tables of the plan's own projection; what a step reads of them is counted."""
    out: list[Row] = []
    cosine = _cosines(exact)
    known: dict[LshParams, tuple[npt.NDArray[np.bool_], float]] = {}
    for p in params:
        kind = LshParams("tables", 1, bits=p.bits, tables=p.tables, min_collisions=p.min_collisions, seed=p.seed)
        if kind not in known:
            assert p.bits is not None
            assert p.tables is not None
            assert p.min_collisions is not None
            draw = TablesDraw(_projection(p, exact), p.bits, p.tables, p.min_collisions)
            draw.index(0, exact.centred)
            query = exact.query.reshape(exact.group, exact.count, -1)
            found = [draw.draw(query[:, i], int(at), 0, len(exact.key)) for i, at in enumerate(exact.position)]
            masks = np.stack([mask for mask, _ in found], axis=1).reshape(len(exact.query), -1)
            known[kind] = masks, float(np.mean([read for _, read in found])) / len(exact.key)
        masks, read = known[kind]
        out.append((*_drawn(exact, p, masks & exact.sampled(p.window), cosine), read))
    return out


def _projection(p: LshParams, exact: _Exact) -> Floats:
    matrix = projection_of(p, exact.key.shape[1])
    assert matrix is not None
    return matrix


def _cosines(exact: _Exact) -> Floats:
    norm = np.linalg.norm(exact.query, axis=1)[:, None] * np.linalg.norm(exact.centred, axis=1)
    return np.asarray(np.clip((exact.query @ exact.centred.T) / np.where(norm > 0, norm, 1), -1, 1), np.float32)


def _drawn(exact: _Exact, p: LshParams, drawn: npt.NDArray[np.bool_], cosine: Floats) -> tuple[float, float, float]:
    """Loss, error and share of one draw [Q, tokens], each key weighted by the inverse of its probability."""
    mask = exact.sampled(p.window)
    weight = np.where(mask, np.float32(0), exact.weight)
    u = np.maximum(inclusion(p, cosine[drawn]), max(p.min_inclusion, 1e-30))
    weight[drawn] = exact.weight[drawn] / u
    change = (weight @ exact.value) / weight.sum(1, keepdims=True) - exact.output
    pulled = (change.astype(np.float64) * exact.gradient).sum(1).reshape(exact.group, -1).sum(0)
    error = (change.astype(np.float64) ** 2).sum(1) / exact.size
    union = drawn.reshape(exact.group, exact.count, -1).any(0).sum() / max(int(mask[: exact.count].sum()), 1)
    return float((pulled**2).mean() / 2), float(error.mean()), float(union)

"""NumPy oracle of LshAttention, in float64 and written to be read: the estimator, and the state of one row of a batch.

A key is drawn when its hash is near the query's. It then stands for 1/u keys of its kind, u being the probability, over random
projections, that a key at its angle is drawn: its score is raised by -log u, and the softmax runs over what was drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import sketch_reference as sketch
from numpy.typing import NDArray
from reference import load, store

Array = NDArray[Any]
Floats = NDArray[np.float64]

FIRST_KEYS = 256  # nothing is indexed until there are so many to index: fewer make a poor mean
MAX_MEANS = 16
LEAST = -80.0  # log u of a key that only rounding can draw


def signs(x: Array, projection: Array) -> NDArray[np.bool_]:
    """Bit j of a vector: is its product with column j above zero? Both as bfloat16. x [..., dim], projection [dim, columns]."""
    rounded, columns = (a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, projection))
    return rounded @ columns > 0


def codes(bits: Array, width: int) -> NDArray[np.int64]:
    """[..., tables * width] bits to [..., tables] codes; a code's first bit is its least significant."""
    return bits.reshape(*bits.shape[:-1], -1, width) @ (1 << np.arange(width, dtype=np.int64))


def hamming(query: Array, keys: Array) -> NDArray[np.int64]:
    """Bits in which each signature of `keys` [n, bits] differs from `query` [bits]."""
    return (query != keys).sum(-1)


def collisions(query: Array, keys: Array) -> NDArray[np.int64]:
    """Tables in which each key's code, [n, tables], is the query's, [tables]."""
    return (query == keys).sum(-1)


def log_binomial(n: int, log_p: Floats, log_rest: Floats, first: int, last: int) -> Floats:
    """log P[first <= Binomial(n, p) <= last], by its terms; p and 1 - p are given by their logarithms."""
    k = np.arange(first, last + 1)
    log_choose = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])
    terms = log_choose + k * log_p[..., None] + (n - k) * log_rest[..., None]
    top = terms.max(-1, keepdims=True)
    return np.minimum(0.0, top[..., 0] + np.log(np.exp(terms - top).sum(-1)))


@dataclass(frozen=True)
class Hashing:
    """How keys are drawn. `bits` and `tables` for index tables, `max_hamming` (one per KV head) for index signature, `fraction`
    for index sketch, whose projection is the signs of its rotations."""

    index: str
    projection: Array  # [dim, columns]
    bits: int = 0
    tables: int = 0
    min_collisions: int = 2
    max_hamming: tuple[int, ...] = ()
    fraction: float = 0.0

    def marks(self, x: Array) -> Array:
        """What the index keeps of each vector: its signature, its code in every table, or its levels and its factor."""
        if self.index == "sketch":
            level, factor = sketch.encode(x, np.zeros(x.shape[-1]), self.projection)
            return np.concatenate([level, factor[..., None]], -1)
        bits = signs(x, self.projection)
        return bits if self.index == "signature" else codes(bits, self.bits).astype(np.uint16)

    def draws(self, query: Array, keys: Array, head: int = 0) -> NDArray[np.bool_]:
        """Which keys a query draws, both given by their marks."""
        if self.index == "signature":
            return hamming(query, keys) <= self.max_hamming[head]
        return collisions(query, keys) >= self.min_collisions

    def log_inclusion(self, cosine: Array, head: int = 0) -> Floats:
        """log u. A random hyperplane separates two vectors at angle theta with probability theta / pi."""
        tiny = 1e-300  # so that 0 * log 0 is 0
        differ = np.arccos(np.clip(cosine, -1.0, 1.0)) / np.pi
        log_differ, log_same = np.log(np.maximum(differ, tiny)), np.log(np.maximum(1 - differ, tiny))
        if self.index == "signature":
            return log_binomial(self.projection.shape[1], log_differ, log_same, 0, self.max_hamming[head])
        log_p = self.bits * log_same
        log_rest = np.log(np.maximum(-np.expm1(log_p), tiny))
        return log_binomial(self.tables, log_p, log_rest, self.min_collisions, self.tables)


def cosines(query: Array, keys: Array) -> Floats:
    """Cosine of each key with the query. A vector without length has no bit set: it differs from others as an orthogonal one."""
    norm = np.linalg.norm(query) * np.linalg.norm(keys, axis=-1)
    return np.clip(np.where(norm > 0, keys @ query / np.where(norm > 0, norm, 1), 0.0), -1, 1)


def attend(score: Floats, values: Floats) -> tuple[Floats, float]:
    """Softmax over scores: output [dim] and log-sum-exp. Nothing at all gives zeros and -inf."""
    if score.size == 0:
        return np.zeros(values.shape[-1]), -math.inf
    lse = float(score.max() + np.log(np.exp(score - score.max()).sum()))
    return np.exp(score - lse) @ values, lse


def merge(parts: list[tuple[Floats, float]]) -> tuple[Floats, float]:
    """One softmax of parts that were computed apart, by their log-sum-exps."""
    lse = float(np.logaddexp.reduce([part_lse for _, part_lse in parts]))
    if lse == -math.inf:
        return parts[0][0], lse
    return np.sum([np.exp(part_lse - lse) * output for output, part_lse in parts if part_lse > -math.inf], axis=0), lse


def scores_of(query: Floats, keys: Floats, scale: float, softcap: float = 0.0) -> Floats:
    score = keys @ query * scale
    return softcap * np.tanh(score / softcap) if softcap else score


def estimate(
    hashing: Hashing, query: Floats, keys: Floats, values: Floats, mean: Array, scale: float
) -> tuple[Floats, float, NDArray[np.bool_]]:
    """Sampled attention of one query to keys that were all hashed less `mean`: output, log-sum-exp, which were drawn."""
    drawn = hashing.draws(hashing.marks(query), hashing.marks(keys - mean))
    log_u = hashing.log_inclusion(cosines(query, keys[drawn] - mean))
    return *attend(scores_of(query, keys[drawn], scale) - np.maximum(log_u, LEAST), values[drawn]), drawn


def exact_attention(query: Floats, keys: Floats, values: Floats, scale: float) -> tuple[Floats, float]:
    return attend(scores_of(query, keys, scale), values)


def top_k_attention(query: Floats, keys: Floats, values: Floats, scale: float, count: int) -> tuple[Floats, float]:
    """Only the `count` highest scores."""
    score = scores_of(query, keys, scale)
    top = np.argsort(-score, kind="stable")[:count]
    return attend(score[top], values[top])


def window_attention(
    query: Floats, keys: Floats, values: Floats, scale: float, count: int, sink: int = 0
) -> tuple[Floats, float]:
    """Only `count` keys: the sinks and the last ones."""
    kept = np.r_[np.arange(sink), np.arange(len(keys) - (count - sink), len(keys))]
    return attend(scores_of(query, keys[kept], scale), values[kept])


@dataclass
class Step:
    """What a call gives: output [tokens, heads * dim], lse [heads, tokens], and the positions that each query head drew
    (None: the call was exact)."""

    output: Floats
    lse: Floats
    drawn: list[NDArray[np.int64] | None]


class LshReference:
    """One row: its caches in stored form, and which of its positions are indexed, with which mean."""

    def __init__(
        self,
        hashing: Hashing | None,  # None: index exact
        heads: int,
        kv_heads: int,
        dim: int,
        capacity: int,
        *,
        cache: np.dtype | type = np.float32,
        sink: int = 64,
        window: int = 64,
        scale: float = 0.0,
        softcap: float = 0.0,
        dense_below: int = 0,
        key_scale: Array | None = None,
        value_scale: Array | None = None,
    ) -> None:
        self.hashing, self.heads, self.kv_heads, self.dim, self.capacity = hashing, heads, kv_heads, dim, capacity
        self.cache, self.sink, self.window = np.dtype(cache), sink, window
        self.scale, self.softcap, self.dense_below = scale or 1 / math.sqrt(dim), softcap, dense_below
        self.key_scale = [None] * kv_heads if key_scale is None else [float(s) for s in key_scale]
        self.value_scale = [None] * kv_heads if value_scale is None else [float(s) for s in value_scale]
        self.keys, self.values = np.zeros((kv_heads, capacity, dim)), np.zeros((kv_heads, capacity, dim))  # of stored form
        self.length, self.indexed = 0, sink
        self.starts: list[int] = []  # first position of each mean
        self.means: list[Floats] = []  # [kv_heads, dim]
        self.mean_keys = 0  # keys that the last mean was taken of
        self.marks: Array | None = None  # [kv_heads, capacity, bits or tables]

    def append(self, key: Array, value: Array) -> None:
        """Stores tokens, [tokens, kv_heads * dim]; indexes nothing."""
        tokens = slice(self.length, self.length + len(key))
        assert tokens.stop <= self.capacity
        for h in range(self.kv_heads):
            for cache, new, scale in ((self.keys, key, self.key_scale[h]), (self.values, value, self.value_scale[h])):
                rounded = store(new.reshape(-1, self.kv_heads, self.dim)[:, h], self.cache, scale)
                cache[h, tokens] = load(rounded, scale)
        self.length = tokens.stop

    def index(self) -> None:
        """Brings the index to all but the window, once there is enough for a mean."""
        to = max(self.sink, self.length - self.window)
        if self.hashing is None or to <= self.indexed or (not self.means and to - self.sink < FIRST_KEYS):
            return
        if not self.means or (len(self.means) < MAX_MEANS and to - self.sink >= 2 * self.mean_keys):
            self.starts.append(self.indexed)
            self.means.append(self.keys[:, self.sink : to].mean(1).astype(np.float32).astype(np.float64))
            self.mean_keys = to - self.sink
        marks = self.hashing.marks(self.keys[:, self.indexed : to] - self.means[-1][:, None])
        if self.marks is None:
            self.marks = np.zeros((self.kv_heads, self.capacity, marks.shape[-1]), marks.dtype)
        self.marks[:, self.indexed : to] = marks
        self.indexed = to

    def rewind(self, length: int) -> None:
        """Forgets the tokens from `length` on; signatures only."""
        self.length, self.indexed = length, min(self.indexed, max(length, self.sink))
        while self.starts and self.starts[-1] >= self.indexed:
            self.starts.pop()
            self.means.pop()

    def mean_of(self, positions: NDArray[np.int64], head: int) -> Floats:
        """The mean that each position was hashed with. [n, dim]"""
        which = np.searchsorted(self.starts, positions, side="right") - 1
        return np.stack(self.means)[which, head]

    def seen(self, position: int, span: int | None) -> tuple[int, int]:
        """The first position that a query sees, and the one behind the last; span: SpanAttention's, what it leaves to that."""
        return (0, position + 1) if span is None else (self.sink, max(self.sink, position + 1 - (span - self.sink)))

    def step(
        self, query: Array, key: Array, value: Array, attended: bool = True, spans: Array | None = None
    ) -> Step | None:  # fmt: skip
        """One call: query [tokens, heads * dim], key and value [tokens, kv_heads * dim]. More than one token: exact, and indexed
        at the end. One token: indexed first and sampled. `attended` False only brings the state on. spans [kv_heads]: of `seen`
        """
        tokens, past = len(query), self.length
        self.append(key, value)
        self.index()
        if not attended:
            return None
        q = query.reshape(tokens, self.heads, self.dim).astype(np.float64)
        step = Step(np.zeros((tokens, self.heads, self.dim)), np.zeros((self.heads, tokens)), [None] * self.heads)
        for head in range(self.heads):
            h = head // (self.heads // self.kv_heads)
            for i in range(tokens):
                first, last = self.seen(past + i, None if spans is None else int(spans[h]))
                if tokens == 1 and self.length >= self.dense_below and self.hashing is not None and self.means:
                    *part, step.drawn[head] = self.sampled(q[i, head], h, head, first, last)
                else:
                    seen = slice(first, last)
                    part = attend(scores_of(q[i, head], self.keys[h, seen], self.scale, self.softcap), self.values[h, seen])
                step.output[i, head], step.lse[head, i] = part
        step.output = step.output.reshape(tokens, -1)
        return step

    def sketched(self, query: Floats, h: int, head: int) -> tuple[NDArray[np.int64], Array]:
        """Positions that a query head draws by sketches, and log p of each."""
        assert self.hashing is not None
        assert self.marks is not None
        between = np.arange(self.sink, self.indexed)
        q = query.astype(np.float32) * np.float32(self.scale)
        marks = self.marks[h, between]
        score = marks[:, -1] * sketch.products(q, marks[:, :-1].astype(np.uint8), self.hashing.projection)
        of_mean = (self.mean_of(between, h) @ q.astype(np.float64)).astype(np.float32)
        y = sketch.SHARPNESS * (score + of_mean)
        groups = sketch.sampled_groups(-(-self.sink // sketch.GROUP), self.indexed // sketch.GROUP)
        firsts = [g * sketch.GROUP - self.sink for g in groups]
        wanted = sketch.SHARPNESS * np.concatenate([score[i : i + sketch.GROUP] + of_mean[i] for i in firsts])
        drawn, log_p = sketch.draws(y, wanted, between, self.hashing.fraction, self.length - 1, head)
        return between[drawn], log_p[drawn]

    def sampled(
        self, query: Floats, h: int, head: int, first: int, last: int
    ) -> tuple[Floats, float, NDArray[np.int64]]:  # fmt: skip
        """Of the positions from `first` to `last` sinks, window and tail exactly, what lies between by sampling; KV head h."""
        assert self.hashing is not None
        assert self.marks is not None
        if self.hashing.index == "sketch":
            drawn, log_u = self.sketched(query, h, head)
        else:
            between = slice(self.sink, self.indexed)
            drawn = self.sink + np.flatnonzero(self.hashing.draws(self.hashing.marks(query), self.marks[h, between], h))
            log_u = self.hashing.log_inclusion(cosines(query, self.keys[h, drawn] - self.mean_of(drawn, h)), h)
        # Of a row that went back some of the window is indexed: it is seen exactly, all the same.
        end = max(self.sink, min(self.indexed, last if last < self.length else self.length - self.window))
        log_u, drawn = log_u[drawn < end], drawn[drawn < end]
        exact = np.r_[first : self.sink, end:last]

        def part(at: NDArray[np.int64], raised: Floats | float) -> tuple[Floats, float]:
            return attend(scores_of(query, self.keys[h, at], self.scale, self.softcap) + raised, self.values[h, at])

        return *merge([part(exact, 0.0), part(drawn, -np.maximum(log_u, LEAST))]), drawn

"""What LshAttention draws, computed apart from it in NumPy for `attnspan bench lsh`: budgets, bytes, exact attention, Top-K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime.lsh_keys import Floats, LayerKeys, from_bf16, rounded
from attnspan.planner.lsh import SEGMENT

__all__ = ["Draw", "Drawn", "SignatureDraw", "Study", "TablesDraw", "study", "thresholds"]

Mask = npt.NDArray[np.bool_]
ROWS = 16384  # keys hashed at a time


class Draw(Protocol):
    """An index over the keys of one KV head."""

    def index(self, head: int, key: Floats) -> None:
        """Build it of centred keys [tokens, head_dim]."""

    def draw(self, query: Floats, position: int, first: int, last: int) -> tuple[Mask, int]:
        """Of the keys first to last (not included), which the queries of a group [group, head_dim] at a position draw, [group,
        last - first], and the bytes of the index that they read."""
        ...


class SignatureDraw:
    """Keys whose signatures are within max_hamming[head] bits of the query's; projection [head_dim, bits]."""

    def __init__(self, projection: Floats, max_hamming: Sequence[int]) -> None:
        self._projection, self._most = projection, max_hamming

    def index(self, head: int, key: Floats) -> None:
        """See `Draw`."""
        self._limit = self._most[head]
        self._signs = _signatures(key, self._projection)

    def distances(self, query: Floats) -> npt.NDArray[np.uint16]:
        """Hamming distances [queries, tokens]."""
        asked = _signatures(query, self._projection)
        out = np.zeros((len(query), len(self._signs)), np.uint16)
        for word in range(asked.shape[1]):
            out += np.bitwise_count(asked[:, word, None] ^ self._signs[None, :, word])
        return out

    def draw(self, query: Floats, position: int, first: int, last: int) -> tuple[Mask, int]:
        """See `Draw`: one scan of the signatures serves the group."""
        return self.distances(query)[:, first:last] <= self._limit, self._signs.nbytes


def _signatures(x: Floats, projection: Floats) -> npt.NDArray[np.uint64]:
    packed = [np.packbits(rounded(x[i : i + ROWS]) @ projection > 0, axis=1) for i in range(0, len(x), ROWS)]
    return np.concatenate(packed).view(np.uint64)


class TablesDraw:
    """Keys that share at least `min_collisions` of `tables` codes with the query; projection [head_dim, bits * tables]."""

    def __init__(self, projection: Floats, bits: int, tables: int, min_collisions: int, segment: int = SEGMENT) -> None:
        self._projection, self._bits, self._tables, self._least = projection, bits, tables, min_collisions
        self._segment = segment

    def index(self, head: int, key: Floats) -> None:
        """See `Draw`."""
        codes = self._codes(key)
        # Sorting 16-bit numbers is linear in their count.
        self._ids = [np.argsort(column, kind="stable").astype(np.int32) for column in codes]
        edges = np.arange((1 << self._bits) + 1)
        self._start = [np.searchsorted(column[ids], edges) for column, ids in zip(codes, self._ids, strict=True)]
        self._tokens = len(key)

    def _codes(self, x: Floats) -> npt.NDArray[np.uint16]:
        """Codes [tables, tokens]; the first bit is the least."""
        out = np.empty((self._tables, len(x)), np.uint16)
        for i in range(0, len(x), ROWS):
            signs = (self._projection.T @ rounded(x[i : i + ROWS]).T > 0).reshape(self._tables, self._bits, -1)
            part = out[:, i : i + ROWS]
            part[:] = signs[:, 0]
            for bit in range(1, self._bits):
                part |= signs[:, bit].astype(np.uint16) << bit
        return out

    def draw(self, query: Floats, position: int, first: int, last: int) -> tuple[Mask, int]:
        """See `Draw`; a bucket is read once for the queries that share it: its head, a line in each segment, and 16-bit ids."""
        counts = np.zeros((len(query), self._tokens), np.uint16)
        codes = self._codes(query)
        segments = -(-self._tokens // self._segment)
        read = 0
        for ids, start, of_queries in zip(self._ids, self._start, codes, strict=True):
            for code in set(of_queries.tolist()):
                bucket = ids[start[code] : start[code + 1]]
                for q in np.flatnonzero(of_queries == code):
                    counts[q, bucket] += 1
                read += 2 * len(bucket) + 64 * segments
        return counts[:, first:last] >= self._least, read


@dataclass(frozen=True)
class Drawn:
    """counts [queries, heads]: keys drawn; bytes [queries]: of the index, and rows [queries]: of keys that any head of a group
    attends to, exactly or drawn; topk_error [heads]: relative L2 error of exact Top-K with as many keys, 0 if not asked for."""

    counts: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    topk_error: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, queries: int, heads: int) -> Drawn:
        """Zeros, to be added to."""
        return cls(
            np.zeros((queries, heads), np.int64), np.zeros(queries, np.int64), np.zeros(queries, np.int64), np.zeros(heads)
        )


@dataclass(frozen=True)
class Study:
    """exact [queries, heads, head_dim]: attention to everything in fp32 with the keys as bfloat16; weighty [heads]: the effective
    number of keys of attention, 1 / sum of squared weights, mean over queries; drawn: one for each index."""

    exact: Floats
    weighty: npt.NDArray[np.float64]
    drawn: list[Drawn]


def study(keys: LayerKeys, sink: int, window: int, draws: Sequence[Draw], topk: bool) -> Study:
    """Everything about the queries of one row, each with the keys up to its own position."""
    queries, heads, _ = keys.query.shape
    kv_heads = len(keys.key)
    group = heads // kv_heads
    position = keys.context - 1 - keys.stride * np.arange(queries)[::-1]
    exact, weighty = np.empty_like(keys.query), np.zeros(heads)
    out = [Drawn.empty(queries, heads) for _ in draws]
    for h in range(kv_heads):
        key, value = (from_bf16(x[h, : keys.context]) for x in (keys.key, keys.value))
        first = int(position[0]) + 1 - window
        centred = key - key[sink:first].mean(0, dtype=np.float64).astype(np.float32)
        for draw in draws:
            draw.index(h, centred)
        of_group = slice(h * group, (h + 1) * group)
        for j, at in enumerate(position):
            q, tail = keys.query[j, of_group], int(at) + 1 - window  # [sink, tail) is sampled
            score = q @ key[: at + 1].T * np.float32(keys.scale)
            weight = np.exp(score - score.max(1, keepdims=True))
            exact[j, of_group] = _weighted(weight, value)
            weighty[of_group] += weight.sum(1, dtype=np.float64) ** 2 / np.einsum("gt,gt->g", weight, weight)
            chosen = []
            for draw, drawn in zip(draws, out, strict=True):
                mask, read = draw.draw(q, int(at), sink, tail)
                chosen.append(mask.sum(1))
                drawn.counts[j, of_group] = chosen[-1]
                drawn.bytes[j] += read
                drawn.rows[j] += mask.any(0).sum() + sink + window
            if topk and draws:
                _topk_errors(weight, value, exact[j, of_group], sink, tail, np.array(chosen), out, h * group)
    return Study(exact, weighty / queries, [replace(d, topk_error=d.topk_error / queries) for d in out])


def _weighted(weight: Floats, value: Floats) -> Floats:
    total = weight.sum(-1, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.asarray(weight @ value[: weight.shape[-1]] / total)


def _topk_errors(
    weight: Floats, value: Floats, exact: Floats, sink: int, tail: int, counts: npt.NDArray[np.int64], out: list[Drawn], head: int
) -> None:
    """Adds the error of attention to the sinks, the window and the `counts` [indexes, group] heaviest keys between."""
    fixed = np.r_[0:sink, tail : weight.shape[1]]
    for g, row in enumerate(weight):
        middle = row[sink:tail]
        most = np.unique(np.clip(len(middle) - counts[:, g], 0, len(middle) - 1))
        order = np.argpartition(middle, most)
        for count, drawn in zip(counts[:, g], out, strict=True):
            kept = np.concatenate([fixed, order[len(middle) - count :] + sink])
            got = _weighted(row[None, kept], value[kept])[0]
            drawn.topk_error[head + g] += relative_error(got, exact[g])


def relative_error(got: Floats, exact: Floats) -> npt.NDArray[np.float64]:
    """Relative L2 error over the last axis."""
    difference = np.linalg.norm(got.astype(np.float64) - exact, axis=-1)
    return np.asarray(difference / np.maximum(np.linalg.norm(exact.astype(np.float64), axis=-1), 1e-30))


def thresholds(keys: LayerKeys, sink: int, window: int, projection: Floats, share: float, per_head: bool) -> list[int]:
    """max_hamming of each KV head that makes queries draw about `share` of the context: one for all heads, or each its own."""
    queries, _, head_dim = keys.query.shape
    kv_heads, bits = len(keys.key), projection.shape[1]
    drawer = SignatureDraw(projection, [0] * kv_heads)
    shares = np.zeros((kv_heads, bits + 1))
    first = keys.context - keys.spread - window
    for h in range(kv_heads):
        key = from_bf16(keys.key[h, sink:first])
        drawer.index(h, key - key.mean(0, dtype=np.float64).astype(np.float32))
        asked = keys.query.reshape(queries, kv_heads, -1, head_dim)[:, h].reshape(-1, head_dim)
        for query in asked:
            shares[h] += np.bincount(drawer.distances(query[None])[0], minlength=bits + 1).cumsum()
        shares[h] /= len(asked) * keys.context
    if not per_head:
        shares[:] = shares.mean(0)
    return [int(h) for h in np.abs(shares - share).argmin(1)]

"""What LshAttention draws, computed apart from it in NumPy for `attnspan bench lsh`: budgets, bytes, exact attention, Top-K."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime.lsh_keys import Floats, LayerKeys, from_bf16, to_bf16
from attnspan.planner.rules import SKETCH_ROUNDS

__all__ = ["Draw", "Drawn", "SignatureDraw", "SketchDraw", "Study", "TablesDraw", "study", "thresholds"]

Mask = npt.NDArray[np.bool_]
_ROWS = 16384  # keys hashed at a time


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


def _rounded(x: Floats) -> Floats:
    return from_bf16(to_bf16(x))  # as the op does before it hashes


def _signatures(x: Floats, projection: Floats) -> npt.NDArray[np.uint64]:
    packed = [np.packbits(_rounded(x[i : i + _ROWS]) @ projection > 0, axis=1) for i in range(0, len(x), _ROWS)]
    return np.concatenate(packed).view(np.uint64)


class TablesDraw:
    """Keys that share at least `min_collisions` of `tables` codes with the query; projection [head_dim, bits * tables]."""

    def __init__(self, projection: Floats, bits: int, tables: int, min_collisions: int, segment: int = 32768) -> None:
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
        for i in range(0, len(x), _ROWS):
            signs = (self._projection.T @ _rounded(x[i : i + _ROWS]).T > 0).reshape(self._tables, self._bits, -1)
            part = out[:, i : i + _ROWS]
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


# Sketches: the levels of two bits (Lloyd and Max, of a normal variable) and the edge between them; the largest entry of a table
# of products; how steeply probabilities follow the estimates, and the least of them as a share of the fraction; the thresholds
# that groups of tokens are drawn by; the groups, and the histogram, that a query finds its offset from.
_LEVELS, _EDGE = np.array([-1.5104, -0.4528, 0.4528, 1.5104], np.float32), np.float32(0.9816)
_TOP_ENTRY = 63
_SHARPNESS, _LEAST_SHARE = np.float32(0.85), 0.0625
_GROUP, _THRESHOLDS, _STRIDE = 64, 16384, 10127
_OFFSET_GROUPS, _BINS, _RANGE = 32, 256, 24.0


class SketchDraw:
    """Keys drawn with probability min(1, max(floor, e^(sharpness * score + c))): the score is what two bits a dimension let one
    estimate, c such that about `fraction` is drawn. signs [head_dim, rounds]; scale multiplies the scores."""

    def __init__(self, signs: Floats, fraction: float, scale: float) -> None:
        self._rotation, self._fraction, self._scale = _rotation(signs), fraction, np.float32(scale)
        self._floor = _LEAST_SHARE * fraction
        rank = np.arange(_THRESHOLDS + _GROUP) * _STRIDE % _THRESHOLDS
        self._thresholds = np.log((rank + 0.5) / _THRESHOLDS).astype(np.float32)

    def index(self, head: int, key: Floats) -> None:
        """See `Draw`."""
        self._head = head
        parts = [self._encode(key[i : i + _ROWS]) for i in range(0, len(key), _ROWS)]
        self._codes = np.concatenate([codes for codes, _ in parts], axis=1)
        self._factor = np.concatenate([factor for _, factor in parts])

    def _encode(self, key: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
        """Codes [bytes, tokens], four dimensions to a byte, and factors [tokens] that make products right on average."""
        x = key @ self._rotation
        square = np.einsum("td,td->t", x, x, dtype=np.float64)
        unit = x * np.sqrt(x.shape[1] / np.where(square > 0, square, 1)).astype(np.float32)[:, None]
        level = (unit >= -_EDGE).astype(np.uint8) + (unit > 0) + (unit > _EDGE)
        product = np.einsum("td,td->t", _LEVELS[level], x, dtype=np.float64)
        factor = np.where(square > 0, square / np.where(product > 0, product, 1), 0).astype(np.float32)
        level = np.pad(level, ((0, 0), (0, -x.shape[1] % 4)))
        codes = level[:, 0::4] | level[:, 1::4] << 2 | level[:, 2::4] << 4 | level[:, 3::4] << 6
        return np.ascontiguousarray(codes.T), _rounded(factor)

    def _estimates(self, query: Floats, first: int, last: int) -> Floats:
        """Estimated scores of one query [head_dim] with the keys first to last, less that with their mean."""
        q = (query * self._scale) @ self._rotation
        q = np.pad(q, (0, -len(q) % 4))
        even, odd = q[0::2], q[1::2]
        most = _LEVELS[3] * (np.abs(even) + np.abs(odd))
        step = np.float32(2 * most.max() / _TOP_ENTRY) if most.any() else np.float32(1)
        code = np.arange(16)
        pair = _LEVELS[code & 3] * even[:, None] + _LEVELS[code >> 2] * odd[:, None]
        entry = np.floor((pair + most[:, None]) * (np.float32(1) / step) + np.float32(0.5)).astype(np.uint8)
        byte = np.arange(256)
        table = entry[0::2, byte & 15] + entry[1::2, byte >> 4]
        total = np.zeros(last - first, np.uint32)
        for values, codes in zip(table, self._codes, strict=True):
            total += values.take(codes[first:last])
        product = step * total.astype(np.float32) - np.float32(most.sum(dtype=np.float64))
        return np.asarray(self._factor[first:last] * product)

    def log_inclusion(self, query: Floats, first: int, last: int) -> Floats:
        """Logarithms of the probabilities that one query [head_dim] draws the keys first to last."""
        y = _SHARPNESS * self._estimates(query, first, last)
        begin = -(-first // _GROUP)
        count = last // _GROUP - begin  # groups that lie wholly between
        some = begin + np.arange(min(count, _OFFSET_GROUPS)) * count // min(count, _OFFSET_GROUPS)
        seen = y[(some[:, None] * _GROUP + np.arange(_GROUP)).ravel() - first]
        c = _offset(seen, self._fraction * len(seen), self._floor)
        return np.asarray(np.clip(y + np.float32(c), np.float32(math.log(self._floor)), np.float32(0)))

    def draw(self, query: Floats, position: int, first: int, last: int) -> tuple[Mask, int]:
        """See `Draw`: one scan serves the group; each query has thresholds of its own."""
        token = np.arange(first, last)
        mask = np.empty((len(query), last - first), np.bool_)
        for g, one in enumerate(query):
            start = _starts(position, self._head * len(query) + g, np.arange(-(-last // _GROUP)))
            threshold = self._thresholds[start[token // _GROUP] + token % _GROUP]
            mask[g] = self.log_inclusion(one, first, last) > threshold
        return mask, (len(self._codes) + 2) * (last - first)


def _rotation(signs: Floats) -> Floats:
    """What turns vectors by x @ rotation: four times signs, and a Hadamard transform of the first or last 2^k dimensions."""
    dim = len(signs)
    size = 1 << (dim.bit_length() - 1)
    hadamard = np.ones((1, 1))
    while len(hadamard) < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    out = np.eye(dim)
    for r in range(SKETCH_ROUNDS):
        out *= signs[:, r]
        part = slice(0, size) if r % 2 == 0 else slice(dim - size, dim)
        out[:, part] = out[:, part] @ hadamard / math.sqrt(size)
    return out.astype(np.float32)


def _offset(y: Floats, wanted: float, floor: float) -> float:
    """c such that the sum of min(1, max(floor, e^(y + c))) is about `wanted`, from a histogram of y."""
    top = float(y.max())
    y = y.astype(np.float32)
    at = (y.max() - y) * np.float32(_BINS / _RANGE)
    count = np.bincount(np.minimum(at, np.float32(_BINS - 1)).astype(int), minlength=_BINS)
    weight = np.exp(-(np.arange(_BINS) + 0.5) * (_RANGE / _BINS))
    low, high = -10.0, _RANGE + 10
    for _ in range(24):
        c = (low + high) / 2
        if (count * np.clip(weight * math.exp(c), floor, 1)).sum() < wanted:
            low = c
        else:
            high = c
    return (low + high) / 2 - top


def _starts(position: int, head: int, group: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where the thresholds of groups of tokens begin for one query."""
    seed = (position * 0x9E3779B97F4A7C15 + head * 0xC2B2AE3D27D4EB4F) % (1 << 64)
    x = np.uint64(seed) + group.astype(np.uint64) * np.uint64(0x165667B19E3779F9)  # modulo 2^64
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((x >> np.uint64(32)) % np.uint64(_THRESHOLDS)).astype(np.int64)


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

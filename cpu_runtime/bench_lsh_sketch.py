"""What the index `sketch` draws, computed apart from LshAttention in NumPy for `attnspan bench lsh`."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime.bench_lsh_draw import ROWS, Mask
from attnspan.cpu_runtime.lsh_keys import Floats, rounded
from attnspan.planner.rules import SKETCH_ROUNDS

__all__ = ["SketchDraw", "rotation", "sketches"]

# The levels of two bits (Lloyd and Max, of a normal variable) and the edge between them; the largest entry of a table
# of products; how steeply probabilities follow the estimates, and the least of them as a share of the fraction; the thresholds
# that groups of tokens are drawn by; the groups, and the histogram, that a query finds its offset from.
LEVELS, _EDGE = np.array([-1.5104, -0.4528, 0.4528, 1.5104], np.float32), np.float32(0.9816)
_TOP_ENTRY = 63
SHARPNESS, LEAST_SHARE = np.float32(0.85), 0.0625
GROUP, _THRESHOLDS, _STRIDE = 64, 16384, 10127
OFFSET_GROUPS, BINS, RANGE = 32, 256, 24.0


class SketchDraw:
    """A `Draw`: keys drawn with probability min(1, max(floor, e^(sharpness * score + c))).

    The score is what two bits a dimension let one estimate, c such that about `fraction` is drawn. signs [head_dim, rounds];
    scale multiplies the scores.
    """

    def __init__(self, signs: Floats, fraction: float, scale: float) -> None:
        self._rotation, self._fraction, self._scale = rotation(signs), fraction, np.float32(scale)
        self._floor = LEAST_SHARE * fraction
        rank = np.arange(_THRESHOLDS + GROUP) * _STRIDE % _THRESHOLDS
        self._thresholds = np.log((rank + 0.5) / _THRESHOLDS).astype(np.float32)

    def index(self, head: int, key: Floats) -> None:
        """See `Draw`."""
        self._head = head
        parts = [self._encode(key[i : i + ROWS]) for i in range(0, len(key), ROWS)]
        self._codes = np.concatenate([codes for codes, _ in parts], axis=1)
        self._factor = np.concatenate([factor for _, factor in parts])

    def _encode(self, key: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
        """Codes [bytes, tokens], four dimensions to a byte, and factors [tokens] that make products right on average."""
        level, factor = sketches(key, self._rotation)
        level = np.pad(level, ((0, 0), (0, -level.shape[1] % 4)))
        codes = level[:, 0::4] | level[:, 1::4] << 2 | level[:, 2::4] << 4 | level[:, 3::4] << 6
        return np.ascontiguousarray(codes.T), factor

    def _estimates(self, query: Floats, first: int, last: int) -> Floats:
        """Estimated scores of one query [head_dim] with the keys first to last, less that with their mean."""
        q = (query * self._scale) @ self._rotation
        q = np.pad(q, (0, -len(q) % 4))
        even, odd = q[0::2], q[1::2]
        most = LEVELS[3] * (np.abs(even) + np.abs(odd))
        step = np.float32(2 * most.max() / _TOP_ENTRY) if most.any() else np.float32(1)
        code = np.arange(16)
        pair = LEVELS[code & 3] * even[:, None] + LEVELS[code >> 2] * odd[:, None]
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
        y = SHARPNESS * self._estimates(query, first, last)
        begin = -(-first // GROUP)
        count = last // GROUP - begin  # groups that lie wholly between
        some = begin + np.arange(min(count, OFFSET_GROUPS)) * count // min(count, OFFSET_GROUPS)
        seen = y[(some[:, None] * GROUP + np.arange(GROUP)).ravel() - first]
        c = _offset(seen, self._fraction * len(seen), self._floor)
        return np.asarray(np.clip(y + np.float32(c), np.float32(math.log(self._floor)), np.float32(0)))

    def draw(self, query: Floats, position: int, first: int, last: int) -> tuple[Mask, int]:
        """See `Draw`: one scan serves the group; each query has thresholds of its own."""
        token = np.arange(first, last)
        mask = np.empty((len(query), last - first), np.bool_)
        for g, one in enumerate(query):
            start = _starts(position, self._head * len(query) + g, np.arange(-(-last // GROUP)))
            threshold = self._thresholds[start[token // GROUP] + token % GROUP]
            mask[g] = self.log_inclusion(one, first, last) > threshold
        return mask, (len(self._codes) + 2) * (last - first)


def sketches(key: Floats, turn: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Levels [tokens, head_dim], 0 to 3, and factors [tokens] of centred keys [tokens, head_dim]; turn: of `rotation`."""
    x = key @ turn
    square = np.einsum("td,td->t", x, x, dtype=np.float64)
    unit = x * np.sqrt(x.shape[1] / np.where(square > 0, square, 1)).astype(np.float32)[:, None]
    level = (unit >= -_EDGE).astype(np.uint8) + (unit > 0) + (unit > _EDGE)
    product = np.einsum("td,td->t", LEVELS[level], x, dtype=np.float64)
    factor = np.where(square > 0, square / np.where(product > 0, product, 1), 0).astype(np.float32)
    return level, rounded(factor)


def rotation(signs: Floats) -> Floats:
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
    at = (y.max() - y) * np.float32(BINS / RANGE)
    count = np.bincount(np.minimum(at, np.float32(BINS - 1)).astype(int), minlength=BINS)
    weight = np.exp(-(np.arange(BINS) + 0.5) * (RANGE / BINS))
    low, high = -10.0, RANGE + 10
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

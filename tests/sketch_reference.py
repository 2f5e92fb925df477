"""NumPy oracle of index `sketch`: keys as two bits a dimension, keys drawn in proportion to the weight that these bits promise.

A key is rotated, cut to one of four levels in every dimension, and remembers the factor that makes products with the levels right
on average. A query estimates its score with every key from that, and draws a key with p = min(1, e^(sharpness * score + c)),
c being such that about the wanted share is drawn. A drawn key's score is raised by -log p: importance sampling, p being known.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]

ROUNDS = 4
LEVELS = np.array([-1.5104, -0.4528, 0.4528, 1.5104], np.float32)  # Lloyd and Max, for a normal variable
EDGE = np.float32(0.9816)
TOP = 63  # largest entry of a table of products
SHARPNESS = np.float32(0.85)
FLOOR = 0.0625  # of the fraction: least probability
GROUP = 64  # tokens that share a start in the thresholds
THRESHOLDS = 16384
STEP = 10127  # odd, near THRESHOLDS / golden ratio: neighbours in the table are spread evenly
SAMPLE = 32  # groups that c is found from, at most
BINS, RANGE = 256, 24.0


def rotate(x: Array, signs: Array) -> Floats:
    """[..., dim] turned at random: signs flipped, then a Hadamard transform of the first (or last) 2^k dimensions, four times."""
    x = x.astype(np.float32)
    dim = x.shape[-1]
    size = 1 << (dim.bit_length() - 1)
    for r in range(ROUNDS):
        x = x * signs[:, r].astype(np.float32)
        part = slice(0, size) if r % 2 == 0 else slice(dim - size, dim)
        y = x[..., part]
        half = 1
        while half < size:
            pairs = y.reshape(*y.shape[:-1], -1, 2, half)
            y = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).reshape(y.shape)
            half *= 2
        x = x.copy()
        x[..., part] = y * np.float32(1 / math.sqrt(size))
    return x


def encode(keys: Array, mean: Array, signs: Array) -> tuple[NDArray[np.uint8], Floats]:
    """Levels [n, dim], 0 to 3, and factors [n]."""
    x = rotate(keys.astype(np.float32) - mean.astype(np.float32), signs)
    square = (x.astype(np.float64) ** 2).sum(-1)
    unit = (np.sqrt(x.shape[-1] / np.where(square > 0, square, 1))).astype(np.float32)
    u = x * unit[..., None]
    level = np.where(u > 0, np.where(u > EDGE, 3, 2), np.where(u < -EDGE, 0, 1)).astype(np.uint8)
    product = (LEVELS[level].astype(np.float64) * x).sum(-1)
    factor = np.where(square > 0, square / np.where(product > 0, product, 1), 0).astype(np.float32)
    return level, factor.astype(ml_dtypes.bfloat16).astype(np.float32)


def products(query: Array, level: NDArray[np.uint8], signs: Array) -> Floats:
    """Estimated products of a query (already scaled) with the unit keys, from tables with entries of six bits."""
    q = rotate(query, signs)
    q = np.pad(q, (0, -len(q) % 4))
    level = np.pad(level, ((0, 0), (0, len(q) - level.shape[1])))
    even, odd = q[0::2], q[1::2]
    most = LEVELS[3] * (np.abs(even) + np.abs(odd))
    step = np.float32(2 * most.max() / TOP) if most.max() > 0 else np.float32(1)
    code = np.arange(16)
    table = LEVELS[code & 3] * even[:, None] + LEVELS[code >> 2] * odd[:, None]
    entry = np.floor((table + most[:, None]) * (np.float32(1) / step) + np.float32(0.5)).astype(np.int64)
    pairs = level[:, 0::2] | level[:, 1::2] << 2
    total = entry[np.arange(len(even)), pairs].sum(-1)
    return step * total.astype(np.float32) - np.float32(most.astype(np.float64).sum())


def log_thresholds() -> Floats:
    rank = np.arange(THRESHOLDS + GROUP) * STEP % THRESHOLDS
    return np.log((rank + 0.5) / THRESHOLDS).astype(np.float32)


def start(length: int, head: int, group: int) -> int:
    """Where a group of tokens begins in the thresholds, for one query."""
    mask = (1 << 64) - 1
    x = (length * 0x9E3779B97F4A7C15 + head * 0xC2B2AE3D27D4EB4F + group * 0x165667B19E3779F9) & mask
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
    return (x >> 32) % THRESHOLDS


def offset(y: Array, wanted: float, floor: float) -> float:
    """c with sum of min(1, max(floor, e^(y + c))) near `wanted`, from a histogram of y."""
    y = y.astype(np.float32)
    top = float(y.max())
    at = np.minimum((y.max() - y) * np.float32(BINS / RANGE), np.float32(BINS - 1)).astype(int)
    count = np.bincount(at, minlength=BINS)
    weight = np.exp(-(np.arange(BINS) + 0.5) * (RANGE / BINS))
    low, high = -10.0, RANGE + 10
    for _ in range(24):
        c = (low + high) / 2
        if (count * np.clip(weight * math.exp(c), floor, 1)).sum() < wanted:
            low = c
        else:
            high = c
    return (low + high) / 2 - top


def draws(y: Array, wanted: Array, positions: Array, fraction: float, length: int, head: int) -> tuple[NDArray[np.bool_], Floats]:
    """Which positions are drawn, and log p of all. `y`: sharpness times estimated score; `wanted`: those that c is found from."""
    floor = np.float32(fraction * FLOOR)
    log_p = np.minimum(0, np.maximum(y + np.float32(offset(wanted, fraction * len(wanted), float(floor))), np.log(floor)))
    table = log_thresholds()
    starts = {group: start(length, head, group) for group in np.unique(positions // GROUP).tolist()}
    threshold = table[[starts[p // GROUP] + p % GROUP for p in positions.tolist()]]
    return log_p > threshold, log_p.astype(np.float32)


def sampled_groups(first: int, last: int) -> list[int]:
    """Groups that c is found from: all, or SAMPLE evenly spread."""
    n = last - first
    return [first + i * n // min(n, SAMPLE) for i in range(min(n, SAMPLE))]

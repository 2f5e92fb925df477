"""Ways of hashing, and keys, that the tests of LSH-sampled attention share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from lsh_reference import Floats, Hashing

DIM = 64


def tables(rng: np.random.Generator, bits: int, count: int, least: int = 2, dim: int = DIM) -> Hashing:
    return Hashing("tables", rng.standard_normal((dim, bits * count)), bits, count, least)


def signature(rng: np.random.Generator, bits: int, most: int, dim: int = DIM) -> Hashing:
    return Hashing("signature", rng.standard_normal((dim, bits)), max_hamming=(most,))


def repeated(hashing: Hashing, rng: np.random.Generator, times: int) -> Iterator[Hashing]:
    """The same with new projections."""
    return (replace(hashing, projection=rng.standard_normal(hashing.projection.shape)) for _ in range(times))


RNG = np.random.default_rng(0)
KINDS = {
    "tables(10,150)": tables(RNG, 10, 150),
    "tables(8,75)": tables(RNG, 8, 75),
    "tables(2,3), one": tables(RNG, 2, 3, 1),
    "tables(5,40), four": tables(RNG, 5, 40, 4),
    "tables(13,300)": tables(RNG, 13, 300),
    "tables(15,4), one": tables(RNG, 15, 4, 1),
    "signature(64,22)": signature(RNG, 64, 22),
    "signature(128,47)": signature(RNG, 128, 47),
    "signature(128,0)": signature(RNG, 128, 0),
    "signature(256,105)": signature(RNG, 256, 105),
}


def clustered(rng: np.random.Generator, count: int, dim: int, centres: int = 24) -> tuple[Floats, Floats, Floats]:
    """Keys in runs around heavy-tailed centres with a common offset, values that share a part within a cluster, and a query."""
    spread = np.arange(1, dim + 1) ** -0.25
    spread /= np.linalg.norm(spread)

    def direction(*shape: int) -> Floats:
        x = rng.standard_normal((*shape, dim)) * spread
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    centre, value = direction(centres), rng.standard_normal((centres, dim))
    of = np.repeat(rng.integers(0, centres, -(-count // 8)), 8)[:count]
    near = rng.uniform(0, 0.55, (count, 1))
    keys = (1 - near) * direction(count) + near * centre[of]
    keys *= math.sqrt(dim) * np.exp(0.15 * rng.standard_normal((count, 1))) / np.linalg.norm(keys, axis=-1, keepdims=True)
    topic = centre[rng.integers(centres)]
    query = 2 * math.sqrt(dim) * (0.7 * direction() + 0.4 * topic)
    return keys + 3 * centre.mean(0) * math.sqrt(dim), 0.5 * rng.standard_normal((count, dim)) + value[of] + 1, query


def keys_of(distribution: str, rng: np.random.Generator, count: int) -> tuple[Floats, Floats, Floats]:
    if distribution == "clustered":
        return clustered(rng, count, DIM)
    return rng.standard_normal((count, DIM)), rng.standard_normal((count, DIM)) + 1, 1.5 * rng.standard_normal(DIM)

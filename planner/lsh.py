"""What a sampled head's index is: its size in bytes, its random input, and how likely hashes draw a key."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attnspan.planner.rules import SKETCH_ROUNDS, LshParams, check_int

__all__ = ["FIRST_KEYS", "inclusion", "index_bytes_per_token", "projection", "projection_of", "signs", "state_bytes"]

LINE = 64
"""Sections of an index begin at multiples of this many bytes, and hold a multiple of this many positions."""
SEGMENT = 65536
"""Positions whose buckets are sorted together, so that an id within them fits 16 bits."""
HEADER = 256
MEANS = 16
"""Means of the keys that one index can hold, as it grows."""
FIRST_KEYS = 256
"""Fewer tokens between the sinks and the window are not indexed: a row is exact until there are so many."""


def _up(value: int) -> int:
    return -(-value // LINE) * LINE


def _index_bytes(params: LshParams, head_dim: int, capacity: int) -> int:
    """Bytes of the index of one KV head, for `capacity` positions."""
    positions = _up(capacity)
    if params.index == "sketch":
        return positions * (-(-head_dim // 4) + 2)  # two bits a dimension, and a factor in bf16
    if params.index == "signature":
        assert params.signature_bits is not None
        return positions * params.signature_bits // 8
    if params.index == "tables":
        assert params.bits is not None
        assert params.tables is not None
        lists = -(-positions // SEGMENT) * params.tables
        return _up(lists * 4) + _up(lists * (2**params.bits + 1) * 2) + _up(positions * params.tables * 2)
    return 0


def state_bytes(params: LshParams, kv_heads: int, head_dim: int, capacity: int) -> int:
    """Bytes of the index of one sequence in one layer: of `kv_heads` heads of size head_dim, with room for `capacity` tokens.

    A header, up to 16 means of the keys (fp32) and their sum (fp64), then the sketches, signatures or tables of each head.
    """
    means = _up(MEANS * kv_heads * head_dim * 4) + _up(kv_heads * head_dim * 8)
    return HEADER + means + kv_heads * _index_bytes(params, head_dim, capacity)


def index_bytes_per_token(params: LshParams, capacity: int, head_dim: int | None) -> float | None:
    """Bytes that the index takes for each token of a KV head; `capacity` tokens share what tables take for their buckets.

    None for a sketch of keys of unknown size; hashes do not depend on it.
    """
    if params.index == "sketch" and head_dim is None:
        return None
    return _index_bytes(params, head_dim or 0, capacity) / capacity


def projection(head_dim: int, columns: int, seed: int) -> npt.NDArray[np.float32]:
    """The matrix W [head_dim, columns] of a hash: bit j of a vector x is x . W[:, j] > 0. Equal arguments give equal matrices.

    Independent N(0, 1), exact in bfloat16. Orthogonal columns would make the bits dependent, and `inclusion` wrong: at cosine .2,
    128 bits of them draw a key in 2.7 % of all cases where independent ones do in 6.9 %.
    """
    import ml_dtypes

    check_int("head_dim", head_dim, 1, 65536)
    check_int("columns of the projection", columns, 1, 15 * 1024)
    check_int("seed of the projection", seed, 0, 2**63 - 1, "; change --seed")
    matrix = np.random.Generator(np.random.PCG64([seed, columns, head_dim])).standard_normal((head_dim, columns))
    return matrix.astype(ml_dtypes.bfloat16).astype(np.float32)


def signs(head_dim: int, seed: int) -> npt.NDArray[np.float32]:
    """The +1 and -1 that a sketch multiplies dimensions by, [head_dim, 4]: a column a round. Equal arguments give equal signs."""
    check_int("head_dim", head_dim, 1, 65536)
    check_int("seed of the signs", seed, 0, 2**63 - 1, "; change --seed")
    bits = np.random.Generator(np.random.PCG64([seed, SKETCH_ROUNDS, head_dim])).integers(0, 2, (head_dim, SKETCH_ROUNDS))
    return (1 - 2 * bits).astype(np.float32)


def projection_of(params: LshParams, head_dim: int) -> npt.NDArray[np.float32]:
    """The op's input `projection` [head_dim, columns]: signs for a sketch, a random matrix for hashes; index `exact` has none."""
    if params.index == "sketch":
        return signs(head_dim, params.seed)
    return projection(head_dim, params.columns, params.seed)


def inclusion(params: LshParams, cos: npt.ArrayLike, max_hamming: npt.ArrayLike | None = None) -> npt.NDArray[np.float64]:
    """Probability, over random projections, that a key at cosine `cos` to the query is drawn; cos is clipped to [-1, 1].

    A bit of the two agrees with probability p = 1 - theta / pi. signature: P[Binomial(signature_bits, 1 - p) <= max_hamming];
    `max_hamming` overrides that of `params` and broadcasts. tables: P[Binomial(tables, p^bits) >= min_collisions].
    ValueError for a sketch, whose probabilities depend on the other keys too.
    """
    from scipy import special

    differ = np.arccos(np.clip(np.asarray(cos, np.float64), -1.0, 1.0)) / np.pi
    if params.index == "signature":
        bound = params.max_hamming if max_hamming is None else max_hamming
        drawn = special.bdtr(np.asarray(bound, np.float64), params.signature_bits, differ)
    elif params.index == "tables":
        assert params.bits is not None
        assert params.min_collisions is not None
        drawn = special.bdtrc(params.min_collisions - 1, params.tables, (1 - differ) ** params.bits)
    elif params.index == "exact":
        drawn = np.ones_like(differ)
    else:
        raise ValueError(f"index {params.index!r} does not draw by the angle alone")
    return np.asarray(drawn, np.float64)

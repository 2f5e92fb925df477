"""Caches for `attnspan bench lsh`: several copies of a layer's keys and values in huge pages, and what decode steps feed."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime.lsh_keys import Floats, LayerKeys, from_bf16

__all__ = ["ELEMENT", "NUMPY", "Caches", "Feed", "copies_of", "huge"]

ELEMENT = {"fp32": 1, "int8": 3, "int32": 6, "fp16": 10, "bf16": 16, "uint8": 2}
"""ONNX element types."""
NUMPY: dict[str, Any] = {
    "fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int8": np.int8, "int32": np.int32, "uint8": np.uint8,
}  # fmt: skip
_ROTATE_BYTES = 1.3e9  # keys and values to walk through, several times a large last-level cache
_MOST_COPIES = 64
_PAGE = 1 << 21


def huge(shape: Sequence[int], dtype: Any) -> npt.NDArray[Any]:
    """An array of zeros in huge pages, where the system allows them."""
    size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    raw = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        raw.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(raw, np.uint8)
    skip = -whole.ctypes.data % _PAGE
    out: npt.NDArray[Any] = whole[skip : skip + size].view(dtype).reshape(shape)
    out.fill(0)  # now, so that no step pays for a page's first touch
    return out


def copies_of(bytes_each: int) -> int:
    """Copies of a cache that make up `_ROTATE_BYTES`."""
    return min(_MOST_COPIES, -(-int(_ROTATE_BYTES) // bytes_each))


class Caches:
    """Copies of a batch's key and value caches [batch, kv_heads, capacity, head_dim] in one type, all with the same contents.

    int8: a scale for each KV head, or `one_scale` for all of them. Positions behind a row's context hold the tokens that steps
    will append, so that writing them changes nothing and several contenders can share the memory.
    """

    def __init__(self, rows: Sequence[LayerKeys], capacity: int, dtype: str, copies: int, one_scale: bool = False) -> None:
        kv_heads, _, head_dim = rows[0].key.shape
        shape = (len(rows), kv_heads, capacity, head_dim)
        self.dtype, self.copies = dtype, copies
        self.key, self.value = ([huge(shape, NUMPY[dtype]) for _ in range(copies)] for _ in range(2))
        longest = max(rows, key=lambda row: row.context)
        self.key_scale = _scale(longest.key, one_scale)
        self.value_scale = _scale(longest.value, one_scale)
        for arrays, name, scale in ((self.key, "key", self.key_scale), (self.value, "value", self.value_scale)):
            for b, row in enumerate(rows):
                for h, bits in enumerate(getattr(row, name)):
                    arrays[0][b, h, : len(bits)] = _stored(bits, dtype, scale[h])
            for other in arrays[1:]:
                other[:] = arrays[0]

    @cached_property
    def pairs(self) -> list[npt.NDArray[Any]]:
        """The same as LshAttention wants it: [batch, kv_heads * capacity, 2 * head_dim], each value behind its key."""
        batch, kv_heads, capacity, head_dim = self.key[0].shape
        found = [huge((batch, kv_heads * capacity, 2 * head_dim), NUMPY[self.dtype]) for _ in range(self.copies)]
        for i, array in enumerate((self.key[0], self.value[0])):
            found[0].reshape(batch, kv_heads, capacity, 2, head_dim)[:, :, :, i] = array
        for other in found[1:]:
            other[:] = found[0]
        return found

    @staticmethod
    def bytes_each(batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: str) -> int:
        """Bytes of a copy."""
        return 2 * batch * kv_heads * capacity * head_dim * int(np.dtype(NUMPY[dtype]).itemsize)


def _scale(bits: npt.NDArray[np.uint16], one: bool) -> Floats:
    """Largest magnitude over 127, of each head or of all."""
    # The magnitudes of bfloat16 are in the order of their bits.
    largest = from_bf16((bits & 0x7FFF).max((1, 2)))
    if one:
        largest[:] = largest.max()
    return np.asarray(np.maximum(largest, 1e-9) / 127, np.float32)


def _stored(bits: npt.NDArray[np.uint16], dtype: str, scale: np.float32) -> npt.NDArray[Any]:
    if dtype == "bf16":
        return bits
    wide = from_bf16(bits)
    if dtype == "int8":
        wide /= scale
        return np.clip(np.rint(wide), -127, 127).astype(np.int8)
    return wide.astype(NUMPY[dtype], copy=False)


@dataclass(frozen=True)
class Feed:
    """What steps are given, computed before they are timed.

    A step is told by `back`: row b's query stands at position contexts[b] - 1 - back. query [queries, heads * head_dim]; key,
    value [spread + room, batch, 1, kv_heads * head_dim]: of the token at `back`, at index spread - back. The last `reserve`
    tokens are not for the steps of the rounds.
    """

    query: Floats
    key: Floats
    value: Floats
    contexts: npt.NDArray[np.int32]
    spread: int
    stride: int
    scale: float
    reserve: int

    @classmethod
    def of(cls, rows: Sequence[LayerKeys], room: int, reserve: int) -> Feed:
        """For rows that share their queries."""
        first = rows[0]

        def tokens(name: str) -> Floats:
            parts = []
            for row in rows:
                part = getattr(row, name)[:, row.context - 1 - first.spread : row.context - 1 + room]
                parts.append(from_bf16(part.swapaxes(0, 1)).reshape(part.shape[1], 1, -1))
            return np.stack(parts, axis=1)

        query = first.query.reshape(len(first.query), -1)
        contexts = np.array([row.context for row in rows], np.int32)
        return cls(query, tokens("key"), tokens("value"), contexts, first.spread, first.stride, first.scale, reserve)

    @property
    def last(self) -> int:
        """The smallest `back` of the rounds."""
        return self.spread + 1 + self.reserve - len(self.key)

    def back_of(self, query: int) -> int:
        """Where a query belongs."""
        return self.spread - self.stride * query

"""Keys, values and queries of one layer to measure sampled attention on: random, clustered, or captured from a model.

Arrays hold the bits of bfloat16 as uint16, which is what caches hold.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError

__all__ = ["QUERIES", "Capture", "LayerKeys", "captured", "clustered", "from_bf16", "random", "rounded", "to_bf16"]

Bits = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]

QUERIES = 17
"""Queries of a layer; a prime, so that steps that rotate over them and over copies of the caches meet all pairs."""
SINK = 64
"""First tokens of a text that stay when it is cut: models attend to them as to no others."""
_CLUSTERS, _RUN = 192, 24


@dataclass(frozen=True)
class LayerKeys:
    """key, value [kv_heads, context + room, head_dim]: the `room` tokens are those that decoding appends.

    query [queries, heads, head_dim], numbers that bfloat16 can hold: the last belongs to position context - 1, the others to
    positions `stride` apart before it. scale multiplies the scores. source: where it all comes from, in words.
    """

    key: Bits
    value: Bits
    query: Floats
    context: int
    stride: int
    scale: float
    source: str

    @property
    def spread(self) -> int:
        """Positions from the first query to the last."""
        return self.stride * (len(self.query) - 1)

    def cut(self, context: int) -> LayerKeys:
        """The same with fewer tokens of context and as much room."""
        tokens = self.key.shape[1] - self.context + context
        return replace(self, key=self.key[:, :tokens], value=self.value[:, :tokens], context=context)


def to_bf16(x: Floats) -> Bits:
    """fp32 rounded to bfloat16 (to nearest, ties to even), as bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    odd += bits
    odd >>= 16
    return odd.astype(np.uint16)


def from_bf16(bits: Bits) -> Floats:
    """The numbers that bits of bfloat16 stand for."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def rounded(x: Floats) -> Floats:
    """x as bfloat16 holds it: what the op hashes."""
    return from_bf16(to_bf16(x))


def random(context: int, room: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0) -> LayerKeys:
    """Everything standard normal."""

    def one(rng: np.random.Generator, key: Bits, value: Bits, query: Floats) -> None:
        key[:] = to_bf16(_normal(rng, *key.shape))
        value[:] = to_bf16(_normal(rng, *value.shape))
        query[:] = _normal(rng, *query.shape)

    return _by_head(one, context, room, heads, kv_heads, head_dim, seed, "random: standard normal")


def clustered(context: int, room: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0) -> LayerKeys:
    """Heavy-tailed attention as real models have it: a few clusters of keys, and queries that lean towards two of them.

    The recipe is the one that was fitted to the budgets which MagicPIG (arXiv 2410.16179) published for Llama-3.1-8B; its
    constants are for a head_dim of 128. Values share one vector a head, as those of real models do.
    """
    return _by_head(_clustered_head, context, room, heads, kv_heads, head_dim, seed, "clustered: synthetic, heavy-tailed")


def _clustered_head(rng: np.random.Generator, key: Bits, value: Bits, query: Floats) -> None:
    tokens, dim = key.shape
    variance = np.arange(1, dim + 1) ** -(0.42 * rng.uniform(0.6, 1.4))
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    shape = (np.sqrt(variance / variance.sum())[:, None] * rotation).astype(np.float32)

    def draw(*size: int) -> Floats:
        return _unit(_normal(rng, *size, dim) @ shape)

    def weight(most: float, *size: int) -> Floats:
        return rng.uniform(0, most, size).astype(np.float32)[..., None]

    def norm(mean: float, *size: int) -> Floats:
        return np.asarray(mean * np.exp(0.15 * _normal(rng, *size)))[..., None]

    centre = draw(_CLUSTERS)
    cluster = np.repeat(rng.integers(_CLUSTERS, size=-(-tokens // _RUN)), _RUN)[:tokens]
    k, w = draw(tokens), weight(0.55, tokens)
    k *= 1 - w
    k += w * centre[cluster]
    k = _unit(k)
    k *= norm(13, tokens)
    k -= k.mean(0, dtype=np.float64).astype(np.float32)
    key[:] = to_bf16(k)
    v = _normal(rng, tokens, dim)
    v += _normal(rng, _CLUSTERS, dim)[cluster]
    v *= 0.7 * 0.5
    v += _normal(rng, dim)
    value[:] = to_bf16(v)
    size = query.shape[:2]
    topic = _unit(centre[rng.integers(_CLUSTERS, size=size)] + centre[rng.integers(_CLUSTERS, size=size)])
    w = weight(0.5, *size)
    query[:] = _unit((1 - w) * draw(*size) + w * topic) * norm(15, *size)


def _normal(rng: np.random.Generator, *size: int) -> Floats:
    return rng.standard_normal(size, np.float32)


def _unit(x: Floats) -> Floats:
    x /= np.sqrt(np.einsum("...d,...d->...", x, x))[..., None]
    return x


def _by_head(
    one: Callable[[np.random.Generator, Bits, Bits, Floats], None],
    context: int,
    room: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    seed: int,
    source: str,
) -> LayerKeys:
    """Have `one` fill the keys, values and queries [queries, group, head_dim] of each KV head, heads side by side."""
    shape = (kv_heads, context + room, head_dim)
    key, value = np.empty(shape, np.uint16), np.empty(shape, np.uint16)
    query = np.empty((QUERIES, heads, head_dim), np.float32)
    group = heads // kv_heads

    def head(h: int) -> None:
        one(np.random.default_rng([seed, h]), key[h], value[h], query[:, h * group : (h + 1) * group])

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:
        list(pool.map(head, range(kv_heads)))
    return LayerKeys(key, value, from_bf16(to_bf16(query)), context, 1, head_dim**-0.5, source)


@dataclass(frozen=True)
class Capture:
    """A file of `attnspan capture`: its metadata, and the arrays of each layer as fp32 or bits of bfloat16."""

    file: Path
    meta: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]

    @classmethod
    def load(cls, file: Path, layers: list[int] | None = None) -> Capture:
        """Read some layers (None: all); UserError when the file is no capture or lacks a layer."""
        try:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise ValueError("it holds one array")
            with loaded as data:
                meta = json.loads(str(data["meta"]))
                if not isinstance(meta, dict) or meta.get("format") != "attnspan-capture":
                    raise ValueError("its metadata are of another kind")
                wanted = list(dict.fromkeys(meta["layers"] if layers is None else layers))
                for layer in wanted:
                    if layer not in meta["layers"]:
                        there = ", ".join(map(str, meta["layers"]))
                        raise UserError(f"{file} has no layer {layer}: it holds {there}; change --layers, or capture it")
                meta["layers"] = wanted
                arrays = {name: data[name] for i in wanted for name in (f"q_{i}", f"k_{i}", f"v_{i}")}
                _check(meta, arrays)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}; --keys takes random, clustered or a file") from None
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} is not a file of attnspan capture: {error}") from None
        return cls(file, meta, arrays)

    def joined(self, kind: str) -> Bits:
        """q, k or v of all layers [heads of all layers, tokens, head_dim] as bits of bfloat16."""
        parts = [self.arrays[f"{kind}_{layer}"] for layer in self.meta["layers"]]
        return np.concatenate([p if p.dtype == np.uint16 else to_bf16(p.astype(np.float32)) for p in parts])


def _check(meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """ValueError when arrays are not what the metadata say."""
    keys = (meta["kv_heads"], meta["tokens"], meta["head_dim"])
    for name, array in arrays.items():
        wanted = (meta["heads"], meta["queries"], meta["head_dim"]) if name.startswith("q") else keys
        if array.shape != wanted or array.dtype not in (np.uint16, np.float16) or meta["tokens"] <= SINK:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, its metadata say {list(wanted)}")


def captured(capture: Capture, context: int, room: int, kv_heads: int | None = None, shortest: int | None = None) -> LayerKeys:
    """Keys of a captured text; the heads of all its layers are taken side by side, the first `kv_heads` if that is given.

    A longer text keeps its first `SINK` tokens and its end, where the queries belong. Of a shorter one all but the first `SINK`
    are repeated. Layers of several contexts get the same queries when told the shortest of them. UserError when there are not
    so many heads.
    """
    meta, key = capture.meta, capture.joined("k")
    group = meta["heads"] // meta["kv_heads"]
    kept = len(key) if kv_heads is None else kv_heads
    if not 1 <= kept <= len(key):
        raise UserError(f"--kv-heads is {kept}; {capture.file} holds {len(key)} in layers {meta['layers']}; lower it")
    tokens = key.shape[1]
    # The last token of the context is the last of the text, and the room goes on where the repeated part begins.
    place = SINK + (np.arange(context + room) - context) % (tokens - SINK)
    place[:SINK] = np.arange(SINK)
    key, value = (np.take(x[:kept], place, axis=1) for x in (key, capture.joined("v")))
    asked = from_bf16(capture.joined("q"))[: kept * group]
    count = min(QUERIES, asked.shape[1])
    steps = max(count - 1, 1)
    stride = max(1, min((asked.shape[1] - 1) // steps, (shortest or context) // 8 // steps))
    query = asked[:, asked.shape[1] - 1 - stride * np.arange(count)[::-1]].swapaxes(0, 1).copy()
    how = f"repeated to {context}" if context > tokens else f"the first {SINK} and the last {context - SINK}"
    layers = ", ".join(map(str, meta["layers"]))
    source = f"{capture.file.name}: {meta['model']}, layers {layers}, {kept} KV heads, {tokens} tokens, {how}"
    return LayerKeys(key, value, query, context, stride, float(meta["scale"]), source)

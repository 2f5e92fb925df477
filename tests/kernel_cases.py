"""Random calls of the attention kernels, and what the NumPy reference says to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from reference import held_positions, load, slot_of
from torch import Tensor

FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest error over the largest value, by type of the activations."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def array(x: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's values, exactly."""
    return x.detach().float().cpu().numpy()


@dataclass
class Case:
    """One call. length, new (tokens that are there, of `tokens`) per row; span [batch, kv_heads]; capacity [kv_heads]."""

    length: list[int]
    span: list[list[int]]
    capacity: list[int]
    tokens: int = 1
    group: int = 2
    dim: int = 64
    sink: int = 64
    dtype: torch.dtype = torch.float16
    fp8: bool = False
    softcap: float = 0.0
    scale: float | None = None
    new: list[int] | None = None
    seed: int = 0
    inputs: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        batch, kv_heads, slots = len(self.length), len(self.capacity), sum(self.capacity)

        def normal(*shape: int) -> Tensor:
            return torch.from_numpy(random.standard_normal(shape, np.float32)).to(self.dtype).to(DEVICE)

        def ints(x: Any) -> Tensor:
            return torch.tensor(x, dtype=torch.int32, device=DEVICE)

        heads = kv_heads * self.group
        new = {"query": normal(batch, self.tokens, heads * self.dim)}
        new |= {name: normal(batch, self.tokens, kv_heads * self.dim) for name in ("key", "value")}
        caches = {name: normal(batch, slots, self.dim) for name in ("key_cache", "value_cache")}
        scales = {}
        if self.fp8:
            scales = {n: torch.tensor(random.uniform(0.02, 0.2, kv_heads), dtype=torch.float32, device=DEVICE)
                      for n in ("key_scale", "value_scale")}  # fmt: skip
            caches = {name: (x.float() * 10).to(FP8) for name, x in caches.items()}
        # What no token was written to must not matter.
        for b, length in enumerate(self.length):
            first = 0
            for capacity in self.capacity:
                empty = torch.from_numpy(held_positions(length, capacity, self.sink) < 0)
                for cache in caches.values():
                    bits = cache[b, first : first + capacity].view(torch.uint8 if self.fp8 else torch.int16)
                    bits[empty] = 0x7F if self.fp8 else -1
                first += capacity
        offset = np.cumsum([0, *self.capacity[:-1]])
        numbers = {"length": ints(self.length), "span": ints(self.span), "capacity": ints(self.capacity), "offset": ints(offset)}
        self.inputs = new | caches | numbers | scales
        if self.new is not None:
            self.inputs["new_tokens"] = ints(self.new)

    @property
    def options(self) -> dict[str, Any]:
        return {"num_heads": len(self.capacity) * self.group, "sink": self.sink, "softcap": self.softcap, "scale": self.scale}

    def of(self, *leave: str) -> dict[str, Any]:
        """The tensors, without some."""
        return {name: x for name, x in self.inputs.items() if name not in leave}

    def stored(self, x: np.ndarray[Any, Any], name: str, head: int) -> np.ndarray[Any, Any]:
        """New keys or values as the cache gives them back, in units of the scale."""
        if not self.fp8:
            return x.astype(np.float64)
        small = np.clip(x.astype(np.float32) / array(self.inputs[f"{name}_scale"])[head], -448, 448)
        return small.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

    def reference(self) -> dict[str, np.ndarray[Any, Any]]:
        """output [batch, tokens, heads, dim], lse [batch, heads, tokens], key_cache and value_cache after the call; float64."""
        x = {name: array(t) for name, t in self.inputs.items()}
        batch, kv_heads, group = len(self.length), len(self.capacity), self.group
        q = x["query"].reshape(batch, self.tokens, kv_heads * group, self.dim).astype(np.float64)
        output = np.zeros(q.shape)
        lse = np.full((batch, kv_heads * group, self.tokens), -np.inf)
        caches = {name: x[f"{name}_cache"].astype(np.float64) for name in ("key", "value")}
        scale = self.dim**-0.5 if self.scale is None else self.scale
        for b, n in enumerate(self.length):
            count = self.tokens if self.new is None else self.new[b]
            first = 0
            for h, capacity in enumerate(self.capacity):
                slots = slice(first, first + capacity)
                held = held_positions(n, capacity, self.sink)
                positions = np.concatenate([held[held >= 0], n + np.arange(count)])
                seen_by_chunk = {}
                for name in ("key", "value"):
                    fresh = x[name][b, :count].reshape(count, kv_heads, self.dim)[:, h]
                    fresh = self.stored(fresh, name, h)
                    factor = float(x[f"{name}_scale"][h]) if self.fp8 else None
                    seen_by_chunk[name] = load(np.concatenate([caches[name][b, slots][held >= 0], fresh]), factor)
                    for i in range(count):
                        caches[name][b, first + slot_of(n + i, capacity, self.sink)] = fresh[i]
                window = max(self.span[b][h] - self.sink, 1)
                for i in range(count):
                    seen = (positions <= n + i) & ((positions < self.sink) | (n + i - positions < window))
                    for head in range(h * group, (h + 1) * group):
                        score = seen_by_chunk["key"][seen] @ q[b, i, head] * scale
                        if self.softcap:
                            score = self.softcap * np.tanh(score / self.softcap)
                        lse[b, head, i] = score.max() + np.log(np.exp(score - score.max()).sum())
                        output[b, i, head] = np.exp(score - lse[b, head, i]) @ seen_by_chunk["value"][seen]
                first += capacity
        return {"output": output, "lse": lse, "key_cache": caches["key"], "value_cache": caches["value"]}

    def check(self, output: Tensor, lse: Tensor | None = None) -> None:
        """Compare results with the reference, which reads the caches: before they are updated, or with `want` from before."""
        check(self, self.reference(), output, lse)


def check(case: Case, want: dict[str, np.ndarray[Any, Any]], output: Tensor, lse: Tensor | None = None) -> None:
    """Compare results with those wanted, within the tolerance of the type."""
    got = array(output).reshape(want["output"].shape)
    limit = TOLERANCE[case.dtype]
    assert np.isfinite(got).all()
    assert np.abs(got - want["output"]).max() <= limit * np.abs(want["output"]).max()
    if lse is not None:
        there = np.isfinite(want["lse"])
        assert np.array_equal(there, np.isfinite(array(lse)))
        assert np.abs(array(lse)[there] - want["lse"][there]).max(initial=0) <= limit


def check_caches(case: Case, want: dict[str, np.ndarray[Any, Any]]) -> None:
    """Compare the caches, updated in place, with those wanted bit for bit, empty slots (NaN) included."""
    for name in ("key_cache", "value_cache"):
        np.testing.assert_array_equal(array(case.inputs[name]), want[name])

"""What a plan costs: slots and bytes of KV cache, kept and dense, and bytes of indexes, by context length."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnspan.planner.errors import UserError
from attnspan.planner.lsh import index_bytes_per_token
from attnspan.planner.parts import plan_parts
from attnspan.planner.plan import Plan
from attnspan.planner.rules import SINK, span_tokens

CACHE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Bytes of one cached number by cache type; the scales of int8 (8 bytes a head and layer) are not counted."""


@dataclass(frozen=True)
class CostRow:
    """Cost at length n: slots over all layers and KV heads, bytes of keys and values over the batch.

    state_bytes: of the indexes of sampled heads, which come on top of the kept bytes. Bytes are None when the plan does not know
    head_dim.
    """

    n: int
    density: float
    kept_slots: int
    dense_slots: int
    kept_bytes: int | None
    dense_bytes: int | None
    state_bytes: int | None


def kept_slots(plan: Plan, n: int) -> int:
    """Tokens of a sequence of n that all heads of all layers keep; a token of one head is a slot."""
    return int(np.minimum(plan.spans(n).astype(np.int64), n).sum())


def dense_slots(plan: Plan, n: int) -> int:
    """Slots of a dense cache of n tokens over all layers and KV heads."""
    return plan.model.layers * plan.model.kv_heads * n


def slot_bytes(plan: Plan, dtype: str) -> int | None:
    """Bytes of one slot, key and value; None when the plan has no head_dim. UserError on an unknown type."""
    if dtype not in CACHE_BYTES:
        raise UserError(f"cache type is {dtype!r}: must be one of {', '.join(CACHE_BYTES)}; change --cache-dtype")
    return None if plan.model.head_dim is None else 2 * plan.model.head_dim * CACHE_BYTES[dtype]


def allocated_bytes(plan: Plan, dtype: str, batch: int = 1) -> int | None:
    """Bytes of the caches of an artefact built for n_max: all capacities, rounding included.

    A head of mode lsh counts with its full-length cache; its index is not in it: see `state_bytes`. None without head_dim.
    """
    each = slot_bytes(plan, dtype)
    return None if each is None else batch * each * int(plan.capacities().astype(np.int64).sum())


def state_bytes(plan: Plan, batch: int = 1, n: int | None = None) -> int | None:
    """Bytes of the indexes of sampled heads, over all layers, in an artefact built for n (default n_max) tokens.

    0 without sampled heads, None without head_dim.
    """
    parts = [part for part in plan_parts(plan) if part.lsh is not None]
    if not parts:
        return 0
    if plan.model.head_dim is None:
        return None
    if n is not None:
        room = int(plan.spans(n).max())  # that of a sampled head, which keeps every token
        parts = [dataclasses.replace(part, capacity=(room,) * len(part.heads)) for part in parts]
    return batch * sum(part.state_bytes(plan.model.head_dim) for part in parts)


def device_bytes(plan: Plan, dtype: str) -> tuple[int, int, int] | None:
    """Bytes of one sequence in an artefact for n_max: on the GPU and on the CPU of target hybrid, and in all of target cpu.

    hybrid keeps spans, dense heads and the sinks and windows of sampled heads on the GPU, whole caches and indexes of sampled
    heads on the CPU. None without head_dim.
    """
    each, indexes = slot_bytes(plan, dtype), state_bytes(plan)
    if each is None or indexes is None:
        return None
    capacity = plan.capacities()
    pairs = [(rule, int(capacity[i, h])) for i, layer in enumerate(plan.rules) for h, rule in enumerate(layer)]
    near = sum(int(span_tokens(SINK + rule.lsh.window, 0, plan.n_max)) if rule.lsh else slots for rule, slots in pairs)
    far = sum(slots for rule, slots in pairs if rule.lsh)
    return each * near, each * far + indexes, each * int(capacity.astype(np.int64).sum()) + indexes


def index_table(plan: Plan) -> list[dict[str, Any]]:
    """The kinds of index that a plan has: parameters, KV heads over all layers, bytes for each token of a KV head at n_max
    (None: a sketch, and the plan has no head_dim)."""
    names = ("index", "fraction", "bits", "tables", "signature_bits")
    counts: Counter[tuple[tuple[str, Any], ...]] = Counter()
    each = {}
    for part in plan_parts(plan):
        if part.lsh is None:
            continue
        key = tuple((name, getattr(part.lsh, name)) for name in names if getattr(part.lsh, name) is not None)
        counts[key] += len(part.heads)
        size = index_bytes_per_token(part.lsh, part.capacity[0], plan.model.head_dim)
        each[key] = None if size is None else round(size, 3)
    return [{**dict(key), "kv_heads": count, "bytes_per_token": each[key]} for key, count in counts.items()]


def cost(plan: Plan, n: int, dtype: str = "bf16", batch: int = 1) -> CostRow:
    """Cost of `batch` sequences of n tokens under the spans in force at n."""
    each = slot_bytes(plan, dtype)
    kept, dense = kept_slots(plan, n), dense_slots(plan, n)
    scale = None if each is None else batch * each
    return CostRow(
        n=n,
        density=plan.density(n),
        kept_slots=kept,
        dense_slots=dense,
        kept_bytes=None if scale is None else scale * kept,
        dense_bytes=None if scale is None else scale * dense,
        state_bytes=state_bytes(plan, batch, n),
    )


def cost_table(plan: Plan, lengths: Iterable[int], dtype: str = "bf16", batch: int = 1) -> list[CostRow]:
    """One row of cost per context length."""
    return [cost(plan, n, dtype, batch) for n in lengths]


def format_bytes(count: int | None) -> str:
    """Bytes for people, in binary units: 768 B, 11.2 MiB, 1.25 GiB; `-` when unknown."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"

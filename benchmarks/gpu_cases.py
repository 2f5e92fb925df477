"""What is measured: shapes, spans of the heads, and the order in which a run that lacks time is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

SINK, BLOCK, MIN_SPAN = 64, 64, 128
TILE = 128
"""Queries and keys of a tile, where tiles are counted; flex_attention's block."""

Spans = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlanCase:
    """Spans of one layer at a context. `kind`: how heads share density * context * kv_heads slots, unless `spans` says it."""

    kind: str
    density: float
    spans: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """One shape, measured with every plan in `plans` and the baselines beside them.

    phase decode: one token a row after context - 1. prefill: `context` tokens from nothing. chunk: the last `chunk` of context.
    """

    phase: str
    context: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    plans: tuple[PlanCase, ...]
    flex: bool = True
    ragged: bool = False
    chunk: int = 0

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def label(self) -> str:
        """One line that names it."""
        extra = " ragged" if self.ragged else f" chunk {self.chunk}" if self.chunk else ""
        shape = f"{self.heads}/{self.kv_heads} heads of {self.dim}"
        return f"{self.phase} {self.context} tokens, batch {self.batch}, {shape}, {self.dtype}{extra}"


def head_spans(plan: PlanCase, context: int, kv_heads: int, seed: int) -> Spans:
    """Span of each KV head, multiples of 64 in [128, context] whose sum is the same for every kind: [kv_heads].

    uniform: all alike. spread: log-normal, sigma 0.8, which gives the ratios between heads of a layer that the plans published
    with MoA have (least about .3, largest about 2 times the mean). one-long: one head keeps everything, others share the rest.
    """
    if plan.spans:
        return np.array(plan.spans, np.int64)
    most = -(-context // BLOCK)
    total = max(round(plan.density * context * kv_heads / BLOCK), kv_heads * MIN_SPAN // BLOCK)
    if plan.kind == "uniform":
        share = np.ones(kv_heads)
    elif plan.kind == "spread":
        share = np.random.default_rng(seed).lognormal(0.0, 0.8, kv_heads)
    else:
        share = np.where(np.arange(kv_heads) == 0, 1e9, 1.0)
    return BLOCK * _shared_out(share, total, MIN_SPAN // BLOCK, most)


def _shared_out(share: npt.NDArray[np.float64], total: int, least: int, most: int) -> Spans:
    """Integers in [least, most], in proportion to `share` where the bounds allow, whose sum is `total`."""
    low, high = 0.0, 1e12  # the factor that makes the clipped shares add up
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(share * middle, least, most).sum() < total:
            low = middle
        else:
            high = middle
    parts = np.clip(np.floor(share * low), least, most).astype(np.int64)
    while parts.sum() != total:
        step = 1 if parts.sum() < total else -1
        room = np.flatnonzero(parts < most if step > 0 else parts > least)
        parts[room[np.argmin(np.abs(step + parts[room] - share[room] * low))]] += step
    return parts


def kept_tokens(spans: Spans, context: int) -> int:
    """Keys that the last token of `context` sees, over all KV heads."""
    return int(np.minimum(spans, context).sum())


def kept_tiles(span: int, context: int, first: int = 0) -> int:
    """Tiles of 128 queries x 128 keys of one head that hold a visible pair, for queries `first` to `context`."""
    q0 = np.arange(first, context, TILE)
    q1 = np.minimum(q0 + TILE, context) - 1
    sinks = -(-min(SINK, context) // TILE)
    band = np.maximum(q0 - (span - SINK) + 1, 0) // TILE
    return int((q1 // TILE + 1 - band + np.minimum(band, sinks)).sum())


def pairs(span: int, context: int, first: int = 0) -> int:
    """Visible (query, key) pairs of one head, for queries `first` to `context`."""
    q = np.arange(first, context, dtype=np.int64)
    return int((np.minimum(q + 1, SINK) + np.clip(q + 1 - SINK, 0, span - SINK)).sum())


def _plans(*densities: float, kinds: tuple[str, ...] = ("uniform", "spread")) -> tuple[PlanCase, ...]:
    return tuple(PlanCase(kind, d) for d in densities for kind in (kinds if d < 1 else ("uniform",)))


def cases(dry: bool) -> list[Case]:
    """All cases, the ones that matter most first."""
    every = _plans(1.0, 0.5, 0.25)
    if dry:
        tiny = Case("decode", 320, 2, 4, 2, 64, "fp16", _plans(1.0, 0.5))
        return [
            tiny,
            replace(tiny, phase="prefill", context=192, batch=1, plans=_plans(1.0, 0.75)),
            replace(tiny, dtype="fp8", ragged=True, flex=False),
            replace(tiny, phase="chunk", context=256, chunk=40, plans=_plans(0.75, kinds=("spread",)), flex=False),
        ]
    base = Case("decode", 32768, 8, 32, 8, 128, "bf16", every)
    prompt = replace(base, phase="prefill", batch=1)
    core = [
        replace(base, context=n, batch=b) for n, b in ((32768, 8), (32768, 1), (32768, 32), (131072, 8), (4096, 8), (131072, 1))
    ]
    core += [replace(prompt, context=n, batch=b) for n, b in ((32768, 1), (4096, 8), (131072, 1), (8192, 1))]
    rest = [
        replace(base, plans=_plans(1.0, 0.25), kv_heads=4, flex=False),
        replace(base, plans=_plans(1.0, 0.25), kv_heads=32, flex=False),
        replace(base, plans=_plans(1.0, 0.25), dtype="fp16", flex=False),
        replace(base, plans=_plans(1.0, 0.25), dtype="fp8", flex=False),
        replace(base, plans=_plans(0.25, kinds=("uniform", "spread", "one-long")), flex=False),
        replace(base, plans=_plans(1.0, 0.25), ragged=True, flex=False),
        replace(prompt, plans=_plans(1.0, 0.25), kv_heads=32),
        replace(prompt, plans=_plans(1.0, 0.25), kv_heads=4),
        replace(prompt, plans=_plans(1.0, 0.25), dtype="fp16", flex=False),
        replace(prompt, phase="chunk", chunk=4096, plans=_plans(0.5, 0.25), flex=False),
        replace(base, plans=_plans(1.0, 0.25), dim=64, flex=False),
        replace(base, context=4096, batch=1),
        replace(base, context=4096, batch=32, flex=False),
        replace(base, context=131072, batch=32, flex=False),
    ]
    return core + rest


def plan_cases(spans: dict[int, Spans], heads: int, dim: int, batches: tuple[int, ...]) -> list[Case]:
    """Decode and prefill under a plan file's spans of one layer, by context, beside uniform plans of as many bytes."""
    found = []
    for context, each in spans.items():
        density = float(np.minimum(each, context).mean() / context)
        plans = (PlanCase("file", density, tuple(int(s) for s in each)), PlanCase("uniform", density), PlanCase("uniform", 1.0))
        shape = Case("decode", context, 1, heads, len(each), dim, "bf16", plans, flex=False)
        found += [*(replace(shape, batch=batch) for batch in batches), replace(shape, phase="prefill")]
    return found

"""A plan told in text: the spans of every layer, and a ladder of densities by context length."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from attnspan.planner.cost import (
    allocated_bytes,
    cost_table,
    dense_slots,
    device_bytes,
    format_bytes,
    index_table,
    slot_bytes,
    state_bytes,
)
from attnspan.planner.parts import layer_parts
from attnspan.planner.plan import Plan, ladder
from attnspan.planner.unified_text import cache_dtype, describe_lsh

BAR = 24


def summarise(plan: Plan, lengths: Sequence[int] | None = None, dtype: str | None = "bf16") -> dict[str, Any]:
    """Everything that `attnspan inspect` says, as plain numbers: spans in tokens, KV bytes for one sequence.

    dtype: of the caches, None for the one that the plan was made for, bf16 where it does not say.
    `layers` is evaluated at n_max, `lengths` at the given context lengths (default: the ladder of the plan). `indexes`: those of
    sampled heads; `state_bytes`: what they take beside the caches.
    UserError when a length is above n_max or the cache type is unknown.
    """
    dtype = cache_dtype(plan) if dtype is None else dtype
    each = slot_bytes(plan, dtype)
    spans = plan.spans(plan.n_max).astype(np.int64)
    kept = np.minimum(spans, plan.n_max)
    dim = plan.model.head_dim
    layers = [
        {
            "layer": i,
            "min": int(row.min()),
            "mean": float(row.mean()),
            "max": int(row.max()),
            "density": float(kept[i].mean() / plan.n_max),
            "kv_bytes": None if each is None else each * int(row.sum()),
            "state_bytes": None if dim is None else sum(part.state_bytes(dim) for part in layer_parts(plan, i)),
            "modes": dict(Counter(rule.mode for rule in plan.rules[i])),
        }
        for i, row in enumerate(spans)
    ]
    sizes = device_bytes(plan, dtype)
    ways = Counter(describe_lsh(rule.lsh) for layer in plan.rules for rule in layer if rule.lsh is not None)
    return {
        "model": dataclasses.asdict(plan.model),
        "n_max": plan.n_max,
        "sink": plan.sink,
        "windows": list(plan.windows),
        "modes": dict(Counter(rule.mode for layer in plan.rules for rule in layer)),
        "provenance": dict(plan.provenance),
        "density": plan.density(),
        "cache_dtype": dtype,
        "allocated_bytes": allocated_bytes(plan, dtype),
        "dense_bytes": None if each is None else each * dense_slots(plan, plan.n_max),
        "state_bytes": state_bytes(plan),
        "indexes": index_table(plan),
        "sampled": dict(ways.most_common()),
        "hybrid_bytes": None if sizes is None else {"gpu": sizes[0], "cpu": sizes[1]},
        "layers": layers,
        "lengths": [dataclasses.asdict(row) for row in cost_table(plan, lengths or ladder(plan.n_max), dtype)],
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as text: a header, one row per layer at n_max, the ladder of densities."""
    return "\n".join([*_header(summary), "", *_layers(summary), "", *_ladder(summary)])


def _header(summary: dict[str, Any]) -> list[str]:
    model = summary["model"]
    size = "unknown" if model["head_dim"] is None else model["head_dim"]
    modes = ", ".join(f"{count} {mode}" for mode, count in sorted(summary["modes"].items()))
    made = summary["provenance"].get("method", "unknown")
    lines = [
        f"model     {model['id']}: {model['layers']} layers, {model['heads']} query heads, "
        f"{model['kv_heads']} KV heads, head size {size}",
        f"plan      {made}; heads: {modes}; {summary['sink']} sinks inside each span",
        f"n_max     {summary['n_max']} tokens",
        f"density   {summary['density']:.3f} at {summary['n_max']} tokens",
        f"KV cache  {format_bytes(summary['allocated_bytes'])} a sequence ({summary['cache_dtype']}), "
        f"dense {format_bytes(summary['dense_bytes'])}",
    ]
    if any(summary["windows"]):
        sizes = Counter(summary["windows"])
        kinds = ", ".join(f"{count} of {w} tokens" if w else f"{count} without" for w, count in sizes.items())
        lines.append(f"windows   the model's own, by layer: {kinds}; no sinks in layers with one")
    for index in summary["indexes"]:
        kind = ", ".join(f"{name} {index[name]}" for name in ("fraction", "bits", "tables", "signature_bits") if name in index)
        size = "-" if index["bytes_per_token"] is None else f"{index['bytes_per_token']:g}"
        lines.append(
            f"index     {index['index']}{f' ({kind})' if kind else ''} of {index['kv_heads']} KV heads, "
            f"{size} B a token and KV head"
        )
    if summary["indexes"]:
        lines.append(f"indexes   {format_bytes(summary['state_bytes'])} a sequence, beside the KV cache")
        lines += [f"sampled   {count} KV heads: {name}" for name, count in summary["sampled"].items()]
        sizes = summary["hybrid_bytes"]
        if sizes is not None:
            lines.append(f"hybrid    {format_bytes(sizes['gpu'])} on the GPU, {format_bytes(sizes['cpu'])} on the CPU a sequence")
    read = summary["provenance"].get("read")
    if summary["provenance"].get("method") == "unified" and isinstance(read, dict):
        shares = ", ".join(f"{share:.1%} at {n}" for n, share in read.items())
        lines.append(f"read      {shares} tokens, of the bytes that dense attention reads for a token")
    return lines


def _layers(summary: dict[str, Any]) -> list[str]:
    title = f"spans at {summary['n_max']} tokens, by layer"
    sampled, mixed = bool(summary["indexes"]), len(summary["modes"]) > 1
    more = ("  index a layer" if sampled else "") + ("  heads" if mixed else "")
    out = [title, f"   layers      min     mean      max  density  KV a layer{more}"]
    columns = ("min", "mean", "max", "density", "kv_bytes", "state_bytes", "modes")
    # Neighbouring layers with equal rows share a line: a uniform plan has one.
    for (low, mean, high, density, size, state, modes), run in groupby(summary["layers"], itemgetter(*columns)):
        numbers = [row["layer"] for row in run]
        name = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
        index = f"  {format_bytes(state) if state else '-':>13}" if sampled else ""
        kinds = "  " + ", ".join(f"{count} {mode}" for mode, count in sorted(modes.items())) if mixed else ""
        out.append(f" {name:>8} {low:8d} {mean:8.0f} {high:8d}  {density:7.3f}  {format_bytes(size):>10}{index}{kinds}")
    return out


def _ladder(summary: dict[str, Any]) -> list[str]:
    out = ["density by context length", f"   length  density  {'':{BAR + 2}}     KV kept    KV dense"]
    for row in summary["lengths"]:
        bar = "#" * max(1, round(row["density"] * BAR))
        out.append(
            f" {row['n']:8d}  {row['density']:7.3f}  [{bar:.<{BAR}}]  {format_bytes(row['kept_bytes']):>10}  "
            f"{format_bytes(row['dense_bytes']):>10}"
        )
    return out

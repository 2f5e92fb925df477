"""The section of a report about plans whose heads are of several kinds: spans, dense and sampled heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from html import escape

import numpy as np

from attnspan.calibration.report_figures import WIDE
from attnspan.calibration.report_html import figures, table
from attnspan.calibration.report_svg import Canvas, ramp, text_width
from attnspan.planner.plan import Plan
from attnspan.planner.unified_text import describe_lsh, kinds, lines

__all__ = ["kind_map", "section"]

COLOURS = {"span": 0.1, "lsh": 0.55, "dense": 1.0}
NAMES = {"span": "span", "lsh": "sampled", "dense": "dense"}


def section(plan: Plan) -> str:
    """Heads by kind, what is kept where and what a token reads; nothing for plans that never had but spans."""
    count = kinds(plan)
    chosen = plan.provenance.get("method") == "unified"
    if set(count) == {"span"} and not chosen:
        return ""
    ways = Counter(NAMES[rule.mode] if rule.lsh is None else describe_lsh(rule.lsh) for layer in plan.rules for rule in layer)
    total = sum(count.values())
    rows = [[name, heads, f"{heads / total:.0%}"] for name, heads in ways.most_common()]
    text = "A head keeps a span; or everything, and attends to all of it; or everything, and attends to the first 64 tokens, "
    text += "a window and samples of the rest. " + "; ".join(lines(plan)) + "."
    out = f"<p>{escape(text)}</p>{figures(kind_map(plan))}" + table("KV heads by kind", ["kind", "KV heads", "share"], rows)
    bounds = plan.provenance.get("bounds")
    if chosen and isinstance(bounds, Mapping):
        kept = [[name, f"{each['cost']:.6g}", f"{each['bound']:.6g}"] for name, each in bounds.items()]
        out += table("Bounds", ["bound on", "the plan takes", "at most"], kept)
    return out


def kind_map(plan: Plan) -> str:
    """Layers across, KV heads down, colour = kind; point at a cell for its parameters."""
    layers, heads, left = plan.model.layers, plan.model.kv_heads, 52
    wide, high = min((WIDE - left - 8) / layers, 44.0), float(np.clip(130 / heads, 6, 20))
    canvas = Canvas(WIDE, 26 + heads * high + 34)
    x = float(left)
    for mode, colour in COLOURS.items():
        canvas.rect(x, 2, 11, 11, f'fill="{ramp(colour)}"')
        canvas.text(x + 16, 12, NAMES[mode])
        x += 16 + text_width(NAMES[mode]) + 18
    for i, layer in enumerate(plan.rules):
        for h, rule in enumerate(layer):
            about = describe_lsh(rule.lsh) if rule.lsh else NAMES[rule.mode]
            about += f", {rule.span(plan.n_max)} tokens" if rule.mode == "span" else ""
            canvas.rect(
                left + i * wide, 26 + h * high, wide - 1, high - 1, f'fill="{ramp(COLOURS[rule.mode])}"',
                f"layer {i}, head {h}: {about}",
            )  # fmt: skip
    for i in range(0, layers, max(1, round(26 / wide + 0.49))):
        canvas.text(left + (i + 0.5) * wide, 26 + heads * high + 13, str(i), "faint", "middle")
    canvas.text(left + layers * wide / 2, 26 + heads * high + 28, "layer", "", "middle")
    canvas.text(0, 26 + heads * high / 2 + 4, "head")
    count = ", ".join(f"{number} {NAMES[mode]}" for mode, number in kinds(plan).items())
    return canvas.done(f"Kinds of {heads} KV heads in each of {layers} layers: {count}; the table below has the numbers")

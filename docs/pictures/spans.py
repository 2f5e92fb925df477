"""Pictures of what heads keep: spans by the planner's rules, slots as the ops count them, the demo's plan as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from canvas import Axes, Canvas

from attnspan.planner.plan import Plan
from attnspan.planner.rules import span_tokens

KEY = ("sinks: the first 64 tokens", "window: the most recent ones", "not kept")
DEMO_PLAN = Path(__file__).parents[2] / "samples" / "data" / "smollm2_135m_plan.json"


def spans() -> Canvas:
    """What three KV heads see of one text: rows are queries, columns keys."""
    c = Canvas(760, 292)
    n, cell, sink = 28, 7, 2
    heads = (
        ("looks near", "128 + 0 n", "a fifth of the cache", 6),
        ("looks back", "0 + 0.5 n", "half of the cache", 14),
        ("keeps all", "0 + 1 n", "all of it", n),
    )
    for i, (title, rule, share, span) in enumerate(heads):
        left = 52 + 246 * i
        c.rect(left - 1, 29, n * cell + 1, n * cell + 1, "frame")
        for row in range(n):
            first = max(min(sink, row + 1), row + 1 - (span - sink))
            y = 30 + row * cell
            c.rect(left, y, min(sink, row + 1) * cell, cell - 1, "fa")
            if row >= sink:
                c.rect(left + sink * cell, y, (first - sink) * cell, cell - 1, "none")
                c.rect(left + first * cell, y, (row + 1 - first) * cell, cell - 1, "fb")
        middle = left + n * cell / 2
        c.text(middle, 20, title, "mid bold")
        c.text(middle, 244, rule, "mid mono")
        c.text(middle, 260, share, "mid small soft")
    c.text(46, 50, "query", "end small soft")
    c.arrow([(32, 58), (32, 120)], "sl")
    c.text(150, 42, "key", "end small soft")
    c.arrow([(156, 38), (236, 38)], "sl")
    for i, (kind, name) in enumerate(zip(("fa", "fb", "none"), KEY, strict=True)):
        c.rect(120 + 200 * i, 276, 10, 10, kind)
        c.text(136 + 200 * i, 285, name, "small soft")
    return c


def ring() -> Canvas:
    """One head's slots while a text grows: sinks stay, the ring wraps; with a smaller span a part of it is skipped."""
    c = Canvas(760, 268)
    sink, capacity, width = 4, 12, 42
    rows = (
        (9, 12, "9 tokens: slots fill in order"),
        (13, 12, "13 tokens: token 12 has taken the slot of token 4"),
        (20, 12, "20 tokens: the ring has been filled twice"),
        (20, 8, "20 tokens, span 8: slots out of force stay and are skipped"),
    )
    c.text(20 + sink * width / 2, 18, "sinks", "mid small soft")
    c.text(30 + (sink + capacity) * width / 2, 18, "ring: capacity - sinks slots", "mid small soft")
    for r, (length, span, what) in enumerate(rows):
        y = 28 + 60 * r
        held: dict[int, int] = {p if p < sink else sink + (p - sink) % (capacity - sink): p for p in range(length)}
        for slot in range(capacity):
            x = 20 + slot * width + 10 * (slot >= sink)
            p = held.get(slot)
            in_force = p is not None and (p < sink or length - 1 - p < span - sink)
            kind = "none" if p is None or not in_force else "fa" if p < sink else "fb"
            c.rect(x, y, width - 3, 30, kind, 3)
            if p is not None:
                c.text(x + width / 2 - 1.5, y + 20, str(p), "mid on" if in_force else "mid soft")
        newest = sink + (length - 1 - sink) % (capacity - sink)
        c.rect(20 + newest * width + 10 - 2, y - 2, width + 1, 34, "frame si", 4)
        c.text(545, y + 20, what.partition(": ")[0], "small bold")
        c.text(20, y + 46, what.partition(": ")[2], "small soft")
    return c


def elastic() -> Canvas:
    """Spans of rules over the length of the text."""
    c = Canvas(760, 330)
    n_max = 8192
    axes = Axes(c, (64, 30, 480, 246), (0, n_max), (0, n_max))
    marks = {float(v): str(v) for v in range(0, n_max + 1, 2048)}
    axes.ticks(marks, marks, ("tokens of the text, n", "tokens kept, S(n)"))
    lengths = np.arange(64, n_max + 1, 64)
    rules = ((0, 1, "sc"), (-1024, 0.875, "sb"), (1024, 0.5, "sa"), (0, 0.1875, "sb"), (128, 0, "sa"))
    for alpha, beta, kind in rules:
        span = np.minimum(span_tokens(alpha, beta, lengths), lengths)
        axes.curve(zip(lengths.tolist(), span.tolist(), strict=True), kind)
        x, y = axes.at(n_max, float(span[-1]))
        c.circle(x, y, 4, "f" + kind[1])
        c.text(x + 12, y + 4, f"{alpha} + {beta:g} n", "mono")
        c.text(x + 132, y + 4, f"{int(span_tokens(alpha, beta, n_max))} slots", "small soft")
    x, _ = axes.at(3000, 0)
    c.curve([(x, 30), (x, 276)], "sl thin dash")
    c.text(x + 6, 46, "a text of 3000 tokens:", "small soft")
    c.text(x + 6, 60, "spans in force are read here", "small soft")
    c.text(544, 16, "n_max: rings are made for it", "small soft mid")
    return c


def heads() -> Canvas:
    """What the demo's plan keeps, head by head."""
    plan = Plan.load(DEMO_PLAN)
    n = plan.n_max
    share = np.minimum(plan.spans(n), n) / n
    layers, kv_heads = share.shape
    c = Canvas(760, 178)
    width, height = 22, 26
    for i in range(layers):
        for h in range(kv_heads):
            x, y = 70 + i * width, 30 + h * (height + 3)
            c.rect(x, y, width - 2, height, "none", 2)
            tall = max(1.5, float(share[i, h]) * height)
            c.rect(x, y + height - tall, width - 2, tall, "fa", 2)
        if i % 5 == 0:
            c.text(70 + i * width + 10, 20, str(i), "mid small soft")
    c.text(60, 20, "layer", "end small soft")
    for h in range(kv_heads):
        c.text(60, 48 + h * (height + 3), f"KV head {h}", "end small soft")
    c.text(70, 136, f"SmolLM2-135M, {n} tokens: {share.mean():.0%} of the cache is kept.", "small")
    most, least = int((share > 0.99).sum()), int((share < 0.1).sum())
    c.text(70, 154, f"{most} of {share.size} heads keep everything, {least} less than a tenth.", "small soft")
    return c

"""Pictures of what is chosen: spans at a price, keys by chance."""

from __future__ import annotations

import numpy as np
from canvas import Axes, Canvas

from attnspan.planner.synthetic import synthetic_curves


def tradeoff() -> Canvas:
    """Left: a price per slot decides each head's span. Right: what that gains over uniform spans."""
    c = Canvas(760, 330)
    axes = Axes(c, (40, 30, 300, 240), (0, 1), (0, 0.8))
    axes.ticks({0: "0", 0.5: "half", 1: "all"}, {}, ("tokens kept", "loss of a head"))
    s = np.linspace(0.02, 1, 200)
    price = 0.45
    heads = (((1.0, 0.9, 1.6), "sb", "far"), ((0.75, 0.16, 1.8), "sa", "medium"), ((0.4, 0.05, 1.5), "sc", "near"))
    for (weight, reach, power), kind, name in heads:
        loss = weight * ((1 + s / reach) ** -power - (1 + 1 / reach) ** -power)
        axes.curve(zip(s.tolist(), loss.tolist(), strict=True), kind)
        best = int(np.argmin(loss + price * s))
        x, y = float(s[best]), float(loss[best])
        around = np.array([max(0.0, x - 0.17), min(1.0, x + 0.17)])
        axes.curve([(float(v), max(0.0, y - price * (float(v) - x))) for v in around], "si thin dash")
        px, py = axes.at(x, y)
        c.circle(px, py, 5, "f" + kind[1])
        c.text(px + 4, py - 16, name, "small")
    c.text(332, 50, "the same slope everywhere:", "small soft end")
    c.text(332, 65, "the price of a slot", "small soft end")

    n = 8192
    curves = synthetic_curves(32, 8, (n,))[n].reshape(256, -1)
    curves = np.minimum.accumulate(np.maximum(curves - curves[:, -1:], 0), axis=1)
    kept = np.maximum(np.arange(curves.shape[1]) * 64, 128) / n
    total = float(curves[:, 8].sum())
    points = []
    for step in np.geomspace(1e-3, 3e3, 160):
        pick = np.argmin(curves + step * kept, axis=1)
        points.append((float(kept[pick].mean()), float(curves[np.arange(256), pick].sum()) / total))
    right = Axes(c, (440, 30, 300, 240), (0, 1), (0, 1.05))
    names = ("density: share of the cache that is kept", "loss of the plan")
    right.ticks({0: "0", 0.25: ".25", 0.5: ".5", 0.75: ".75", 1: "1"}, {}, names)
    same = [(float(k), float(v) / total) for k, v in zip(kept, curves.sum(axis=0), strict=True)]
    right.curve([p for p in same if p[1] <= 1.0], "sb")
    right.curve([p for p in points if p[1] <= 1.03], "sa")
    c.text(*right.at(0.3, 0.62), "the same span for every head", "small")
    c.text(*right.at(0.16, 0.2), "a span for each", "small")
    half = right.at(0.5, 0)[0]
    c.curve([(half, 30), (half, 270)], "sl thin dash")
    c.text(half + 5, 46, "a budget", "small soft")
    return c


def sampling() -> Canvas:
    """Left: which keys take part in a step. Right: how likely a key is to be drawn."""
    c = Canvas(760, 300)
    rng = np.random.default_rng(7)
    count, sink, window, width = 116, 6, 10, 4.0
    score = rng.normal(0, 1, count)
    score[[31, 58, 83]] = 3.1, 3.6, 2.9
    score[:2] += 2
    score[-window:] += 0.7
    height = np.minimum(198, 26 + 26 * (score - score.min()))
    inner = slice(sink, count - window)
    drawn = np.zeros(count, bool)
    chance = np.minimum(1, np.exp(1.5 * (score - 2.9)))
    drawn[inner] = rng.random(count - sink - window) < np.maximum(chance[inner], 0.02)
    left, base = 20, 236
    c.rect(left - 3, 30, sink * width + 4, base - 30, "fa veil")
    c.rect(left + (count - window) * width - 2, 30, window * width + 4, base - 30, "fa veil")
    for j in range(count):
        exact = j < sink or j >= count - window
        kind = "fa" if exact else "fb" if drawn[j] else "none"
        c.rect(left + j * width, base - height[j], width - 1, height[j], kind)
    c.text(left - 3, 22, "sinks", "small")
    c.text(left + count * width, 22, "window", "small end")
    c.text(left + count * width / 2, 22, "the rest: a few are drawn, each weighs 1 / u", "small mid")
    c.text(left + count * width / 2, base + 18, "position of the key, oldest first; height: its score", "small soft mid")
    for i, (kind, name) in enumerate((("fa", "always attended to"), ("fb", "drawn in this step"), ("none", "not read"))):
        c.rect(left + 150 * i, base + 36, 10, 10, kind)
        c.text(left + 150 * i + 16, base + 45, name, "small soft")
    axes = Axes(c, (560, 30, 180, 206), (-6, 4), (-4, 0.15))
    names = ("score, by the key's sketch", "chance u of being drawn")
    axes.ticks({-5: "low", 3: "high"}, {0: "1", -1: ".1", -2: ".01", -3: ".001"}, names)
    s = np.linspace(-6, 4, 300)
    u = np.minimum(1, np.maximum(0.02 / 16, np.exp(0.85 * s - 2.4)))
    axes.curve(zip(s.tolist(), np.log10(u).tolist(), strict=True), "sb")
    c.text(566, 222, "floor: fraction / 16", "small soft")
    return c

"""A picture of measured answers: what is left of them when a step may read so many bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from canvas import Axes, Canvas

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "smollm2_135m_equal_bytes.json"
BUDGETS = (0.02, 0.05, 0.1, 0.25)
SERIES = (("unified-", "a", "unified"), ("span-", "b", "spans only"), ("lsh-", "c", "sampled only"), ("rows:", "i", "Top-K"))
PANELS = (("multikey", "exact", "multikey: right, %"), ("frequency", "rank", "word frequency: ranked right, %"),
          ("prose", "kl", "prose: KL from dense"))  # fmt: skip
LENGTHS = (8192, 4096)


def equal_bytes() -> Canvas:
    """Answers against bytes read, by what the heads may be; a row a length, a panel a task; bars are 95 % intervals."""
    entries = {(e["task"], e["length"], e["contender"]): e for e in json.loads(RESULTS.read_text(encoding="utf-8"))}
    c = Canvas(760, 60 + 250 * len(LENGTHS))
    for i, (_, colour, name) in enumerate(SERIES):
        c.curve([(40 + 150 * i, 16), (64 + 150 * i, 16)], f"s{colour}")
        c.text(70 + 150 * i, 20, name, "small")
    c.curve([(640, 16), (664, 16)], "sl thin dash")
    c.text(670, 20, "dense", "small")
    for row, length in enumerate(LENGTHS):
        for column, (task, figure, title) in enumerate(PANELS):
            box = (45 + 250 * column, 62 + 250 * row, 190, 160)
            _panel(c, box, entries, (task, length, figure), f"{title} ({length})")
    return c


def _panel(
    c: Canvas, box: tuple[float, float, float, float], entries: dict[Any, Any], what: tuple[str, int, str], title: str
) -> None:
    """One task and length: budgets across, evenly."""
    task, length, figure = what
    log = figure == "kl"
    ticks = {float(k): f"{10.0**k:g}" for k in range(-4, 1)} if log else {float(v): str(v) for v in (0, 25, 50, 75, 100)}
    axes = Axes(c, box, (-0.4, len(BUDGETS) - 0.6), (-4.3, 0.4) if log else (-4, 104))
    axes.ticks({float(i): f"{100 * share:g} %" for i, share in enumerate(BUDGETS)}, ticks, ("bytes read of dense", title))

    def height(value: float) -> float:
        return math.log10(max(value, 10**-4.3)) if log else 100 * value

    dense = entries.get((task, length, "dense"))
    if dense and not log:
        axes.curve([(x, height(dense[figure][0])) for x in (-0.4, len(BUDGETS) - 0.6)], "sl thin dash")
    for k, (prefix, colour, _) in enumerate(SERIES):
        found = [(i, entries.get((task, length, f"{prefix}{share:g}"))) for i, share in enumerate(BUDGETS)]
        points = [(i + 0.06 * (k - 1.5), *map(height, entry[figure])) for i, entry in found if entry]
        axes.curve([(x, y) for x, y, *_ in points], f"s{colour}")
        for x, y, low, high in points:
            axes.curve([(x, low), (x, high)], f"s{colour} thin")
            c.circle(*axes.at(x, y), 2.5, f"f{colour}" if colour != "i" else "head")

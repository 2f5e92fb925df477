"""A picture of measured times: the attention of one sampled layer, near and far parts in turn and at once."""

from __future__ import annotations

import json
from pathlib import Path

from canvas import Canvas

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "hybrid_overlap.json"
ROWS = (("in_turn", "one stream: in turn"), ("at_once", "two streams: at once"))
LANES = (("SpanAttention", "near", "fa"), ("LshAttention", "far", "fb"), ("MergeAttention", "merge", "fc"))


def hybrid_timeline() -> Canvas:
    """A row for each session, a lane for each op, milliseconds across."""
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    c = Canvas(760, 296)
    left, width, longest = 96, 640, max(data[name]["ms"] for name, _ in ROWS)
    scale = width / longest
    for row, (name, title) in enumerate(ROWS):
        top = 14 + 126 * row
        c.text(8, top + 6, title, "bold")
        for lane, (op, label, colour) in enumerate(LANES):
            y = top + 16 + 30 * lane
            c.rect(left, y, width, 24, "none", 3)
            c.text(left - 8, y + 16, label, "small end")
            for kind, start, end in data[name]["events"]:
                if kind == op:
                    c.rect(left + start * scale, y, max((end - start) * scale, 2), 24, colour, 2)
                    if (end - start) * scale > 60:
                        c.text(left + (start + end) / 2 * scale, y + 16, f"{end - start:.1f} ms", "small mid on")
    for tick in range(int(longest) + 1):
        c.text(left + tick * scale, 272, str(tick), "small soft mid")
    c.text(left + width / 2, 290, "ms", "small soft mid")
    return c

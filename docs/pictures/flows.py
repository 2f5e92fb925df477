"""Pictures of what follows what."""

from __future__ import annotations

from canvas import Canvas


def pipeline() -> Canvas:
    """Verbs between the files that they read and write."""
    c = Canvas(760, 210)
    files = [(8, "MODEL"), (168, "calib/"), (328, "plan.json"), (488, "OUT/"), (648, "text")]
    for x, name in files:
        c.rect(x, 60, 104, 40, "box", 6)
        c.text(x + 52, 85, name, "mid mono")
    for (x, _), verb in zip(files, ("calibrate", "plan", "export", "run"), strict=False):
        c.arrow([(x + 106, 80), (x + 158, 80)])
        c.text(x + 132, 70, verb, "mid small")
    c.arrow([(60, 58), (60, 26), (520, 26), (520, 58)], "sl")
    c.text(300, 18, "the model itself, weights read in blocks", "mid small soft")
    c.rect(488, 160, 104, 40, "box", 6)
    c.text(540, 185, "OUT/engine", "mid mono")
    c.arrow([(540, 102), (540, 158)])
    c.text(548, 128, "build", "small")
    c.text(548, 143, "tensorrt, portable", "small soft")
    c.arrow([(594, 180), (700, 180), (700, 102)])
    c.text(648, 172, "run", "mid small")
    notes = ((220, ("report: one page,", "spans, candidates")), (380, ("inspect: table, heat map", "eval: retrieval, loss")))
    for x, words in notes:
        c.arrow([(x, 102), (x, 132)], "sl")
        for i, line in enumerate(words):
            c.text(x, 150 + 16 * i, line, "mid small soft")
    return c


def hybrid() -> Canvas:
    """One attention over two devices."""
    c = Canvas(760, 330)
    lanes = ((24, 176, "GPU", "weights, rings of sinks and window"), (232, 86, "CPU", "all keys and values, the index"))
    for y, height, name, what in lanes:
        c.rect(8, y, 744, height, "frame", 8)
        label = y + 20 if name == "GPU" else y + height - 12
        c.text(20, label, name, "bold")
        c.text(56, label, what, "small soft")

    def op(x: float, y: float, name: str, what: str, kind: str) -> None:
        c.rect(x, y, 148, 46, "box", 6)
        c.rect(x, y + 4, 4, 38, kind)
        c.text(x + 77, y + 20, name, "mid bold")
        c.text(x + 77, y + 36, what, "mid small soft")

    op(24, 92, "projections", "q, k, v", "fc")
    op(236, 60, "SpanAttention", "near: exact", "fa")
    op(236, 132, "LshHash", "codes of the query", "fc")
    op(420, 252, "LshAttention", "far: sampled", "fb")
    op(420, 120, "MergeAttention", "by log-sum-exp", "fa")
    op(594, 60, "output projection", "MLP, next layer", "fc")
    c.arrow([(174, 106), (205, 106), (205, 83), (234, 83)])
    c.arrow([(174, 124), (205, 124), (205, 155), (234, 155)])
    c.arrow([(99, 138), (99, 275), (418, 275)], "sb")
    c.text(108, 222, "q, and k, v of the new token", "small")
    c.arrow([(311, 178), (311, 262), (418, 262)], "sb")
    c.text(320, 222, "codes", "small")
    c.arrow([(386, 83), (402, 83), (402, 143), (418, 143)])
    c.arrow([(494, 252), (494, 168)], "sb")
    c.text(503, 222, "output, lse", "small")
    c.arrow([(570, 143), (668, 143), (668, 108)])
    return c

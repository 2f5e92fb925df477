"""The figures of a report, as inline SVG: spans, their distribution, candidates, memory, influence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from attnspan.calibration.report_svg import FONT, NEAR, Box, Canvas, Scale, ink_on, number, place, ramp, text_width, ticks
from attnspan.planner.cost import dense_slots, format_bytes, kept_slots, slot_bytes
from attnspan.planner.plan import Plan

__all__ = ["CLASSES", "WIDE", "Point", "colour_bar", "counts", "distribution", "heat_map", "influence", "memory", "scatter"]

WIDE, HALF = 920, 452
"""Widths of a figure across the page, and of one of two side by side."""
CLASSES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""Upper bounds of the classes of the distribution, as shares of the length; a last class keeps everything."""


def heat_map(plan: Plan, n: int, width: int = WIDE, detailed: bool = True) -> str:
    """Layers across, KV heads down, colour = share of n tokens kept; detailed: with numbers where they fit, and a strip of
    the mean of each layer."""
    kept = np.minimum(plan.spans(n), n)
    layers, heads = kept.shape
    left, right, strip = 52, 8, 46 if detailed else 0
    cell_w = min((width - left - right) / layers, 44.0)
    cell_h = float(np.clip(250 / heads, 6, 24)) if detailed else float(np.clip(130 / heads, 4, 14))
    top = strip + 18
    canvas = Canvas(width, top + heads * cell_h + 34)
    canvas.text(0, 12, f"{n} tokens: density {plan.density(n):.3f}", "strong")
    if detailed:
        _strip(canvas, kept.mean(axis=1) / n, left, 22, cell_w, strip - 10)
    digits = len(str(int(kept.max())))
    size = min(FONT, (cell_w - 4) / (0.64 * digits), 0.75 * cell_h)
    gap = 1 if min(cell_w, cell_h) > 7 else 0.3
    for (layer, head), span in np.ndenumerate(kept):
        share, x, y = span / n, left + layer * cell_w, top + head * cell_h
        mode = plan.rules[layer][head].mode
        about = f"layer {layer}, head {head}: {span} tokens ({share:.0%}){', sampled' if mode == 'lsh' else ''}"
        canvas.rect(x, y, cell_w - gap, cell_h - gap, f'fill="{ramp(share)}"', about if detailed else "")
        if mode == "lsh":
            canvas.line([(x, y + cell_h - gap), (x + cell_w - gap, y)], "sampled")
        if detailed and size >= 7:
            ink = f' fill="{ink_on(share)}" pointer-events="none"'
            canvas.text(x + (cell_w - gap) / 2, y + cell_h / 2 + 0.32 * size, str(span), "", "middle", size, ink)
    for layer in _some(layers, layers * cell_w / 26):
        canvas.text(left + (layer + 0.5) * cell_w, top + heads * cell_h + 13, str(layer), "faint", "middle")
    for head in _some(heads, heads * cell_h / 12):
        canvas.text(left - 6, top + (head + 0.5) * cell_h + 4, str(head), "faint", "end")
    canvas.text(left + layers * cell_w / 2, top + heads * cell_h + 28, "layer", "", "middle")
    canvas.text(0, top + heads * cell_h / 2 + 4, "head")
    return canvas.done(
        f"Spans at {n} tokens of {heads} KV heads in each of {layers} layers: from {kept.min()} to {kept.max()} tokens, "
        f"density {plan.density(n):.3f}"
    )


def _strip(canvas: Canvas, density: npt.NDArray[np.float64], left: float, top: float, cell: float, height: float) -> None:
    """Bars of each layer's density above a map."""
    canvas.line([(left, top), (left + len(density) * cell, top)], "grid")
    for layer, share in enumerate(density.tolist()):
        about = f"layer {layer}: density {share:.3f}"
        canvas.rect(left + layer * cell, top + height * (1 - share), cell - 1, height * share, 'class="bar"', about)
    canvas.text(left - 6, top + 8, "1", "faint", "end")
    canvas.text(0, top + height - 6, "mean")


def _some(count: int, room: float) -> range:
    """Indices to label so that at most `room` labels are drawn."""
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 2**16)
    return range(0, count, next(step for step in steps if count / step <= max(room, 1)))


def colour_bar() -> str:
    """What the colours of the heat maps mean."""
    canvas = Canvas(340, 34)
    for i in range(50):
        canvas.rect(70 + 4 * i, 3, 4.3, 10, f'fill="{ramp((i + 0.5) / 50)}"')
    for share in (0, 0.5, 1):
        canvas.text(70 + 200 * share, 28, f"{share:.0%}", "faint", "middle")
    canvas.text(0, 12, "share kept")
    return canvas.done("Colours from dark blue, nothing kept, to bright yellow, the whole length kept")


def counts(plan: Plan, n: int) -> list[int]:
    """How many heads fall in each of CLASSES at n tokens, and how many keep everything."""
    kept = np.minimum(plan.spans(n), n).ravel()
    each = np.searchsorted(np.array(CLASSES), np.where(kept < n, kept / n, 2.0), side="left")
    return [int(count) for count in np.bincount(each, minlength=len(CLASSES) + 1)]


def distribution(plan: Plan, lengths: Sequence[int], names: Sequence[str]) -> str:
    """One bar for each length: its heads by the share of the length they keep; names of CLASSES and the last class."""
    left, bar = 70, 24
    canvas = Canvas(WIDE, 26 + len(lengths) * (bar + 8) + 4)
    colours = [i / len(CLASSES) for i in range(len(names))]  # evenly, so that small shares can be told apart
    x = float(left)
    for name, colour in zip(names, colours, strict=True):
        canvas.rect(x, 2, 11, 11, f'fill="{ramp(colour)}"')
        canvas.text(x + 16, 12, name)
        x += 16 + text_width(name) + 18
    for row, n in enumerate(lengths):
        y, x = 26 + row * (bar + 8), float(left)
        canvas.text(left - 8, y + 16, str(n), "", "end")
        heads = counts(plan, n)
        for name, colour, count in zip(names, colours, heads, strict=True):
            wide = count / sum(heads) * (WIDE - left - 4)
            if count:
                canvas.rect(x, y, wide - 1, bar, f'fill="{ramp(colour)}"', f"{n} tokens: {count} heads keep {name}")
            if wide > text_width(str(count)) + 6:
                ink = f' fill="{ink_on(colour)}" pointer-events="none"'
                canvas.text(x + wide / 2, y + 16, str(count), "", "middle", FONT, ink)
            x += wide
    return canvas.done("Heads by the share of the length they keep, one bar for each length; the table below has the numbers")


@dataclass(frozen=True)
class Point:
    """A candidate in a plot."""

    name: str
    x: float
    y: float
    chosen: bool


def scatter(points: Sequence[Point], x_label: str, y_label: str, width: int = HALF, front: bool = False) -> str:
    """Candidates with their names, the chosen one marked; front: a line along those that no other beats in both values."""
    height, left, top = 330 if width == HALF else 360, 64, 26
    canvas = Canvas(width, height)
    x = Scale.around([p.x for p in points], left, width - 12)
    y = Scale.around([p.y for p in points], height - 42, top)
    canvas.axes(x, y, x_label, y_label)
    best = sorted(p.x for p in points if not any(_beats(o, p) for o in points)) if front else []
    steps: list[tuple[float, float]] = []
    for value in dict.fromkeys(best):
        level = min(p.y for p in points if p.x == value)
        steps += [(x(value), steps[-1][1] if steps else y(level)), (x(value), y(level))]
    if len(set(steps)) > 1:
        canvas.line(steps, "front")
    dots: list[Box] = [(x(p.x) - 6, y(p.y) - 6, x(p.x) + 6, y(p.y) + 6) for p in points]
    taken, area = list(dots), (left + 2.0, top + 0.0, width - 2.0, height - 44.0)
    for p in sorted(points, key=lambda p: p.chosen):
        css = "dot chosen" if p.chosen else "dot"
        about = f"<title>{escape(p.name)}: {number(p.x)}, {number(p.y)}</title>"
        canvas.add(f'<circle class="{css}" cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="{6 if p.chosen else 4.5}">{about}</circle>')
    for p in sorted(points, key=lambda p: not p.chosen):
        label_x, base, far = place((x(p.x), y(p.y)), p.name, taken, area)
        if far > NEAR:
            near = min(max(x(p.x), label_x), label_x + text_width(p.name))
            canvas.line([(x(p.x), y(p.y)), (near, base - 4)], "lead")
        canvas.text(label_x, base, p.name, "label strong" if p.chosen else "label")
        taken.append((label_x, base - FONT, label_x + text_width(p.name), base + 3))
    names = ", ".join(f"{p.name} ({number(p.x)}, {number(p.y)})" for p in points)
    return canvas.done(f"{y_label} against {x_label} of {len(points)} candidates: {names}")


def _beats(a: Point, b: Point) -> bool:
    return a.x <= b.x and a.y <= b.y and (a.x, a.y) != (b.x, b.y)


def memory(plan: Plan) -> str:
    """KV cache of one sequence by context length, bf16: what the plan keeps, and dense; slots when head_dim is unknown."""
    lengths = [max(1, round(plan.n_max * k / 64)) for k in range(1, 65)]
    each = slot_bytes(plan, "bf16") or 1
    unit = "slots" if plan.model.head_dim is None else "bytes"
    kept, dense = ([each * of(plan, n) for n in lengths] for of in (kept_slots, dense_slots))
    canvas = Canvas(WIDE, 260)
    x = Scale(0, plan.n_max, 76, WIDE - 150)
    y = Scale(0, max(dense) * 1.02, 260 - 42, 26)
    show = format_bytes if unit == "bytes" else str
    power = 2.0 ** max(0, int(np.log2(max(dense))) // 10 * 10) if unit == "bytes" else 1.0
    marks = [round(power * t) for t in ticks(0, max(dense) / power, 4)]
    for mark in marks:
        canvas.line([(x.start, y(mark)), (x.end, y(mark))], "grid")
        canvas.text(x.start - 6, y(mark) + 4, show(mark) if mark else "0", "faint", "end")
    # Powers of two and their halves: lengths are such numbers.
    step = 2 ** int(np.ceil(np.log2(plan.n_max / 8)))
    for mark in range(0, plan.n_max + 1, step):
        canvas.text(x(mark), y.start + 15, str(mark), "faint", "middle")
    canvas.text((x.start + x.end) / 2, y.start + 33, "context length, tokens", "", "middle")
    canvas.text(0, 12, f"{unit} of one sequence")
    ends = []
    for values, css, name in ((dense, "dense", "dense"), (kept, "plan", "plan")):
        canvas.line([(x(0), y(0)), *((x(n), y(v)) for n, v in zip(lengths, values, strict=True))], f"curve {css}")
        ends.append((y(values[-1]), f"{name} {show(values[-1])}"))
    low = max(ends[1][0], ends[0][0] + 14)  # labels of close ends do not overlap
    for base, name in ((ends[0][0], ends[0][1]), (low, ends[1][1])):
        canvas.text(x.end + 6, base + 4, name)
    canvas.line([(x.start, y.end), (x.start, y.start), (x.end, y.start)], "axis")
    return canvas.done(f"KV cache by context length: at {plan.n_max} tokens {ends[1][1]}, {ends[0][1]}")


def influence(curves: Mapping[int, npt.NDArray[np.float64]]) -> str:
    """Bars for each layer, one plot for each length: predicted rise of the loss when all its heads keep the smallest span."""
    plots, left, high = len(curves), 64, 104
    canvas = Canvas(WIDE, plots * (high + 36) + 22)
    least = {n: curve[..., 0].sum(axis=1) for n, curve in curves.items()}
    for row, (n, values) in enumerate(least.items()):
        top = row * (high + 36) + 18
        y = Scale(0, float(values.max()) * 1.05 or 1.0, top + high, top)
        wide = min((WIDE - left - 8) / len(values), 44.0)
        canvas.text(0, top - 5, f"{n} tokens, in nats", "strong")
        for mark in y.ticks(3):
            canvas.line([(left, y(mark)), (left + wide * len(values), y(mark))], "grid")
            canvas.text(left - 6, y(mark) + 4, number(mark), "faint", "end")
        for layer, value in enumerate(values.tolist()):
            shape = (left + layer * wide + 1, y(value), wide - 2, y.start - y(value))
            canvas.rect(*shape, 'class="bar"', f"layer {layer}: {number(value)} nats")
        for layer in _some(len(values), wide * len(values) / 26):
            canvas.text(left + (layer + 0.5) * wide, top + high + 13, str(layer), "faint", "middle")
    canvas.text(left + min(WIDE - left - 8, 44.0 * len(values)) / 2, canvas.height - 6, "layer", "", "middle")
    most = "; ".join(f"at {n} tokens most in layer {int(v.argmax())}, {number(float(v.max()))} nats" for n, v in least.items())
    return canvas.done(f"Predicted rise of the loss by layer: {most}")

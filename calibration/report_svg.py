"""SVG by hand: the few shapes, scales and labels that the figures of a report need. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

# Viridis at nine points of its range: dark and blue is little, bright and yellow is all, to colour-blind readers too.
_RAMP = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
FONT = 11.5
"""Size of text in the units of a figure, about one pixel each."""
NEAR = 10.0
"""Distance of a label from its point, where there is room."""


def ramp(share: float) -> str:
    """Colour of a share from 0 to 1."""
    at = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    i = min(int(at), len(_RAMP) - 2)
    ends = ([int(code[k : k + 2], 16) for k in (0, 2, 4)] for code in _RAMP[i : i + 2])
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in zip(*ends, strict=True))


def ink_on(share: float) -> str:
    """Text colour that is read best on `ramp(share)`: from 40 % of viridis on, black has the higher contrast."""
    return "#000" if share > 0.4 else "#fff"


def text_width(text: str, size: float = FONT) -> float:
    """About the width of a text in a system font."""
    return 0.6 * size * len(text)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within a range, a third more at most."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.75)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number for an axis or a table: four digits that count."""
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.4g}"


@dataclass(frozen=True)
class Scale:
    """Maps values to coordinates; logarithmic where the values span more than a factor of 30."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> Scale:
        """A scale with some room around values."""
        low, high = min(values), max(values)
        if low > 0 and high / low > 30:
            return cls(low / 1.4, high * 1.4, start, end, log=True)
        room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        f: Callable[[float], float] = math.log if self.log else float
        return self.start + (f(value) - f(self.low)) / (f(self.high) - f(self.low)) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Values to mark."""
        if not self.log:
            return ticks(self.low, self.high, count)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = (1, 2, 5) if len(powers) <= 3 else (1,)
        return [m * 10.0**p for p in powers for m in marks if self.low <= m * 10.0**p <= self.high]


@dataclass
class Canvas:
    """Shapes added one after another; `done` gives the element."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def add(self, markup: str) -> None:
        """Markup that is already escaped."""
        self.parts.append(markup)

    def text(
        self, x: float, y: float, text: str, css: str = "", anchor: str = "start", size: float = FONT, more: str = ""
    ) -> None:
        """Text with its baseline at y."""
        style = "" if size == FONT else f' font-size="{size:.3g}"'
        anchor = "" if anchor == "start" else f' text-anchor="{anchor}"'
        css = css and f' class="{css}"'
        self.add(f'<text x="{x:.1f}" y="{y:.1f}"{css}{anchor}{style}{more}>{escape(text)}</text>')

    def rect(self, x: float, y: float, width: float, height: float, paint: str, title: str = "") -> None:
        """A rectangle; paint: attributes."""
        shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {paint}'
        self.add(f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>")

    def line(self, points: Iterable[tuple[float, float]], css: str) -> None:
        """A line through points."""
        self.add(f'<polyline class="{css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')

    def axes(
        self, x: Scale, y: Scale, x_label: str, y_label: str, show_x: Callable[[float], str] = number,
        show_y: Callable[[float], str] = number,
    ) -> None:  # fmt: skip
        """Grid, ticks and labels of a plot whose area the scales' ends give."""
        for value in x.ticks(max(2, int((x.end - x.start) / 80))):
            self.line([(x(value), y.start), (x(value), y.end)], "grid")
            self.text(x(value), y.start + 15, show_x(value), "faint", "middle")
        for value in y.ticks(max(2, int((y.start - y.end) / 45))):
            self.line([(x.start, y(value)), (x.end, y(value))], "grid")
            self.text(x.start - 6, y(value) + 4, show_y(value), "faint", "end")
        self.line([(x.start, y.end), (x.start, y.start), (x.end, y.start)], "axis")
        self.text((x.start + x.end) / 2, y.start + 33, x_label, anchor="middle")
        self.text(0, 12, y_label)

    def done(self, label: str) -> str:
        """The element; label: what the figure shows, for those who cannot see it."""
        size = f'width="{self.width:.0f}" height="{self.height:.0f}" viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        return f'<svg {size} role="img" aria-label="{escape(label)}" font-size="{FONT}">{"".join(self.parts)}</svg>'


Box = tuple[float, float, float, float]


def place(at: tuple[float, float], text: str, taken: Sequence[Box], area: Box) -> tuple[float, float, float]:
    """Where a label beside a point collides with nothing: its left end, its baseline, and its distance from the point.

    Boxes are left, top, right, bottom. Where everything collides, the place that does least.
    """
    width, height = text_width(text), FONT
    best, least = (at[0] + NEAR, at[1] + 4, NEAR), math.inf
    for far in np.arange(NEAR, 12 * NEAR, 11.0).tolist():
        for angle in (0, 180, 30, 330, 150, 210, 60, 300, 120, 240, 90, 270):
            dx, dy = far * math.cos(math.radians(angle)), far * math.sin(math.radians(angle))
            left = at[0] + dx - width * (0.5 - 0.5 * np.sign(round(dx, 6)))
            base = at[1] - dy + 0.35 * height
            box = (left, base - height, left + width, base + 3)
            beyond = (area[0] - box[0], area[1] - box[1], box[2] - area[2], box[3] - area[3])
            outside = sum(max(0.0, excess) for excess in beyond)
            cost = sum(_overlap(box, other) for other in taken) + 50 * outside + far / 1000
            if cost < least:
                best, least = (float(left), base, far), cost
    return best


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

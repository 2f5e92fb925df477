"""An SVG picture whose colours follow the page: classes and variables instead of colours, one style for all pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

LIGHT = {
    "ink": "#1f2933",
    "soft": "#5b6b78",
    "line": "#c5ced6",
    "none": "#e9eef2",
    "a": "#0e7c86",
    "b": "#d35d22",
    "c": "#6b4fbb",
}
DARK = {"ink": "#e3e9ee", "soft": "#9fadb9", "line": "#4d5a66", "none": "#2f3841", "a": "#3fb6c2", "b": "#ff9b61", "c": "#b09af7"}
"""ink, soft: text; line: frames; none: not kept; a: sinks and what is kept; b: recent or drawn; c: others. As in style.css."""

_STYLE = """
.p{{{light}}}
@media(prefers-color-scheme:dark){{.p{{{dark}}}}}
.p text{{fill:var(--ink);font:13px system-ui,sans-serif}}
.p .soft{{fill:var(--soft)}} .p .small{{font-size:11px}} .p .bold{{font-weight:600}}
.p .mono{{font-family:ui-monospace,monospace;font-size:12px}}
.p .mid{{text-anchor:middle}} .p .end{{text-anchor:end}} .p .on{{fill:#fff}}
.p .frame{{fill:none;stroke:var(--line)}} .p .box{{fill:var(--none);stroke:var(--line)}}
.p .none{{fill:var(--none)}}
.p .fa{{fill:var(--a)}} .p .fb{{fill:var(--b)}} .p .fc{{fill:var(--c)}}
.p .sa{{stroke:var(--a)}} .p .sb{{stroke:var(--b)}} .p .sc{{stroke:var(--c)}}
.p .si{{stroke:var(--ink)}} .p .sl{{stroke:var(--line)}}
.p polyline{{fill:none;stroke-width:2;stroke-linejoin:round}} .p .thin{{stroke-width:1}} .p .dash{{stroke-dasharray:4 4}}
.p .head{{stroke:none;fill:var(--ink)}} .p .faint{{opacity:.35}} .p .veil{{opacity:.14}}
"""


Range = tuple[float, float]


class Canvas:
    """Draws in pixels, y downwards; the width is at most what a page has, some 760."""

    def __init__(self, width: int, height: int) -> None:
        self._size = width, height
        self._body: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """Text on a base line; `kind`: classes such as "soft mid"."""
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        self._body.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{text}</text>')

    def rect(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 0) -> None:
        """A rectangle."""
        self._body.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{kind}"/>')

    def circle(self, x: float, y: float, radius: float, kind: str) -> None:
        """A disc."""
        self._body.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{kind}"/>')

    def curve(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        self._body.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>')

    def arrow(self, points: list[tuple[float, float]], kind: str = "si") -> None:
        """A line through points with a head at the last one, which it reaches along an axis."""
        (x0, y0), (x1, y1) = points[-2:]
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        self.curve([*points[:-1], (x1 - 5 * dx, y1 - 5 * dy)], kind)
        wings = [(x1, y1), (x1 - 8 * dx + 4 * dy, y1 - 8 * dy + 4 * dx), (x1 - 8 * dx - 4 * dy, y1 - 8 * dy - 4 * dx)]
        self._body.append(f'<polygon points="{" ".join(f"{x:g},{y:g}" for x, y in wings)}" class="head"/>')

    def save(self, file: Path) -> None:
        """Writes the picture."""
        light, dark = (";".join(f"--{name}:{colour}" for name, colour in colours.items()) for colours in (LIGHT, DARK))
        width, height = self._size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="p" viewBox="0 0 {width} {height}" width="{width}">'
        style = f"<style>{_STYLE.format(light=light, dark=dark)}</style>"
        file.write_text("\n".join([head, style, *self._body, "</svg>", ""]), encoding="utf-8")


class Axes:
    """A plot inside a canvas: a frame, ticks, and curves in the plot's units."""

    def __init__(self, canvas: Canvas, box: tuple[float, float, float, float], x: Range, y: Range) -> None:
        self._canvas, self._box, self._x, self._y = canvas, box, x, y
        canvas.rect(*box, "frame")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the plot is on the canvas."""
        left, top, width, height = self._box
        (x0, x1), (y0, y1) = self._x, self._y
        return left + width * (x - x0) / (x1 - x0), top + height * (1 - (y - y0) / (y1 - y0))

    def ticks(self, x: dict[float, str], y: dict[float, str], names: tuple[str, str]) -> None:
        """Labels below and on the left, and what the axes are."""
        left, top, width, height = self._box
        for value, label in x.items():
            self._canvas.text(self.at(value, 0)[0], top + height + 16, label, "soft small mid")
        for value, label in y.items():
            self._canvas.text(left - 6, self.at(0, value)[1] + 4, label, "soft small end")
        self._canvas.text(left + width / 2, top + height + 34, names[0], "small mid")
        self._canvas.text(left, top - 8, names[1], "small")

    def curve(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """A curve in the plot's units."""
        self._canvas.curve([self.at(x, y) for x, y in points], kind)

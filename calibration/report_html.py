"""The pieces of the report's page: its style, tables, figures and what is folded away."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --ink: #1d2329; --faint: #5f6a74; --line: #d9dee2; --bar: #3b6f8f; --mark: #c2452d; --soft: #f3f5f7;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #14181c; --ink: #e4e8eb; --faint: #9aa5ae; --line: #333c44; --bar: #6ba3c6; --mark: #f0795f; --soft: #1d2329; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 4px; padding-top: 12px; border-top: 1px solid var(--line); }
p { margin: 4px 0 12px; max-width: 72ch; }
figure { margin: 0 0 14px; overflow-x: auto; }
svg { display: block; max-width: 100%; height: auto; font-family: system-ui, sans-serif; fill: var(--ink); }
svg[width="920"] { min-width: 680px; }
svg .faint { fill: var(--faint); }
svg .strong { font-weight: 600; }
svg .bar { fill: var(--bar); }
svg polyline { fill: none; stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--faint); }
svg .front { stroke: var(--faint); stroke-dasharray: 4 3; }
svg .lead { stroke: var(--faint); stroke-width: 0.7; }
svg .sampled { stroke: #fff; stroke-width: 1.2; }
svg .curve { stroke-width: 2; stroke: var(--bar); }
svg .curve.dense { stroke: var(--faint); stroke-dasharray: 6 4; }
svg .dot { fill: var(--bar); stroke: var(--page); }
svg .dot.chosen { fill: var(--mark); }
svg .label { paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 4px 16px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 14px 0 0; }
.tiles div { flex: 1 1 150px; background: var(--soft); padding: 10px 12px; border-radius: 4px; }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.tiles dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dt { font-size: 12.5px; line-height: 1.35; color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 4px 0 12px; }
caption { text-align: left; color: var(--faint); padding-bottom: 4px; }
th, td { padding: 3px 14px 3px 0; text-align: right; vertical-align: top; }
th, td { border-bottom: 1px solid var(--line); font-weight: 400; }
thead th { color: var(--faint); vertical-align: bottom; }
th:first-child { text-align: left; white-space: nowrap; }
.words td { text-align: left; overflow-wrap: anywhere; }
.words th { color: var(--faint); }
.marked th, .marked td { font-weight: 600; }
details { margin: 4px 0 8px; }
summary { cursor: pointer; color: var(--faint); }
.ids { font: 12px/1.5 ui-monospace, monospace; max-width: none; overflow-wrap: anywhere; }
@media print {
  main { max-width: none; padding: 0; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  * { print-color-adjust: exact; }
}
"""


def document(title: str, body: str) -> str:
    """A page that loads nothing, and says so to the browser; title: text, body: markup."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def figures(*drawn: str) -> str:
    """SVG elements, side by side where there are several and room for them."""
    each = [f"<figure>{svg}</figure>" for svg in drawn]
    return each[0] if len(each) == 1 else f'<div class="pair">{"".join(each)}</div>'


def fold(summary: str, markup: str) -> str:
    """Markup that is folded away until it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{markup}</details>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]], marked: Collection[int] = ()) -> str:
    """A table whose first column names the rows; marked: indices of rows to stress; without a head its cells are words."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    top = top and f"<thead><tr>{top}</tr></thead>"
    body = ""
    for i, row in enumerate(rows):
        first, *rest = (escape(str(value)) for value in row)
        cells = f'<th scope="row">{first}</th>' + "".join(f"<td>{value}</td>" for value in rest)
        body += f'<tr class="marked">{cells}</tr>' if i in marked else f"<tr>{cells}</tr>"
    kind = "" if head else ' class="words"'
    return f'<div class="scroll"><table{kind}><caption>{escape(caption)}</caption>{top}<tbody>{body}</tbody></table></div>'

"""Results of an evaluation as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["table"]

_COLUMNS = ("task", "length", "method", "density", "n", "accuracy", "95 % interval", "loss", "ppl", "KL", "top-1")


def table(content: Mapping[str, Any]) -> str:
    """The totals of results.json, one line for each task, length and method; then accuracy by depth where there are several."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for x in content["totals"]:
        density = content.get("densities", {}).get(x["method"], {}).get(str(x["length"]))
        rows.append(
            (
                x["task"],
                str(x["length"]),
                x["method"],
                _number(density, 3),
                str(x["n"]),
                _percent(x["accuracy"]),
                "-" if x["low"] is None else f"{100 * x['low']:.1f} to {100 * x['high']:.1f}",
                _number(x["nll"], 3),
                f"{x['ppl']:.4g}",
                _number(x["kl"], 4),
                _percent(x["top1"]),
            )
        )
    text = _align(rows, left=3)
    by_depth = _depths(content)
    return text + ("\n\naccuracy by depth, %\n" + by_depth if by_depth else "")


def _depths(content: Mapping[str, Any]) -> str:
    depths = sorted({x["depth"] for x in content["cells"] if x["depth"] is not None})
    if len(depths) < 2:
        return ""
    found: dict[tuple[str, str, str], dict[float, float]] = {}
    for x in content["cells"]:
        if x["depth"] is not None and x["accuracy"] is not None:
            found.setdefault((x["task"], str(x["length"]), x["method"]), {})[x["depth"]] = x["accuracy"]
    rows: list[tuple[str, ...]] = [("task", "length", "method", *(f"{depth:g}" for depth in depths))]
    rows += [(*key, *(_number(_times(cells.get(depth)), 0) for depth in depths)) for key, cells in found.items()]
    return _align(rows, left=3)


def _times(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _align(rows: list[tuple[str, ...]], left: int) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

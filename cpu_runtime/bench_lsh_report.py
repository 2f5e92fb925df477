"""What `attnspan bench lsh` shows: a table for each case, and error against time and against the fraction drawn."""

from __future__ import annotations

import io
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole
from attnspan.planner.rules import LSH_INDEXES

if TYPE_CHECKING:
    from attnspan.cpu_runtime.bench_lsh_case import Case

__all__ = ["draw", "show"]

Record = dict[str, Any]
DPI = 150
INK = "#222222"
# Colour and mark of a kernel by how its name begins, told apart by colour-blind readers too.
LOOKS = {
    "sketch": ("#6b3fa0", "P"), "tables": ("#3b6f8f", "o"), "signature": ("#c2452d", "s"), "topk": ("#8a8a8a", "^"),
    "attnspan-dense": ("#222222", "D"), "ort-gqa-int8": ("#b49a2f", "v"), "ort-gqa": ("#b49a2f", "<"), "torch": ("#b49a2f", ">"),
}  # fmt: skip
_LEAST_ERROR = 0.01  # per cent: where errors of nothing but rounding are drawn


def show(case: Case, records: list[Record]) -> None:
    """Print one case at one number of threads."""
    first = records[0]
    lengths = "/".join(map(str, first["contexts"])) if case.ragged else case.context
    print(f"\ndecode, context {lengths}, batch {case.batch}, {case.heads} query heads, {case.kv_heads} KV heads, "
          f"head_dim {case.head_dim}, {case.dtype}, {first['threads']} threads, {first['bandwidth_gbs']:.1f} GB/s")  # fmt: skip
    print(f"keys {first['source']}")
    dense = next((r["median_ms"] for r in records if r["kernel"] == "attnspan-dense"), None)
    width = max(len(r["label"]) for r in records)
    print(f"{'kernel':{width}} {'drawn %':>8} {'max %':>6} {'error %':>8} {'ms':>9} {'p99 ms':>9} {'limit ms':>9} {'x limit':>8} "
          f"{'speed-up':>8} {'build s':>8} {'B/token':>8}  hash/retrieve/attend/update %")  # fmt: skip
    for r in records:
        ms, limit = r["median_ms"], r["limit_ms"]
        cells = [
            _cell(r["sampled"] and 100 * r["sampled"], 8, 2),
            _cell(r["sampled"] and 100 * r["sampled_max"], 6, 1),
            _cell(100 * r["rel_error"], 8, 2),
            _cell(ms, 9, 3),
            _cell(r["p99_ms"], 9, 3),
            _cell(limit, 9, 3),
            _cell(ms and limit and ms / limit, 8, 2),
            _cell(ms and dense and dense / ms, 8, 2),
            _cell(r.get("build_seconds"), 8, 3),
            _cell(r.get("index_bytes_per_token"), 8, 1),
        ]
        print(f"{r['label']:{width}} {' '.join(cells)}  {_split(r.get('split_ms'))}".rstrip())
        if r.get("append"):
            a = r["append"]
            print(f"{'':{width}} {a['tokens']} tokens appended: p50 {a['p50_ms']:.3f} ms, p99 {a['p99_ms']:.3f} ms, "
                  f"max {a['max_ms']:.3f} ms")  # fmt: skip


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _split(parts: dict[str, float] | None) -> str:
    if parts is None:
        return ""
    total = sum(parts.values()) or 1.0
    return "/".join(f"{100 * ms / total:.0f}" for ms in parts.values())


def draw(records: list[Record], path: Path) -> None:
    """Write a PNG with two panels for each case: error against time, error against the fraction drawn. UserError when matplotlib
    is missing or the file cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib, or leave out --plot") from None
    cases = [(title, list(rows)) for title, rows in groupby(records, key=_title)]
    figure = Figure(figsize=(9.0, 3.3 * len(cases)), dpi=DPI, layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        _panel(axes[0], rows, "median_ms", "one step, ms", log=True)
        _panel(axes[1], rows, "sampled", "drawn, % of the context", log=False)
        axes[0].set_ylabel("relative error of the output, %", fontsize=8.5, color=INK)
        axes[0].set_title(title, fontsize=9, color=INK, loc="left", parse_math=False)
        axes[1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
    write_whole(path, buffer.getvalue())


def _title(record: Record) -> str:
    keys = Path(record["keys"]).name
    return f"{keys} keys, {record['context']} tokens, batch {record['batch']}, {record['threads']} threads"


def _panel(axis: Any, rows: list[Record], across: str, name: str, log: bool) -> None:
    """One mark for each contender, and a line through the marks of a kernel that is there several times."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    def at(r: Record) -> tuple[float, float]:
        return r[across] * (1 if log else 100), max(100 * r["rel_error"], _LEAST_ERROR)

    marks = [r for r in rows if r[across] is not None]
    for kernel in dict.fromkeys(r["kernel"] for r in rows):
        colour, marker = next(look for start, look in LOOKS.items() if kernel.startswith(start))
        points = sorted(at(r) for r in marks if r["kernel"] == kernel)
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 0.9, "label": kernel}
        axis.plot([x for x, _ in points], [y for _, y in points], **style)
    for r in marks:
        if r["kernel"] in LSH_INDEXES:
            name_of = r["label"].split(" ", 1)[1]
            axis.annotate(name_of, at(r), xytext=(4, 4), textcoords="offset points", fontsize=6, color=INK)
    axis.set_yscale("log")
    axis.margins(x=0.12)
    if log:
        axis.set_xscale("log")
    for scale in (axis.yaxis, axis.xaxis) if log else (axis.yaxis,):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter(StrMethodFormatter("{x:g}"))
        scale.set_minor_formatter(NullFormatter())
    axis.set_xlabel(name, fontsize=8.5, color=INK)
    axis.tick_params(labelsize=7.5, colors=INK, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)

"""The page of `attnspan report`: one HTML file that needs nothing else, readable on its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.calibration import report_figures as draw
from attnspan.calibration import report_kinds
from attnspan.calibration.report_html import document, figures, fold, table
from attnspan.planner.cost import allocated_bytes, cost, cost_table, format_bytes
from attnspan.planner.inspect import summarise
from attnspan.planner.plan import Plan, ladder

__all__ = ["Candidate", "Report", "page"]

FOLDED = 8
"""Lists longer than this are folded away."""


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried: losses in nats, predicted by length and measured on held-out items (None: not measured)."""

    name: str
    predicted: Mapping[int, float]
    density: float | None = None
    gap: float | None = None
    loss: float | None = None
    dense_loss: float | None = None
    kl: float | None = None
    top1: float | None = None

    @property
    def rise(self) -> float | None:
        """Measured answer loss above the dense model's."""
        return None if self.loss is None or self.dense_loss is None else self.loss - self.dense_loss


@dataclass(frozen=True)
class Report:
    """What a page shows. chosen: name of the candidate that is `plan`; held_out: length in tokens and number of the items that
    candidates were measured on; lengths: those to show spans at, rising; curves float64 [layers, kv_heads, N/64 + 1] by length N,
    of the dense model; evaluation: content of results.json."""

    plan: Plan
    chosen: str | None
    candidates: Sequence[Candidate]
    held_out: tuple[int, int] | None
    budget: str
    lengths: Sequence[int]
    curves: Mapping[int, npt.NDArray[np.float64]] | None
    evaluation: Mapping[str, Any] | None
    provenance: Mapping[str, Any]


def page(report: Report) -> str:
    """The HTML document."""
    sections = [
        ("spans", "Span of every head", _spans(report)),
        ("kinds", "Spans, dense and sampled heads", report_kinds.section(report.plan)),
        ("distribution", "How many heads keep how much", _distribution(report)),
        ("front", "Candidates by predicted loss", _front(report)),
        ("measured", "Predicted and measured loss", _measured(report)),
        ("memory", "KV cache by context length", _memory(report)),
        ("influence", "Which layers matter", _influence(report)),
        ("evaluation", "Evaluation", _evaluation(report)),
        ("provenance", "Where this plan comes from", _provenance(report)),
    ]
    title = f"Attention spans of {report.plan.model.id}"
    top = f"<header>\n<h1>{escape(title)}</h1>\n{_header(report)}\n</header>"
    shown = [f'<section id="{key}">\n<h2>{name}</h2>\n{text}\n</section>' for key, name, text in sections if text]
    return document(title, "\n".join([top, *shown]))


def _header(report: Report) -> str:
    plan, model = report.plan, report.plan.model
    at = cost(plan, plan.n_max)
    size = f", head size {model.head_dim}" if model.head_dim else ""
    text = f"{model.layers} layers, {model.heads} query heads, {model.kv_heads} KV heads{size}. "
    text += f"Budget: {escape(report.budget)}. " if report.budget else ""
    tiles = [(f"density: share of the KV cache kept at {plan.n_max} tokens", f"{at.density:.3f}")]
    if at.kept_bytes is not None:
        tiles.append((f"KV cache of one sequence, bf16; dense {format_bytes(at.dense_bytes)}", format_bytes(at.kept_bytes)))
    chosen = next((c for c in report.candidates if c.name == report.chosen), None)
    if chosen:
        text += f"The plan is the candidate <strong>{escape(chosen.name)}</strong>, one of {len(report.candidates)}. "
        if chosen.loss is not None and chosen.dense_loss is not None:
            tiles.append((f"answer loss on held-out documents, nats; dense {chosen.dense_loss:.4f}", f"{chosen.loss:.4f}"))
        if chosen.kl is not None:
            tiles.append(("KL divergence from the dense model there, nats", f"{chosen.kl:.4f}"))
        if chosen.top1 is not None:
            tiles.append(("of the answer tokens there, the most likely token is the dense model's", f"{chosen.top1:.1%}"))
    text += "Each KV head keeps the first 64 tokens and a window of recent ones; its span counts both and grows with the text. "
    if report.held_out:
        text += f"Held out: {report.held_out[1]} documents of {report.held_out[0]} tokens that the plan was not made with."
    else:
        text += "What the plan does to answers was not measured."
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    return f'<p>{text}</p>\n<dl class="tiles">{shown}</dl>'


def _spans(report: Report) -> str:
    plan = report.plan
    sampled = any(rule.mode == "lsh" for layer in plan.rules for rule in layer)
    text = "Each cell is a KV head, its colour the share of the text it keeps"
    text += "; a diagonal marks a head that keeps all of it and samples. " if sampled else ". "
    text += "The first map is at the longest text, with the mean of each layer above it; point at a cell for its span in tokens"
    shorter = [n for n in report.lengths if n != plan.n_max]
    text += ". The others show shorter texts." if shorter else "."
    small = figures(*(draw.heat_map(plan, n, draw.HALF, detailed=False) for n in shorter)) if shorter else ""
    rows = [
        [row["layer"], row["min"], f"{row['mean']:.0f}", row["max"], f"{row['density']:.3f}", format_bytes(row["kv_bytes"])]
        for row in summarise(plan)["layers"]
    ]
    listed = table("Spans in tokens, by layer", ["layer", "least", "mean", "most", "density", "KV cache, bf16"], rows)
    return f"<p>{text}</p>{figures(draw.colour_bar())}{figures(draw.heat_map(plan, plan.n_max))}{small}" + fold(
        f"Spans by layer at {plan.n_max} tokens, as a table", listed
    )


def _distribution(report: Report) -> str:
    parts = [f"1/{round(1 / share)}" for share in draw.CLASSES[:-1]]
    names = [f"up to {parts[0]}", *(f"{a} to {b}" for a, b in pairwise(parts)), f"over {parts[-1]}", "everything"]
    rows = [[n, *draw.counts(report.plan, n), f"{report.plan.density(n):.3f}"] for n in report.lengths]
    return (
        "<p>One bar for each length of text, all KV heads in it: the brighter a part, the more of the text its heads keep.</p>"
        + figures(draw.distribution(report.plan, report.lengths, names))
        + table("KV heads by the share of the text they keep", ["length, tokens", *names, "density"], rows)
    )


def _front(report: Report) -> str:
    """Predicted losses of the candidates at the shortest and the longest profiled length, or against density."""
    candidates = [c for c in report.candidates if c.predicted]
    lengths = sorted(set.intersection(*(set(c.predicted) for c in candidates))) if candidates else []
    if not lengths:
        return ""
    short, far = lengths[0], lengths[-1]
    label = f"predicted loss at {short} tokens, nats" if short < far else f"density at {report.plan.n_max} tokens"
    across = [(c, c.predicted[short] if short < far else c.density) for c in candidates]
    points = [draw.Point(c.name, x, c.predicted[far], c.name == report.chosen) for c, x in across if x is not None]
    if len(points) < 2:
        return ""
    return (
        "<p>Down and to the left is better. The line joins the candidates that no other beats on both axes; the larger dot is "
        "the plan of this page.</p>"
        + figures(draw.scatter(points, label, f"predicted loss at {far} tokens, nats", draw.WIDE, front=True))
    )


def _measured(report: Report) -> str:
    candidates = report.candidates
    if not candidates:
        return ""
    lengths = sorted({n for c in candidates for n in c.predicted})
    far = lengths[-1] if lengths else 0
    scored = [c for c in candidates if far in c.predicted and c.rise is not None and c.kl is not None]
    text, plots = "These candidates were not measured: what they cost is predicted only.", ""
    if scored:
        held = f" on {report.held_out[1]} held-out documents of {report.held_out[0]} tokens" if report.held_out else ""
        text = (
            f"Measured{held}. Where the prediction orders candidates well, the dots rise from left to right; it adds up what "
            "heads do one by one, so its size is not that of the measured loss."
        )
        plots = figures(
            *(
                draw.scatter(
                    [draw.Point(c.name, c.predicted[far], getattr(c, key), c.name == report.chosen) for c in scored],
                    f"predicted loss at {far} tokens, nats",
                    label,
                )
                for key, label in (("rise", "measured answer loss above dense, nats"), ("kl", "measured KL from dense, nats"))
            )
        )
    head = ["candidate", *(f"predicted at {n}" for n in lengths), "solver gap", "answer loss", "above dense", "KL", "top-1"]
    rows = []
    for c in candidates:
        name = f"{c.name} (this plan)" if c.name == report.chosen else c.name
        predicted = [_or(c.predicted.get(n), "{:.4g}") for n in lengths]
        measured = [_or(c.loss, "{:.4f}"), _or(c.rise, "{:+.4f}"), _or(c.kl, "{:.4f}"), _or(c.top1, "{:.1%}")]
        rows.append([name, *predicted, _or(c.gap, "{:.2%}"), *measured])
    marked = [i for i, c in enumerate(candidates) if c.name == report.chosen]
    return f"<p>{text}</p>{plots}" + table("Candidates; losses of the answers in nats", head, rows, marked)


def _or(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _memory(report: Report) -> str:
    plan = report.plan
    known = plan.model.head_dim is not None
    text = "What the keys and values of one sequence take, with this plan and dense"
    text += ", in bf16." if known else ", in slots: a slot is one token of one head, whose size the plan does not know."
    if known:
        owns = format_bytes(allocated_bytes(plan, "bf16"))
        text += f" An artefact made for texts of up to {plan.n_max} tokens sets aside {owns} for each sequence."
    rows = []
    for row in cost_table(plan, sorted({*ladder(plan.n_max), *report.lengths})):
        sizes = (format_bytes(row.kept_bytes), format_bytes(row.dense_bytes)) if known else (row.kept_slots, row.dense_slots)
        rows.append([row.n, *sizes, f"{row.density:.3f}", f"{1 / row.density:.2f}"])
    head = ["length, tokens", "plan", "dense", "density", "times smaller"]
    return f"<p>{text}</p>{figures(draw.memory(plan))}" + table("KV cache of one sequence", head, rows)


def _influence(report: Report) -> str:
    if not report.curves:
        return ""
    return (
        "<p>What the answers are predicted to lose when all heads of a layer keep only the smallest span, 128 tokens, and "
        "everything else stays dense. A good plan spends its budget where the bars are high.</p>"
        + figures(draw.influence(report.curves))
    )


def _evaluation(report: Report) -> str:
    if report.evaluation is None:
        return ""
    totals = report.evaluation["totals"]
    methods = list(dict.fromkeys(str(x["method"]) for x in totals))
    cells = {(str(x["task"]), x["length"], str(x["method"])): x for x in totals}
    parts = []
    for caption, exact in (("Exact answers, with 95% intervals", True), ("Perplexity of the answers", False)):
        rows = []
        for task, n in dict.fromkeys((task, n) for (task, n, _), x in cells.items() if (x["accuracy"] is not None) == exact):
            found = [cells.get((task, n, method)) for method in methods]
            items = max(x["n"] for x in found if x is not None)
            rows.append([task, n, items, *("-" if x is None else _result(x) for x in found)])
        if rows:
            parts.append(table(caption, ["task", "length, tokens", "items", *methods], rows))
    densities = report.evaluation.get("densities", {})
    if densities:
        lengths = dict.fromkeys(x["length"] for x in totals)
        rows = [[n, *(_or(densities.get(method, {}).get(str(n)), "{:.3f}") for method in methods)] for n in lengths]
        parts.append(table("Density: share of the KV cache that a method keeps", ["length, tokens", *methods], rows))
    return "<p>Every method answered the same items. Compare methods of about the same density.</p>" + "".join(parts)


def _result(x: Mapping[str, Any]) -> str:
    if x["accuracy"] is None:
        return f"{x['ppl']:.3f}"
    return f"{x['accuracy']:.0%} ({100 * x['low']:.0f}-{100 * x['high']:.0f})"


def _provenance(report: Report) -> str:
    """Everything that is known of the making; long lists are folded away."""
    plan = report.plan
    rows, folded = [["shape", f"{plan.model.id}, config {plan.model.config_hash or 'unknown'}"]], ""
    for key, value in report.provenance.items():
        name, shown = key.replace("_", " "), _value(value)
        if isinstance(value, Mapping):
            shown = ", ".join(f"{k} {_value(v)}" for k, v in value.items() if v is not None)
        elif isinstance(value, list | tuple) and len(value) > FOLDED:
            folded += fold(f"{name}: all {len(value)}", f'<p class="ids">{escape(shown)}</p>')
            shown = f"{len(value)}, listed below"
        rows.append([name, shown])
    if plan.solver_gap is not None:
        rows.append(["solver gap", f"{plan.solver_gap:.2%}"])
    return table("What the plan was made from, and how", [], rows) + folded


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return value if isinstance(value, str) else json.dumps(value)

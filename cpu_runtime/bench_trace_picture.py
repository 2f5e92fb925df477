"""The picture of a trace: a prompt and one step, a lane for each part on each provider."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnspan.cpu_runtime.bench_trace import COLOURS, KINDS, Event, Run
from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole

__all__ = ["check_matplotlib", "draw", "layer_runs", "sampled_layer"]

_INK = "#333333"
_ATTENTION = ("SpanAttention", "LshHash", "LshAttention", "MergeAttention")


def check_matplotlib() -> None:
    """UserError where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError("the picture of a trace needs matplotlib: pip install matplotlib, or drop --trace") from None


def draw(runs: Sequence[Run], path: Path, label: str) -> None:
    """Write a PNG: the runs of the prompt, the step of median duration, and of a sampled layer in it the attention. Times in ms.

    Dotted lines: where the attention of a layer begins. UserError when the file cannot be written.
    """
    from matplotlib.figure import Figure

    prompt = [run for run in runs if run.phase == "prefill"]
    steps = sorted((run for run in runs if run.phase != "prefill"), key=lambda run: run.duration)
    step = steps[len(steps) // 2]
    panels = [("prompt", prompt), (step.phase, [step])]
    layer = sampled_layer(step)
    if layer is not None:
        panels.append((f"{step.phase}: attention of layer {layer.events[0].layer}", [layer]))
    lanes = sorted({_lane(event) for run in (*prompt, step) for event in run.events}, key=_order)
    figure = Figure(figsize=(12.0, (0.8 + 0.25 * len(lanes)) * len(panels)), dpi=150, layout="constrained")
    figure.suptitle(label, fontsize=9, color=_INK, x=0.01, ha="left")
    for axis, (title, chosen) in zip(figure.subplots(len(panels), 1), panels, strict=True):
        _panel(axis, title, chosen, lanes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
    write_whole(path, buffer.getvalue())


def layer_runs(step: Run) -> list[Run]:
    """Of a step the attention of each sampled layer, from its first node to its last, as a run."""
    layers: dict[int, list[Event]] = {}
    for event in step.events:
        if event.layer is not None and event.lane[0] != "GPU" and event.kind in _ATTENTION:
            layers.setdefault(event.layer, []).append(event)
    runs = []
    for events in layers.values():
        if any(event.kind == "LshAttention" for event in events):
            start = min(event.start for event in events)
            runs.append(Run(step.phase, start, max(event.end for event in events) - start, events))
    return runs


def sampled_layer(step: Run) -> Run | None:
    """Of a step the sampled layer whose attention takes the median time; None without sampled layers."""
    runs = sorted(layer_runs(step), key=lambda run: run.duration)
    return runs[len(runs) // 2] if runs else None


def _lane(event: Event) -> tuple[str, str]:
    """Lanes of nodes by provider and part; the device's own by stream."""
    return (event.lane[0], event.lane[1] if event.lane[0] == "GPU" else event.kind)


def _order(lane: tuple[str, str]) -> tuple[int, int, str]:
    provider, part = lane
    return (0 if provider == "GPU" else 2 if provider == "CPU" else 1, KINDS.index(part) if part in KINDS else -1, part)


def _panel(axis: Any, title: str, runs: Sequence[Run], lanes: Sequence[tuple[str, str]]) -> None:
    first = runs[0].start
    for row, lane in enumerate(lanes):
        for kind in KINDS:
            bars = [((e.start - first) / 1e3, e.duration / 1e3) for run in runs for e in run.events
                    if _lane(e) == lane and e.kind == kind]  # fmt: skip
            axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=COLOURS[kind], linewidth=0)
    if len(runs) == 1:
        begins: dict[int, float] = {}
        for event in runs[0].events:
            if event.layer is not None and event.kind not in ("maths", "copies"):
                begins.setdefault(event.layer, (event.start - first) / 1e3)
        for at in begins.values():
            axis.axvline(at, color="#bbbbbb", linewidth=0.5, linestyle=":", zorder=0)
    axis.set_yticks(range(len(lanes)), [f"{provider}: {part}" for provider, part in lanes], fontsize=7.5, color=_INK)
    axis.set_ylim(len(lanes) - 0.5, -0.5)
    axis.set_xlim(0, (runs[-1].start + runs[-1].duration - first) / 1e3)
    axis.set_title(title, fontsize=8.5, color=_INK, loc="left")
    axis.set_xlabel("ms", fontsize=8, color=_INK)
    axis.tick_params(labelsize=7.5, colors=_INK)
    axis.spines[["top", "right"]].set_visible(False)

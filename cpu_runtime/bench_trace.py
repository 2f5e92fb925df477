"""What `attnspan bench generate --trace` writes: where the time of a prompt and of some steps goes, op by op.

ONNX Runtime's profiler times the nodes. Here they become lanes of a Chrome trace (chrome://tracing, ui.perfetto.dev), sums by
part, and a picture.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnspan.cpu_runtime.streams import NEAR
from attnspan.runtime.artefact import Artefact

__all__ = ["KINDS", "STEPS", "Event", "Run", "chrome_trace", "hidden", "overlap", "read_runs", "record", "table"]

STEPS = 4
"""Decode steps of a trace."""
KINDS = ("maths", "SpanAttention", "LshHash", "LshAttention", "MergeAttention", "Attention", "copies")
"""Parts of a step. `Attention`: standard ONNX attention and its cache updates."""
COLOURS = dict(zip(KINDS, ("#9aa5b1", "#2f6db5", "#c98b17", "#c0392b", "#2e8b57", "#5b4a9e", "#e377c2"), strict=True))

_STANDARD = {"Attention", "GroupQueryAttention", "MultiHeadAttention", "TensorScatter"}
_LAYER = re.compile(r"layers\.(\d+)")
_CHROME = dict(zip(KINDS, ("grey", "thread_state_running", "yellow", "terrible", "good", "rail_animation", "olive"), strict=True))


@dataclass(frozen=True)
class Event:
    """One call of a node, or a kernel on the GPU. start, duration: microseconds; lane: provider, and thread or stream."""

    name: str
    kind: str
    lane: tuple[str, str]
    start: float
    duration: float
    layer: int | None
    op: str

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass
class Run:
    """One run of the model: `prefill`, or `step 1`, ... start, duration: microseconds."""

    phase: str
    start: float
    duration: float
    events: list[Event]


def record(artefact: Artefact, prompts: Sequence[Sequence[int]], options: dict[str, Any]) -> list[Run]:
    """Prefill the prompts and decode STEPS tokens in a session of its own, after a warm-up. options: as `Session` takes them."""
    from attnspan.cpu_runtime.session import Session

    with tempfile.TemporaryDirectory(prefix="attnspan-trace-") as folder:
        session = Session(artefact, **options, profile=Path(folder) / "profile")
        for row, prompt in enumerate(prompts):
            session.prefill(row, prompt[:2])
        warm_up = len(prompts) + 2  # so short a prompt is one run
        for _ in range(warm_up - len(prompts)):
            session.decode([0] * len(prompts))
        session.reset()
        for row, prompt in enumerate(prompts):
            session.prefill(row, prompt)
        for _ in range(STEPS):
            session.decode([0] * len(prompts))
        content = json.loads(session.end_profile().read_text(encoding="utf-8"))
    return read_runs(content, warm_up)


def read_runs(content: Iterable[dict[str, Any]], skip: int) -> list[Run]:
    """The runs in a profile of ONNX Runtime, without the first `skip`: the last STEPS are steps, the others the prompt's."""
    entries = [entry for entry in content if "dur" in entry]
    spans = sorted((e["ts"], e["dur"]) for e in entries if e.get("cat") == "Session" and e["name"] == "model_run")[skip:]
    runs = [Run("prefill", start, duration, []) for start, duration in spans]
    for number, run in enumerate(runs[-STEPS:], 1):
        run.phase = f"step {number}"
    for event in sorted(_events(entries), key=lambda event: event.start):
        # A kernel belongs to the run that launched it, which waits for it: it ends inside.
        for run in runs:
            if run.start <= event.start < run.start + run.duration:
                run.events.append(event)
    return runs


def _events(entries: Iterable[dict[str, Any]]) -> Iterable[Event]:
    for entry in entries:
        given = entry.get("args", {})
        if entry.get("cat") == "Node" and entry["name"].endswith("_kernel_time"):
            name, op = entry["name"].removesuffix("_kernel_time"), given.get("op_name", "")
            provider = given.get("provider", "").removesuffix("ExecutionProvider") or "CPU"
            lane = (provider, f"thread {entry['tid']}")
        elif entry.get("cat") == "Kernel":  # of CUDA builds: what the device did, and for which node
            name, op = entry["name"], given.get("op_name", "")
            lane = ("GPU", f"stream {given.get('stream', entry['tid'])}")
        else:
            continue
        found = _LAYER.search(given.get("parent_name", "") or name)
        layer = int(found.group(1)) if found else None
        yield Event(name, _kind(op, name), lane, float(entry["ts"]), float(entry["dur"]), layer, op)


def _kind(op: str, name: str) -> str:
    if op in KINDS:
        return op
    if op.startswith("Memcpy") or "memcpy" in name.lower():
        return "copies"
    return "Attention" if op in _STANDARD else "maths"


def chrome_trace(runs: Sequence[Run], label: str) -> dict[str, Any]:
    """The runs as Chrome's trace event format: a process for the runs and each provider, a thread for each thread or stream."""
    lanes = list(dict.fromkeys(event.lane for run in runs for event in run.events))
    providers = list(dict.fromkeys(provider for provider, _ in lanes))
    entries: list[dict[str, Any]] = []

    def named(what: str, pid: int, tid: int, name: str) -> None:
        entries.append({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}})

    named("process_name", 0, 0, label)
    named("thread_name", 0, 0, "runs")
    for pid, provider in enumerate(providers, 1):
        named("process_name", pid, 0, "GPU kernels" if provider == "GPU" else f"{provider} provider")
    for tid, (provider, thread) in enumerate(lanes):
        named("thread_name", 1 + providers.index(provider), tid, thread)
    for run in runs:
        entries.append({"ph": "X", "name": run.phase, "cat": "run", "pid": 0, "tid": 0, "ts": run.start, "dur": run.duration})
        for event in run.events:
            entries.append({
                "ph": "X", "name": event.op or event.name, "cat": event.kind, "cname": _CHROME[event.kind],
                "pid": 1 + providers.index(event.lane[0]), "tid": lanes.index(event.lane), "ts": event.start,
                "dur": event.duration, "args": {"node": event.name, "layer": event.layer, "run": run.phase},
            })  # fmt: skip
    return {"traceEvents": entries, "displayTimeUnit": "ms"}


def table(runs: Sequence[Run]) -> str:
    """Milliseconds by part and provider: of the prompt, and of a step on average. The rest of a run is between its nodes."""
    steps = [run for run in runs if run.phase != "prefill"]
    phases = ([run for run in runs if run.phase == "prefill"], steps)
    sums: dict[tuple[str, str], list[float]] = {}
    calls: dict[tuple[str, str], int] = {}
    host = [0.0, 0.0]
    for column, phase in enumerate(phases):
        for event in (event for run in phase for event in run.events):
            key = (event.kind, event.lane[0])
            sums.setdefault(key, [0.0, 0.0])[column] += event.duration
            calls[key] = calls.get(key, 0) + column
        for run in phase:
            host[column] += _length(_merged((e.start, e.end) for e in run.events if e.lane[0] != "GPU"))
    totals = [sum(run.duration for run in phase) for phase in phases]
    count = max(len(steps), 1)
    order = sorted(sums, key=lambda key: (key[1], KINDS.index(key[0])))
    head = ["part", "provider", "prefill ms", "", "step ms", "", "calls a step"]
    rows = [[kind, where, *_cells(sums[kind, where], totals, count), f"{calls[kind, where] / count:g}"] for kind, where in order]
    between = [max(total - busy, 0.0) for total, busy in zip(totals, host, strict=True)]
    rows += [["between nodes", "", *_cells(between, totals, count), ""], ["in all", "", *_cells(totals, totals, count), ""]]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row[:2], widths[:2], strict=True)),
                        *(cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True))]).rstrip()
             for row in [head, *rows]]  # fmt: skip
    both, gpu = overlap(steps)
    if gpu:
        lines.append(f"GPU kernels at work: {gpu / count / 1e3:.2f} ms a step, {both / gpu:.0%} of it while LshAttention runs")
    both, near = hidden(steps)
    if near:
        lines.append(f"near parts: {near / count / 1e3:.2f} ms a step, {both / near:.0%} of it while the far part runs")
    return "\n".join(lines)


def _cells(values: Sequence[float], totals: Sequence[float], steps: int) -> list[str]:
    cells = []
    for value, total, runs in zip(values, totals, (1, steps), strict=True):
        cells += [f"{value / runs / 1e3:.2f}", f"{value / total:.0%}" if total else ""]
    return cells


def overlap(runs: Sequence[Run]) -> tuple[float, float]:
    """Microseconds in which GPU kernels run while the CPU samples, and those in which GPU kernels run."""
    both = gpu = 0.0
    for run in runs:
        busy = _merged((e.start, e.end) for e in run.events if e.lane[0] == "GPU")
        sampling = _merged((e.start, e.end) for e in run.events if e.kind == "LshAttention" and e.lane[0] != "GPU")
        gpu += _length(busy)
        both += _common(busy, sampling)
    return both, gpu


def hidden(runs: Sequence[Run]) -> tuple[float, float]:
    """Microseconds in which near parts on the CPU run while far parts of the same layer do, and those in which near parts run.

    Near parts on a GPU are left out: their nodes' times are those of launches.
    """
    both = near = 0.0
    for run in runs:
        layers: dict[int | None, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {}
        for event in run.events:
            if event.lane[0] == "CPU" and (event.kind == "LshAttention" or NEAR.fullmatch(event.name)):
                layers.setdefault(event.layer, ([], []))[event.kind == "LshAttention"].append((event.start, event.end))
        for parts in layers.values():
            close, far = map(_merged, parts)
            near += _length(close)
            both += _common(close, far)
    return both, near


def _merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times without overlap, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(merged: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in merged)


def _common(first: Iterable[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float:
    """How long both last; neither overlaps itself."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)

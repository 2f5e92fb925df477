"""Decode steps of target hybrid with near and far parts in turn, and at the same time, on random weights of Llama-3.1-8B's shape.

    python benchmarks/hybrid_overlap.py [--context 65536] [--window 8192] [--threads 1] [--save FILE] [--artefact DIR]

One artefact, on the CPU provider, in two sessions whose steps take turns; caches filled as by hybrid_decode.py. Prints, per
session, medians in ms of a step, of near and far parts and of attention from its first node to its last, summed over layers, and
the share of the near parts' time in which the far part of the layer runs; `equal`: whether both gave the same logits, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from hybrid_decode import WARM_UP, export, fill, sampled

from attnspan.cpu_runtime.bench_trace import Run, hidden, read_runs
from attnspan.cpu_runtime.bench_trace_picture import layer_runs
from attnspan.cpu_runtime.loading import default_threads
from attnspan.cpu_runtime.session import Session

VOCABULARY = 2048
SETTLE = 0.05
"""Seconds between steps, so that threads of the other session no longer spin."""


def summary(runs: list[Run]) -> dict[str, float]:
    """Medians of steps in milliseconds, and the hidden share of all of them."""

    def total(kind: str) -> float:
        return statistics.median(sum(e.duration for e in run.events if e.kind == kind) for run in runs)

    found = {
        "step": statistics.median(run.duration for run in runs),
        "near": total("SpanAttention"),
        "far": total("LshAttention"),
        "attention": statistics.median(sum(layer.duration for layer in layer_runs(run)) for run in runs),
    }
    return {name: round(value / 1e3, 2) for name, value in found.items()} | {"hidden": _share(runs)}


def measure(folder: Path, context: int, rounds: int, threads: int | None) -> tuple[dict[str, Any], dict[str, list[Run]]]:
    """The figures of both sessions, and their steps."""
    logits: dict[str, list[Any]] = {"in_turn": [], "at_once": []}
    with tempfile.TemporaryDirectory() as profiles:
        sessions = {
            name: Session(folder, threads=threads, check_memory=False, profile=Path(profiles) / name, overlap=name == "at_once")
            for name in logits
        }
        for session in sessions.values():
            fill(session, context)
        for turn in range(WARM_UP + rounds):
            for name in sorted(sessions, reverse=turn % 2 == 0):
                time.sleep(SETTLE)
                logits[name].append(sessions[name].decode([0]))
        steps = {
            name: read_runs(json.loads(session.end_profile().read_text(encoding="utf-8")), WARM_UP)
            for name, session in sessions.items()
        }
    equal = all(np.array_equal(a, b) for a, b in zip(*logits.values(), strict=True))
    return {
        "context": context,
        "threads": threads or default_threads(),
        **{name: summary(runs) for name, runs in steps.items()},
        "equal": equal,
    }, steps


def layer_data(steps: list[Run]) -> dict[str, Any]:
    """The attention of one layer, [op, start, end] in milliseconds: of all the one in which the median share is hidden."""
    layers = [layer for run in steps for layer in layer_runs(run)]
    layer = sorted(layers, key=lambda run: (_share([run]), run.duration))[len(layers) // 2]
    events = [
        [e.kind, round((e.start - layer.start) / 1e3, 3), round((e.end - layer.start) / 1e3, 3)]
        for e in sorted(layer.events, key=lambda e: e.start)
    ]
    return {"layer": layer.events[0].layer, "ms": round(layer.duration / 1e3, 3), "events": events}


def _share(runs: list[Run]) -> float:
    both, near = hidden(runs)
    return round(both / near, 2)


def main() -> int:
    """Command line; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=65536, help="tokens in the caches (65536)")
    parser.add_argument("--window", type=int, default=8192, help="tokens that near parts see (8192)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=0.02, help="share of the keys that a query draws (0.02)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--save", type=Path, help="write the attention of one layer to this file, for docs/pictures")
    parser.add_argument("--artefact", type=Path, help="measure this one in place of a new one")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="hybrid-overlap-"))
    try:
        n_max = args.context + WARM_UP + args.rounds + 1
        wanted = {"hybrid": ("hybrid", sampled(args.window, args.fraction))}
        folder = args.artefact or export(work, args.layers, VOCABULARY, n_max, wanted)["hybrid"]
        figures, steps = measure(folder, args.context, args.rounds, args.threads)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(figures))
    if args.save is not None:
        data = {"figures": figures, **{name: layer_data(runs) for name, runs in steps.items()}}
        args.save.write_text(json.dumps(data) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

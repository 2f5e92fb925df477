"""Decode steps of target hybrid beside a dense session, on random weights of Llama-3.1-8B's shape, split by part.

    python benchmarks/hybrid_decode.py --contexts 65536,131040 [--layers 4] [--vocabulary 32000] [--fraction 0.02] [--folder DIR]

Both artefacts compute in fp32 with bf16 caches, on the CPU provider. Their caches are filled with random keys and values in place
of reading a prompt; the first step of the hybrid session then builds its indexes, and is not timed. Steps of the two sessions
take turns. What belongs to layers is scaled to the 32 layers of the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from export_size import SHAPES, write_checkpoint

from attnspan.cpu_runtime.bench_trace import Run, read_runs
from attnspan.cpu_runtime.session import Session
from attnspan.export.pipeline import Options, export_model
from attnspan.export.source import read_model
from attnspan.planner.plan import Plan
from attnspan.planner.rules import HeadRule, LshParams

LAYERS = 32
WARM_UP = 2


def export(work: Path, layers: int, vocabulary: int, n_max: int, wanted: Mapping[str, tuple[str, HeadRule]]) -> dict[str, Path]:
    """Artefacts by name, each of a target and with one rule for all heads."""
    write_checkpoint(work / "model", SHAPES["8b"] | {"num_hidden_layers": layers, "vocab_size": vocabulary})
    shape = read_model(str(work / "model"))[0]
    made = {}
    for name, (target, rule) in wanted.items():
        plan = work / f"{name}.json"
        Plan(model=shape, n_max=n_max, rules=[[rule] * shape.kv_heads] * layers).save(plan)
        export_model(
            Options(model=str(work / "model"), out=work / name, plan=plan, target=target, dtype="fp32", cache_dtype="bf16")
        )
        made[name] = work / name
    shutil.rmtree(work / "model")
    return made


def sampled(window: int, fraction: float) -> HeadRule:
    """A head that is sampled by sketches but for its window."""
    return HeadRule("lsh", lsh=LshParams("sketch", window, fraction=fraction))


def fill(session: Session, tokens: int) -> None:
    """Random keys and values of so many tokens in row 0, and an empty index."""
    block = np.random.default_rng(0).standard_normal(2**22, np.float32)
    bits = (block.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16, cut off
    for _, array in session._caches.views(0, tokens):
        flat = array.reshape(-1)
        if array.dtype == np.uint8:
            flat[:] = 0
            continue
        for first in range(0, flat.size, bits.size):
            flat[first : first + bits.size] = bits[: flat.size - first]
    session.state.reset([0])
    session.state.advance(0, [0] * tokens)


def parts(runs: list[Run], layers: int) -> dict[str, float]:
    """Milliseconds of a step by part, medians over runs, scaled to LAYERS but for the last matrix product, which is the head.

    `in all` is the sum with what lies between nodes, scaled, too.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        scale, sums = LAYERS / layers, defaultdict[str, float](float)
        head = [event for event in run.events if event.op in ("Gemm", "MatMul", "FusedMatMul")][-1]
        for event in run.events:
            sums["head" if event is head else event.kind] += event.duration * (1 if event is head else scale)
        sums["between nodes"] = max(run.duration - sum(event.duration for event in run.events), 0) * scale
        sums["in all"] = sum(sums.values())
        for kind, value in sums.items():
            found[kind].append(value / 1e3)
    return {kind: round(statistics.median(values), 2) for kind, values in found.items()}


def measure(folders: dict[str, Path], context: int, rounds: int, layers: int, threads: int | None) -> dict[str, Any]:
    """Milliseconds by part of each artefact at a context."""
    with tempfile.TemporaryDirectory() as profiles:
        sessions = {
            name: Session(folder, threads=threads, check_memory=False, profile=Path(profiles) / name)
            for name, folder in folders.items()
        }
        for session in sessions.values():
            fill(session, context)
        for _ in range(WARM_UP + rounds):
            for session in sessions.values():
                session.decode([0])
        found = {}
        for name, session in sessions.items():
            content = json.loads(session.end_profile().read_text(encoding="utf-8"))
            found[name] = parts(read_runs(content, WARM_UP), layers)
    return {"context": context, **found, "speed_up": round(found["dense"]["in all"] / found["hybrid"]["in all"], 2)}


def main() -> int:
    """Command line; prints one JSON object a line and context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="65536,131040", help="tokens in the caches (65536,131040)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--fraction", type=float, default=0.02, help="share of the keys that a query draws (0.02)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder); nothing is left in it")
    args = parser.parse_args()
    contexts = [int(word) for word in args.contexts.split(",")]
    work = Path(tempfile.mkdtemp(dir=args.folder, prefix="hybrid-decode-"))
    try:
        n_max = max(contexts) + WARM_UP + args.rounds + 1
        wanted = {"dense": ("cpu", HeadRule("dense")), "hybrid": ("hybrid", sampled(64, args.fraction))}
        folders = export(work, args.layers, args.vocabulary, n_max, wanted)
        for context in contexts:
            print(json.dumps(measure(folders, context, args.rounds, args.layers, args.threads)), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`attnspan bench generate --trace`: profiles of ONNX Runtime as runs, tables, traces and pictures."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sampled_artefacts import INDEXES, needs_library
from tiny_models import export_rules

from attnspan.cpu_runtime.bench_trace import STEPS, chrome_trace, hidden, overlap, read_runs, table
from attnspan.cpu_runtime.bench_trace_picture import draw, layer_runs, sampled_layer
from attnspan.export.cli import main
from attnspan.planner.rules import HeadRule

OURS, GPU = "CPUExecutionProvider", "CUDAExecutionProvider"


def node(name: str, op: str, start: int, duration: int, provider: str = OURS, tid: int = 7) -> dict[str, Any]:
    return {"cat": "Node", "ph": "X", "pid": 1, "tid": tid, "ts": start, "dur": duration, "name": f"{name}_kernel_time",
            "args": {"op_name": op, "provider": provider}}  # fmt: skip


def kernel(name: str, op: str, start: int, duration: int) -> dict[str, Any]:
    return {"cat": "Kernel", "ph": "X", "pid": 1, "tid": 0, "ts": start, "dur": duration, "name": name,
            "args": {"stream": "13", "op_name": op}}  # fmt: skip


def hybrid_profile() -> list[dict[str, Any]]:
    """A warm-up, a prompt in two runs, and steps: launches on one thread, the sampling on another, kernels on the device."""
    entries: list[dict[str, Any]] = [{"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 50, "tid": 1}]
    for start in (100, 1100, 2100, *range(3100, 3100 + 1000 * STEPS, 1000)):
        entries.append({"cat": "Session", "name": "model_run", "ts": start, "dur": 900, "tid": 1})
        entries += [
            node("q_proj", "MatMul", start + 10, 20, GPU),
            node("Memcpy_token_3", "MemcpyToHost", start + 40, 10, GPU),
            node("layers.0.near.attention", "SpanAttention", start + 60, 10, GPU),
            node("layers.0.attention", "LshAttention", start + 100, 400, tid=9),
            node("layers.0.merge", "MergeAttention", start + 520, 10, GPU),
            kernel("gemm", "MatMul", start + 20, 60),
            kernel("span_decode", "SpanAttention", start + 90, 310),
            kernel("merge_chunks", "SpanAttention", start + 400, 50),
            kernel("merge", "MergeAttention", start + 530, 30),
        ]
    return entries


def test_runs_of_a_hybrid_profile() -> None:
    runs = read_runs(hybrid_profile(), skip=1)
    assert [run.phase for run in runs] == ["prefill", "prefill", *(f"step {i}" for i in range(1, STEPS + 1))]
    assert {len(run.events) for run in runs} == {9}
    step = runs[-1].events
    assert [(event.kind, event.lane[0]) for event in step if event.lane[0] != "GPU"] == [
        ("maths", "CUDA"), ("copies", "CUDA"), ("SpanAttention", "CUDA"), ("LshAttention", "CPU"), ("MergeAttention", "CUDA"),
    ]  # fmt: skip
    assert [event.layer for event in step if event.kind == "LshAttention"] == [0]


def test_the_gpu_works_while_the_cpu_samples() -> None:
    steps = read_runs(hybrid_profile(), skip=1)[-STEPS:]
    # Of the kernels' 90..450 the sampling, 100..500, leaves out 10; the others lie outside.
    assert overlap(steps) == (STEPS * 350, STEPS * (60 + 360 + 30))
    last = table(read_runs(hybrid_profile(), skip=1)).splitlines()[-1]
    assert last == "GPU kernels at work: 0.45 ms a step, 78% of it while LshAttention runs"


def cpu_profile(near: list[tuple[int, int]], far: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """A warm-up, a prompt and steps of the CPU provider alone: near and far parts, a layer each, at (start, duration)."""
    entries: list[dict[str, Any]] = []
    for start in range(0, 1000 * (2 + STEPS), 1000):
        entries.append({"cat": "Session", "name": "model_run", "ts": start, "dur": 900, "tid": 1})
        entries.append(node("layers.7.attention", "SpanAttention", start, 10))  # a dense layer: neither near nor far
        for op, tid, name, spans in (("SpanAttention", 7, "near.attention", near), ("LshAttention", 9, "attention", far)):
            entries += [node(f"layers.{i}.{name}", op, start + at, long, tid=tid) for i, (at, long) in enumerate(spans)]
        entries += [node(f"layers.{i}.merge", "MergeAttention", start + at + long + 50, 5) for i, (at, long) in enumerate(far)]
    return entries


@pytest.mark.parametrize(
    ("near", "far", "both"),
    [
        ([(10, 20)], [(30, 100)], 0),  # in turn
        ([(10, 20)], [(10, 100)], 20),  # near inside far
        ([(10, 200)], [(50, 100)], 100),  # far inside near
        ([(10, 60)], [(50, 100)], 20),  # far starts later
        ([(120, 60)], [(50, 100)], 30),  # far ends earlier
        ([(10, 20), (300, 40)], [(20, 100), (310, 20)], 10 + 20),  # layers add up
        ([(10, 20), (300, 40)], [(290, 60), (10, 30)], 0),  # at the same time, but of other layers
    ],
)
def test_share_of_near_parts_behind_far_ones(near: list[tuple[int, int]], far: list[tuple[int, int]], both: int) -> None:
    runs = read_runs(cpu_profile(near, far), skip=1)
    total = sum(long for _, long in near)
    assert hidden(runs[-STEPS:]) == (STEPS * both, STEPS * total)
    last = table(runs).splitlines()[-1]
    assert last == f"near parts: {total / 1e3:.2f} ms a step, {both / total:.0%} of it while the far part runs"


def test_near_parts_on_a_gpu_are_not_counted_by_their_launches() -> None:
    assert hidden(read_runs(hybrid_profile(), skip=1)[-STEPS:]) == (0, 0)


def test_time_between_nodes_counts_what_runs_at_once_only_once() -> None:
    lines = table(read_runs(cpu_profile([(100, 200)], [(100, 300)]), skip=1)).splitlines()
    # 10 of the dense layer, 100..400 of both parts, 5 of the merge.
    assert next(line.split()[4] for line in lines if line.startswith("between nodes")) == f"{(900 - 315) / 1e3:.2f}"[:4]


def test_the_layer_that_the_picture_shows() -> None:
    step = read_runs(cpu_profile([(10, 20), (100, 20), (500, 90)], [(10, 30), (110, 20), (480, 20)]), skip=1)[-1]
    # From the first node to the end of the merge: 85, 85, 110 + 5... of the third the near part ends last.
    assert [(run.events[0].layer, run.start - step.start, run.duration) for run in layer_runs(step)] == [
        (0, 10, 85), (1, 100, 85), (2, 480, 110),
    ]  # fmt: skip
    chosen = sampled_layer(step)
    assert chosen is not None
    assert {event.kind for event in chosen.events} == {"SpanAttention", "LshAttention", "MergeAttention"}
    step.events = [event for event in step.events if event.layer == 7]
    assert sampled_layer(step) is None


def test_table_counts_what_lies_between_nodes() -> None:
    rows = {tuple(line.split()[:2]): line.split() for line in table(read_runs(hybrid_profile(), skip=1)).splitlines()[1:]}
    assert rows["LshAttention", "CPU"] == ["LshAttention", "CPU", "0.80", "44%", "0.40", "44%", "1"]
    assert rows["SpanAttention", "GPU"][-3:] == ["0.36", "40%", "2"]
    assert rows["between", "nodes"] == ["between", "nodes", "0.90", "50%", "0.45", "50%"]
    assert rows["in", "all"] == ["in", "all", "1.80", "100%", "0.90", "100%"]


def test_lanes_of_the_trace() -> None:
    entries = chrome_trace(read_runs(hybrid_profile(), skip=1), "DIR")["traceEvents"]
    names = {(e["pid"], e["name"], e["args"]["name"]) for e in entries if e["ph"] == "M"}
    assert {name for _, what, name in names if what == "process_name"} == {"DIR", "CPU provider", "CUDA provider", "GPU kernels"}
    assert {name for _, what, name in names if what == "thread_name"} == {"runs", "thread 7", "thread 9", "stream 13"}
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for e in entries:
        if e["ph"] == "X":
            lanes.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    assert len(lanes) == 4
    for spans in lanes.values():  # viewers drop what overlaps in a lane
        spans.sort()
        assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_picture(tmp_path: Path) -> None:
    draw(read_runs(hybrid_profile(), skip=1), tmp_path / "t.png", "DIR")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> str:
    span = HeadRule("span", 0, 0.5)
    rules = [[HeadRule("lsh", lsh=INDEXES["signature"]), span], [span, span]]
    folder = tmp_path_factory.mktemp("trace")
    return str(export_rules(folder, rules, n_max=1024, target="hybrid", dtype="fp32").folder)


@needs_library
def test_an_artefact_as_a_user_traces_it(artefact: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json"
    arguments = ["--prompt-tokens", "700", "--batch", "2", "--threads", "1", "--trace", str(file)]
    assert main(["bench", "generate", artefact, *arguments]) == 0
    out = capfd.readouterr().out.splitlines()
    ours = ["SpanAttention", "LshHash", "LshAttention", "MergeAttention"]
    assert [line.split()[0] for line in out] == ["part", "maths", *ours, "between", "in", "near", f"{file}:"]
    assert {line.split()[0]: line.split()[-1] for line in out[2:6]} == dict(zip(ours, "3111", strict=True))
    assert file.with_suffix(".png").is_file()
    entries = json.loads(file.read_text())["traceEvents"]
    runs = [entry["name"] for entry in entries if entry.get("cat") == "run"]
    # Two chunks of each row's prompt; the warm-up is left out.
    assert runs == ["prefill"] * 4 + [f"step {i}" for i in range(1, STEPS + 1)]
    assert {entry["args"]["layer"] for entry in entries if entry.get("cat") == "SpanAttention"} == {0, 1}
    # The order that docs/cuda.md counts on: on a GPU the near part is enqueued behind the copies for the far one.
    step = sorted((e["ts"], e["name"]) for e in entries if e.get("args", {}).get("run") == "step 2" and e["args"]["layer"] == 0)
    assert [name for _, name in step if name in ours][:4] == ["LshHash", "LshAttention", "SpanAttention", "MergeAttention"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "/nowhere/x.json"], "change --trace"),
        (["--trace", "x.txt"], "must end in .json"),
        (["--trace", "x.json", "--json", "y.json"], "--trace takes one artefact, and no --json"),
        (["--trace", "x.json", "--prompt-tokens", "1021"], "1021 prompt and 4 new tokens make 1025"),
        (["--trace", "x.json", "--device", "cuda", "--prompt-tokens", "10"], "device"),
        (["--overlap"], "--overlap is for --trace"),
        (["--trace", "x.json", "--overlap", "--device", "cuda"], "--overlap is for --trace, on device cpu"),
        (["--trace", "x.json", "--overlap", "--no-library"], "with the op library"),
    ],
)
def test_what_is_refused(artefact: str, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", artefact, *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1

"""Near and far parts in streams of their own: at the same time on the CPU provider, and in the order of a GPU session."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from sampled_artefacts import INDEXES, needs_library
from tiny_models import export_rules

from attnspan.cpu_runtime import streams
from attnspan.cpu_runtime.loading import default_threads
from attnspan.cpu_runtime.session import Session
from attnspan.cpu_runtime.streams import near_apart, silent_stdout
from attnspan.export.cli import main
from attnspan.planner.errors import UserError
from attnspan.planner.rules import HeadRule

OURS = ("SpanAttention", "LshAttention")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, both with sampled heads."""
    sampled, span = HeadRule("lsh", lsh=INDEXES["signature"]), HeadRule("span", 0, 0.5)
    folder = tmp_path_factory.mktemp("streams")
    return export_rules(folder, [[sampled, span], [sampled, sampled]], n_max=1024, target="hybrid", dtype="fp32").folder


def decode(session: Session, steps: int) -> list[Any]:
    """Logits of two rows of different lengths, step by step."""
    tokens = np.random.default_rng(3).integers(0, session.vocab_size, 900).tolist()
    session.reset()
    session.prefill(0, tokens[:700])
    session.prefill(1, tokens[:401])
    return [session.decode([step % 50, 7]) for step in range(steps)]


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_results_are_those_of_one_stream(artefact: Path, threads: int) -> None:
    """Bit by bit, step after step: what two nodes at once share, threads and scratch memory, they do not mix up."""
    plain = Session(artefact, batch=2, threads=threads)
    both = Session(artefact, batch=2, threads=threads, overlap=True)
    wanted = decode(plain, 60)
    for _ in range(2):
        for step, (a, b) in enumerate(zip(wanted, decode(both, 60), strict=True)):
            np.testing.assert_array_equal(a, b, err_msg=f"step {step}")


def test_partition_sets_near_parts_apart() -> None:
    names = ["q", "layers.0.near.attention", "layers.0.attention", "layers.1.attention", "layers.1.b.near.attention", "Add"]
    made = near_apart({"type": "T", "streams": [names], "devices": ["0"]})
    rest = ["q", "layers.0.attention", "layers.1.attention", "Add"]
    assert made == {"type": "T", "devices": ["0", "0"], "streams": [rest, [names[1], names[4]]]}
    with pytest.raises(UserError, match="drop --overlap"):
        near_apart({"type": "T", "streams": [rest], "devices": ["0"]})


def far_first(partition: dict[str, Any]) -> dict[str, Any]:
    """As with a GPU: the CPU's nodes in one stream, all else in another."""
    nodes = [name for stream in partition["streams"] for name in stream]
    far = [name for name in nodes if name.endswith(".attention") and not streams.NEAR.fullmatch(name) and "layers." in name]
    return {**partition, "streams": [far, [name for name in nodes if name not in far]], "devices": ["0", "0"]}


@needs_library
@pytest.mark.parametrize(
    ("mode", "first"), [(ort.ExecutionMode.ORT_PARALLEL, "SpanAttention"), (ort.ExecutionMode.ORT_SEQUENTIAL, "LshAttention")]
)
def test_two_inter_op_threads_take_the_near_part_first(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, first: str
) -> None:
    """With the streams of a GPU session: what docs/cuda.md says of ORT_PARALLEL, and what else would happen."""
    create: Callable[..., Any] = ort.InferenceSession

    def with_mode(model: str, options: Any, **given: Any) -> Any:
        options.execution_mode, options.inter_op_num_threads = mode, 2
        return create(model, options, **given)

    monkeypatch.setattr(ort, "InferenceSession", with_mode)
    monkeypatch.setattr(streams, "near_apart", far_first)
    session = Session(artefact, batch=2, threads=1, profile=tmp_path / "profile", overlap=True)
    decode(session, 3)
    entries = json.loads(session.end_profile().read_text(encoding="utf-8"))
    layer = [e for e in entries if e.get("cat") == "Node" and "layers.1." in e["name"]]
    nodes = sorted((e["ts"], e["args"]["op_name"], e["tid"]) for e in layer if e["args"].get("op_name") in OURS)
    ops = [op for _, op, _ in nodes]
    second = OURS[1 - OURS.index(first)]
    assert ops == [first, second] * (len(ops) // 2)
    assert len(ops) >= 2 * 3
    assert len({tid for *_, tid in nodes}) == 1  # the other thread only waits


@needs_library
def test_a_trace_with_overlap(artefact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json"
    arguments = ["--prompt-tokens", "300", "--threads", "1", "--overlap", "--trace", str(file)]
    assert main(["bench", "generate", str(artefact), *arguments]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith("part")  # and not what ONNX Runtime's planner prints
    assert out[-2].startswith("near parts: ")
    entries = json.loads(file.read_text())["traceEvents"]
    assert "near and far parts in streams of their own" in entries[0]["args"]["name"]
    near = [e["args"]["layer"] for e in entries if e.get("cat") == "SpanAttention" and ".near." in e["args"]["node"]]
    assert sorted(set(near)) == [0, 1]


def test_what_has_no_near_parts_is_refused(tmp_path: Path) -> None:
    folder = export_rules(tmp_path, [[HeadRule("dense")] * 2] * 2, n_max=256, target="cpu", dtype="fp32").folder
    with pytest.raises(UserError, match="no near parts"):
        Session(folder, overlap=True)


def test_standard_output_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with silent_stdout():
            os.write(1, b"lost\n")
            raise ValueError("x")

    os.write(1, b"before\n")
    with pytest.raises(ValueError, match="x"):
        fail()
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "before\nafter\n"


def test_a_core_is_left_to_the_thread_that_waits_for_a_gpu() -> None:
    assert default_threads("cuda") == max(1, default_threads() - 1)

"""The TensorRT session, driven by an engine that ONNX Runtime imitates on the CPU: against the CPU session, and every refusal."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from fake_engine import FakeEngine, as_tensorrt, tokens
from tiny_models import export_tiny

from attnspan.cpu_runtime import Session as CpuSession
from attnspan.cpu_runtime.library import library_path
from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn import Session
from attnspan.plugins.trt_sparse_attn.execution import Profile, Tensor, choose_profile
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.generate import IDLE


def op_library() -> Path | None:
    try:
        return Path(os.environ.get("ATTNSPAN_LIBRARY") or library_path())
    except UserError:
        return None


LIBRARY = op_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no op library, which the imitated engine needs")


@pytest.fixture(scope="module", params=["cpu fp32", "cpu bf16", "tensorrt fp16"])
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """KV heads of 128 and 384 slots for 512 tokens. ONNX Runtime computes in fp16, too: that is the graph TensorRT gets."""
    target, dtype = request.param.split()
    wanted = {"target": target, "cache_dtype": dtype, "dtype": dtype if target == "tensorrt" else None}
    folder = export_tiny(tmp_path_factory.mktemp("trt"), **wanted).folder
    return dataclasses.replace(Artefact.load(folder), target="cpu")


@pytest.fixture(scope="module")
def engine(artefact: Artefact) -> FakeEngine:
    assert LIBRARY is not None
    return FakeEngine(artefact, LIBRARY)


def opened(engine: FakeEngine, artefact: Artefact, **options: Any) -> Session:
    engine.calls.clear()
    return Session(as_tensorrt(artefact), engine=engine, **options)


def on_cpu(artefact: Artefact, batch: int = 1, chunk: int = 64) -> CpuSession:
    return CpuSession(artefact, batch=batch, chunk=chunk, threads=1, library=LIBRARY)


def same(ours: Any, theirs: Any) -> None:
    # The same kernels on the same numbers in calls of the same shapes.
    np.testing.assert_array_equal(ours, theirs)


def test_computes_what_the_cpu_session_does(engine: FakeEngine, artefact: Artefact) -> None:
    """Rows of 5, 200 and 450 tokens (the last past its rings), some idle at times, forked and reset."""
    trt, cpu = opened(engine, artefact, batch=3), on_cpu(artefact, 3)
    for row, count in enumerate((5, 200, 450)):
        same(trt.prefill(row, tokens(count, row), keep=4), cpu.prefill(row, tokens(count, row), keep=4))
    for step, token in enumerate(tokens(12, 9)):
        feed = [token if (step + row) % 3 or step < 2 else IDLE for row in range(3)]
        active = [row for row in range(3) if feed[row] != IDLE]
        same(trt.decode(feed)[active], cpu.decode(feed)[active])
    for session in (trt, cpu):
        session.fork(2, 0)
        session.reset([1])
    same(trt.prefill(1, tokens(70, 5)), cpu.prefill(1, tokens(70, 5)))
    same(trt.decode([3, 4, 5]), cpu.decode([3, 4, 5]))
    assert trt.lengths.tolist() == cpu.lengths.tolist()
    assert trt.kv_bytes == sum(x.numel() * x.itemsize for x in trt._caches.tensors.values()) == cpu.kv_bytes


def test_prompts_and_steps_use_their_profiles(engine: FakeEngine, artefact: Artefact) -> None:
    """A last chunk of one token needs the profile for steps; logits that nobody wants cost one position."""
    session = opened(engine, artefact, batch=2)
    session.prefill(1, tokens(129), keep=3)
    session.decode([1, 2])
    assert engine.calls == [(0, 1, 64, 1), (0, 1, 64, 2), (1, 1, 1, 1), (1, 2, 1, 1)]
    assert session._chunk == 64
    one = FakeEngine(artefact, LIBRARY, [Profile(0, (1, 4), (1, 32), (1, 32))])  # type: ignore[arg-type]
    session = Session(as_tensorrt(artefact), engine=one, batch=2, chunk=20)
    session.prefill(0, tokens(30))
    session.decode([1, IDLE])
    assert one.calls == [(0, 1, 20, 1), (0, 1, 10, 1), (0, 2, 1, 1)]


def test_generates_and_continues(engine: FakeEngine, artefact: Artefact) -> None:
    trt, cpu = opened(engine, artefact, batch=2), on_cpu(artefact, 2)
    for prompts, go_on in (([tokens(20), "héllo"], False), ([tokens(5, 1)], True)):
        theirs = cpu.generate(prompts, 10, continue_=go_on, stop_tokens=frozenset())
        ours = trt.generate(prompts, 10, continue_=go_on, stop_tokens=frozenset())
        assert [(r.tokens, r.text) for r in ours] == [(r.tokens, r.text) for r in theirs]


def test_rows_are_saved_and_loaded(engine: FakeEngine, artefact: Artefact, tmp_path: Path) -> None:
    first, other = opened(engine, artefact), opened(engine, artefact, batch=3)
    first.prefill(0, tokens(300))
    first.save(tmp_path / "row")
    other.prefill(2, tokens(90, 7))
    other.load(tmp_path / "row", row=2)
    assert other.state.tokens[2] == tokens(300)
    same(other.prefill(2, tokens(9, 3)), first.prefill(0, tokens(9, 3)))
    (tmp_path / "cut").write_bytes((tmp_path / "row").read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short or changed"):
        other.load(tmp_path / "cut", row=1)
    assert other.lengths.tolist() == [0, 0, 309]


def test_steps_are_replayed_from_a_graph(
    engine: FakeEngine, artefact: Artefact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first step is captured right after it ran; prompts in between do not disturb the graph. Where that fails, steps run."""

    class Graph:
        def __init__(self, work: Any) -> None:
            self.replay = work

    def refuse(_: Any) -> Graph:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    cpu = on_cpu(artefact, 2)
    for capture in (Graph, refuse):
        trt = opened(engine, artefact, batch=2)
        step = trt._step
        monkeypatch.setattr(step, "_on_gpu", True)
        monkeypatch.setattr(step._stream, "capture", capture)
        trt._graphs = True
        bind = Mock(wraps=step._bind)
        monkeypatch.setattr(step, "_bind", bind)
        cpu.reset()
        for row, count in ((0, 40), (1, 7)):
            same(trt.prefill(row, tokens(count)), cpu.prefill(row, tokens(count)))
        for token in (1, 2):
            same(trt.decode([token, 5]), cpu.decode([token, 5]))
        same(trt.prefill(1, tokens(11)), cpu.prefill(1, tokens(11)))
        same(trt.decode([9, 9]), cpu.decode([9, 9]))
        assert bind.call_count == (1 if capture is Graph else 3)
        assert trt._graphs == (capture is Graph)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "warning: decode steps run without a CUDA graph, slower: operation not permitted when stream is capturing"
    ]


def test_what_the_engine_was_not_built_for_is_refused(engine: FakeEngine, artefact: Artefact) -> None:
    for options, words in (
        ({"batch": 5}, r"batch is 5: engine/fake.engine was built for at most 4; .* --max-batch 5"),
        ({"chunk": 65}, r"chunk is 65: engine/fake.engine was built for at most 64 tokens; .* --max-prompt-chunk 65"),
        ({"chunk": 0}, "chunk is 0"),
        ({"batch": 0}, "--batch"),
    ):
        with pytest.raises(UserError, match=words):
            opened(engine, artefact, **options)
    narrow = FakeEngine(artefact, LIBRARY, [Profile(0, (1, 1), (1, 64), (1, 1))])  # type: ignore[arg-type]
    session = Session(as_tensorrt(artefact), engine=narrow)
    with pytest.raises(UserError, match=r"keep is 2: .* at most 1 positions; .* --max-logits 2"):
        session.prefill(0, [1, 2, 3], keep=2)
    session.prefill(0, [1, 2, 3])
    with pytest.raises(UserError, match="token id 300"):
        session.decode([300])
    with pytest.raises(UserError, match="n_max = 512"):
        session.prefill(0, tokens(510))
    apart = [Profile(0, (2, 4), (1, 1), (1, 1)), Profile(1, (1, 1), (2, 64), (1, 1))]
    gap = FakeEngine(artefact, LIBRARY, apart)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"1 rows of 1 tokens fit no profile .*batch 2 to 4, tokens 1 to 1; batch 1 to 1"):
        choose_profile(gap, 1, 1)
    with pytest.raises(UserError, match="1 rows of 1 tokens fit no profile"):
        choose_profile(FakeEngine(artefact, LIBRARY, apart[:1]), 1, 1)  # type: ignore[arg-type]


def test_other_targets_are_refused(artefact: Artefact) -> None:
    with pytest.raises(UserError, match=r"target .cpu.: this runtime takes .tensorrt. and .portable.; export"):
        Session(artefact)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("past_key.1", None, r"past_key.1 is missing, must be float32 \[-1, 512, 16\] input"),
        ("extra", Tensor("int32", (1,), True), r"extra is int32 \[1\] input, must be missing"),
        ("length", Tensor("int64", (-1,), True), r"length is int64 \[-1\] input, must be int32"),
        ("span", Tensor("int32", (3, -1, 2), True), r"span is int32 \[3, -1, 2\] input, must be int32 \[2, -1, 2\]"),
        ("logits", Tensor("float32", (-1, -1, 301), False), r"logits is float32 \[-1, -1, 301\] output"),
        ("present_value.0", Tensor("float32", (-1, 512, 16), True), "present_value.0 is float32 .* input, must be .* output"),
    ],
)
def test_engines_of_another_model_are_refused(
    name: str, tensor: Tensor | None, words: str, engine: FakeEngine, artefact: Artefact
) -> None:
    if name == "past_key.1":
        words = words.replace("float32", artefact.cache_dtype)
    tensors = {k: v for k, v in engine.tensors.items() if k != name} | ({} if tensor is None else {name: tensor})
    wrong = FakeEngine.__new__(FakeEngine)
    wrong.__dict__ = engine.__dict__ | {"tensors": tensors}
    with pytest.raises(UserError, match=words) as error:
        Session(as_tensorrt(artefact), engine=wrong)
    assert "attnspan build" in str(error.value)


def test_an_engine_for_one_row_and_one_position_is_fine(engine: FakeEngine, artefact: Artefact) -> None:
    fixed = {name: dataclasses.replace(tensor, shape=tuple(1 if x == -1 and name != "input_ids" else x for x in tensor.shape))
             for name, tensor in engine.tensors.items()}  # fmt: skip
    fixed["input_ids"] = Tensor("int64", (1, -1), True)
    one = FakeEngine.__new__(FakeEngine)
    one.__dict__ = engine.__dict__ | {"tensors": fixed, "profiles": [Profile(0, (1, 1), (1, 64), (1, 1))]}
    session = Session(as_tensorrt(artefact), engine=one)
    same(session.prefill(0, tokens(70)), on_cpu(artefact).prefill(0, tokens(70)))


def test_caches_that_do_not_fit_are_a_user_error(
    engine: FakeEngine, artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("attnspan.plugins.trt_sparse_attn.steps.DeviceCaches", full)
    with pytest.raises(UserError, match=r"no GPU memory for caches of .* GB \(1 rows of 512 tokens\)"):
        opened(engine, artefact)

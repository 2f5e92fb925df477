"""Target `portable` end to end: exported, run by the session, against target `cpu` and against itself cut differently."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import demo_model
import numpy as np
import onnx
import pytest
from tiny_models import export_rules, export_tiny

from attnspan.cpu_runtime.library import library_path
from attnspan.cpu_runtime.session import Session
from attnspan.export.cli import main
from attnspan.export.pipeline import Options, export_model
from attnspan.export.source import read_model
from attnspan.planner.errors import UserError
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.planner.uniform import uniform
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.generate import IDLE

CHUNK = 48
TOLERANCE = 2e-4
"""fp32 against fp32; logits of the tiny models are about 10."""

Twins = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """For each type of cache the same model and plan for `portable` and for `cpu`: KV heads of 128 and 384 tokens of 512."""
    made = {}
    for dtype in ("fp32", "fp16", "bf16"):
        folder = tmp_path_factory.mktemp(dtype)
        ours, other = (
            export_tiny(folder / target, target=target, cache_dtype=dtype, chunk=chunk).folder for target, chunk in TARGETS
        )
        made[dtype] = ours, other
    return made


TARGETS = (("portable", CHUNK), ("cpu", None))


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random ids of bytes."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, count)]


def opened(folder: Path, **options: Any) -> Session:
    return Session(folder, use_library=False, threads=1, **options)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_same_as_cpu(dtype: str, twins: Twins) -> None:
    """Rows past their rings and short ones, some idle at times, prompts after prompts, up to n_max."""
    portable, cpu = (opened(folder, batch=3) for folder in twins[dtype])
    for row, count in ((0, 5), (1, 200), (2, 450)):
        for session in (portable, cpu):
            assert session.prefill(row, tokens(count, row), keep=min(count, 40)).shape == (min(count, 40), 300)
        np.testing.assert_allclose(portable.prefill(row, tokens(9, 7)), cpu.prefill(row, tokens(9, 7)), atol=TOLERANCE)
    for step, token in enumerate(tokens(53, 4)):
        feed = [token if (step + row) % 3 or step < 3 else IDLE for row in range(3)]
        ours, other = portable.decode(feed), cpu.decode(feed)
        np.testing.assert_allclose(ours[np.array(feed) != IDLE], other[np.array(feed) != IDLE], atol=TOLERANCE)
    portable.reset([1])
    cpu.reset([1])
    for row, more in ((1, tokens(300, 5)), (0, tokens(100, 6))):
        np.testing.assert_allclose(portable.prefill(row, more, keep=60), cpu.prefill(row, more, keep=60), atol=TOLERANCE)
    last = 512 - int(portable.lengths[2])
    for session in (portable, cpu):
        session.prefill(2, tokens(last, 8))
    ours, other = portable.decode([3, 4, IDLE]), cpu.decode([3, 4, IDLE])
    np.testing.assert_allclose(ours[:2], other[:2], atol=TOLERANCE)
    assert portable.lengths.tolist() == cpu.lengths.tolist()
    assert portable.lengths[2] == 512


def test_same_as_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = export_tiny(tmp_path, "qwen3", density=1.0, target="portable").folder
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    prompt = tokens(300)
    session = opened(folder)
    ours = session.prefill(0, prompt, keep=len(prompt))
    result = opened(folder).generate(prompt, 30, stop_tokens=frozenset())[0]
    with torch.no_grad():
        theirs = model(torch.tensor([prompt + result.tokens])).logits[0]
    np.testing.assert_allclose(ours, theirs[: len(prompt)].numpy(), atol=TOLERANCE)
    assert result.tokens == theirs[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_chunks_do_not_change_the_result(twins: Twins) -> None:
    prompt = tokens(300)
    logits = [opened(twins["fp32"][0], chunk=chunk).prefill(0, prompt, keep=40) for chunk in (CHUNK, 16, 37)]
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=TOLERANCE)


@pytest.mark.parametrize("count", [30, 400])
def test_fork_save_and_load(count: int, twins: Twins, tmp_path: Path) -> None:
    session = opened(twins["bf16"][0], batch=2)
    session.prefill(1, tokens(450, 8))
    session.prefill(0, tokens(count))
    session.fork(0, 1)
    session.save(tmp_path / "row", 0)
    other = opened(twins["bf16"][0])
    other.load(tmp_path / "row")
    for token in tokens(20, 3):
        forked = session.decode([IDLE, token])[1]
        np.testing.assert_allclose(other.decode([token])[0], forked, atol=TOLERANCE)
    with pytest.raises(UserError, match="saved with another artefact"):
        opened(twins["bf16"][1]).load(tmp_path / "row")


def test_caches_stay_where_they_are(twins: Twins) -> None:
    """Stock ONNX Runtime writes new tokens into the caches that it is given: nothing is copied."""
    session = opened(twins["fp32"][0], batch=2)
    caches = session._caches
    assert caches.present is caches.past
    # Of each layer's heads: 64 sinks, and 64 or 320 tokens with room for chunks of 48.
    assert [array.shape[1:] for array in caches.past] == [(1, 64 + 144, 16)] * 2 + [(1, 64 + 384, 16)] * 2 + [
        (1, 64 + 144, 16),
        (1, 64 + 144, 16),
        (1, 64 + 384, 16),
        (1, 64 + 384, 16),
    ]
    assert session.kv_bytes == sum(array.nbytes for array in caches.past)
    before = [array.ctypes.data for array in caches.past]
    session.prefill(1, tokens(10))
    session.decode([IDLE, 3])
    assert [array.ctypes.data for array in caches.past] == before
    for array in caches.past:
        assert array[1, 0, :11].any(axis=-1).all()
        assert not array[1, 0, 11:].any()
        assert not array[0, 0, 1:].any()  # an idle row writes one slot, that of its next token


def test_no_library_is_asked_for(twins: Twins, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise AssertionError("asked for the op library")

    monkeypatch.setattr("attnspan.cpu_runtime.library.library_path", missing)
    folder = twins["fp32"][0]
    with caplog.at_level(logging.WARNING):
        session = Session(folder, threads=1)
    assert session.library is None
    assert not caplog.text
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [x.domain for x in proto.opset_import] == [""]
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)


def test_what_does_not_fit_is_refused(twins: Twins, tmp_path: Path) -> None:
    folder = twins["fp32"][0]
    with pytest.raises(UserError, match=r"chunk is 49: must be an integer from 1 to 48"):
        opened(folder, chunk=49)
    with pytest.raises(UserError, match=r"target 'portable', which needs none; drop --library"):
        Session(folder, library=tmp_path / "lib.so")
    for chunk, message in ((None, "chunk is None: must be an integer from 1"), (64, "disagree about attention")):
        copy = tmp_path / f"{chunk}"
        shutil.copytree(folder, copy)
        info = json.loads((copy / "attnspan.json").read_text()) | {"chunk": chunk}
        (copy / "attnspan.json").write_text(json.dumps(info))
        with pytest.raises(UserError, match=message):
            Artefact.load(copy)


def test_run_command(twins: Twins, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for folder in twins["fp32"]:
        wanted = [
            "run",
            str(folder),
            "--raw",
            "-p",
            "Call me Ishmael." * 12,
            "--max-new-tokens",
            "20",
            "--threads",
            "1",
            "--json",
        ]
        assert main([*wanted, "--no-library"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["tokens"] == said[1]["tokens"]
    assert said[0]["op_library"] is None
    assert said[0]["kv_bytes"] > said[1]["kv_bytes"]  # room for chunks


def test_verified_against_pytorch(tmp_path: Path) -> None:
    """In fp16 the file itself runs, activations and caches in 16 bits."""
    done = export_tiny(tmp_path, target="portable", dtype="fp16", cache_dtype="fp16", chunk=CHUNK, verify_tokens=400)
    rows = done.description["verify"]["rows"]
    assert [row["prompt"] for row in rows] == [400, 133, 7]
    assert rows[0]["wrapped"] == 4  # spans of 128 and 384 of two layers
    assert (done.description["dtype"], done.description["chunk"]) == ("float16", CHUNK)


def test_a_plan_that_samples_is_refused(tmp_path: Path) -> None:
    rules = [[HeadRule("dense"), HeadRule("dense")], [HeadRule("dense"), HeadRule("lsh", lsh=LshParams("exact", window=64))]]
    with pytest.raises(UserError, match=r"KV head 1 of layer 1 has mode 'lsh'.*--target cpu"):
        export_rules(tmp_path, rules, target="portable")
    assert not (tmp_path / "artefact").exists()


@pytest.mark.model
def test_the_real_model_says_the_same(tmp_path: Path) -> None:
    """128 greedy tokens after a prompt that fills and wraps most rings, by the op library and by standard ONNX."""
    plan = tmp_path / "plan.json"
    uniform(read_model(str(demo_model.gguf()))[0], 0.5, 1024, spread=0.25).save(plan)
    text = (Path(__file__).parents[1] / "samples" / "data" / "moby_dick_1.txt").read_text(encoding="utf-8")
    said = []
    for target, library in (("cpu", library_path()), ("portable", None)):
        out = tmp_path / target
        export_model(Options(str(demo_model.gguf()), out, target, plan=plan, cache_dtype="fp32", library=library))
        session = Session(out, threads=1)
        prompt = session.tokenizer.encode(text)[:800]
        said.append(session.generate(prompt, 128, stop_tokens=frozenset())[0].tokens)
        del session
        shutil.rmtree(out)
    assert said[0] == said[1]
    assert len(said[0]) == 128

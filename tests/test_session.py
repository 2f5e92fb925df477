"""Sessions over tiny artefacts: against transformers, against themselves cut differently, and every refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import export_tiny

from attnspan.cpu_runtime.library import library_path
from attnspan.cpu_runtime.session import Session
from attnspan.planner.errors import UserError
from attnspan.runtime.generate import IDLE

VOCAB = 300
TOLERANCE = 2e-4
"""fp32 against fp32; logits of the tiny models are about 10."""


def op_library() -> Path | None:
    try:
        return Path(os.environ.get("ATTNSPAN_LIBRARY") or library_path())
    except UserError:
        return None


LIBRARIES = ["function", pytest.param("library", marks=pytest.mark.skipif(op_library() is None, reason="no op library"))]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("dense"), density=1.0).folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KV heads of 128 and 384 slots for 512 tokens."""
    return export_tiny(tmp_path_factory.mktemp("sparse")).folder


@pytest.fixture(scope="module")
def sparse_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("bf16"), cache_dtype="bf16").folder


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random ids of bytes."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, count)]


def opened(folder: Path, how: str = "function", **options: Any) -> Session:
    used = how == "library"
    return Session(folder, use_library=used, library=op_library() if used else None, threads=1, **options)


@pytest.mark.parametrize("how", LIBRARIES)
def test_dense_artefact_computes_what_transformers_does(dense: Path, how: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense.parent / "model", dtype=torch.float32).eval()
    prompt = tokens(150)
    session = opened(dense, how, chunk=64)
    ours = session.prefill(0, prompt, keep=len(prompt))
    with torch.no_grad():
        theirs = model(torch.tensor([prompt])).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)

    result = session.generate(prompt, 30, stop_tokens=frozenset())[0]
    with torch.no_grad():
        whole = model(torch.tensor([prompt + result.tokens])).logits[0]
    expected = whole[len(prompt) - 1 : -1].argmax(-1)
    assert result.tokens == expected.tolist()


@pytest.mark.parametrize("how", LIBRARIES)
@pytest.mark.parametrize("artefact", ["sparse", "sparse_bf16"])
def test_chunks_do_not_change_the_result(artefact: str, how: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(artefact)
    prompt = tokens(300)
    logits = [opened(folder, how, chunk=chunk).prefill(0, prompt, keep=40) for chunk in (300, 128, 37)]
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=TOLERANCE)


@pytest.mark.skipif(op_library() is None, reason="no op library")
@pytest.mark.parametrize("artefact", ["dense", "sparse", "sparse_bf16"])
def test_library_and_function_agree(artefact: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(artefact)
    fast, slow = (opened(folder, how, batch=2) for how in ("library", "function"))
    assert fast.library is not None
    assert slow.library is None
    # Matrix units (bf16 caches) take queries and weights as two bf16 parts: 16 of their 24 bits.
    atol = 1e-3 if artefact == "sparse_bf16" else TOLERANCE
    for row, count in ((0, 400), (1, 30)):
        prompt = tokens(count, seed=row)
        np.testing.assert_allclose(fast.prefill(row, prompt), slow.prefill(row, prompt), atol=atol)
    for token in tokens(20, seed=9):
        np.testing.assert_allclose(fast.decode([token, token]), slow.decode([token, token]), atol=atol)


@pytest.mark.parametrize("how", LIBRARIES)
def test_rows_do_not_see_each_other(sparse: Path, how: str) -> None:
    """Rows of 5, 200 and 450 tokens (the last past its rings), some idle at times, against rows alone."""
    prompts = [tokens(5, 1), tokens(200, 2), tokens(450, 3)]
    steps = tokens(24, 4)
    together = opened(sparse, how, batch=3)
    alone = [opened(sparse, how) for _ in prompts]
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(together.prefill(row, prompt), alone[row].prefill(0, prompt), atol=TOLERANCE)
    for step, token in enumerate(steps):
        feed = [token if (step + row) % 3 or step < 3 else IDLE for row in range(3)]
        logits = together.decode(feed)
        for row in range(3):
            if feed[row] != IDLE:
                np.testing.assert_allclose(logits[row], alone[row].decode([token])[0], atol=TOLERANCE)
    assert together.lengths.tolist() == [int(session.lengths[0]) for session in alone]
    # A prompt for a row that others left running, and a row that starts over.
    together.reset([1])
    alone[1].reset()
    for row, more in ((1, tokens(90, 5)), (0, tokens(60, 6))):
        np.testing.assert_allclose(together.prefill(row, more), alone[row].prefill(0, more), atol=TOLERANCE)


@pytest.mark.parametrize("how", LIBRARIES)
def test_a_finished_row_at_n_max_leaves_the_others_alone(sparse: Path, how: str) -> None:
    session, alone = opened(sparse, how, batch=2), opened(sparse, how)
    session.prefill(0, tokens(512))
    np.testing.assert_allclose(session.prefill(1, tokens(9)), alone.prefill(0, tokens(9)), atol=TOLERANCE)
    for token in tokens(5):
        np.testing.assert_allclose(session.decode([IDLE, token])[1], alone.decode([token])[0], atol=TOLERANCE)


@pytest.mark.parametrize("how", LIBRARIES)
def test_caches_stay_where_they_are(sparse: Path, how: str) -> None:
    session = opened(sparse, how, batch=2)
    caches = session._caches
    assert (caches.present is caches.past) == (how == "library")
    before = [array.ctypes.data for array in caches.past]
    assert all(address % 64 == 0 for address in before)
    assert session.kv_bytes == sum(array.nbytes for array in caches.past) == 2 * 2 * 2 * 512 * 16 * 4
    session.prefill(1, tokens(10))
    session.decode([IDLE, 3])
    assert [array.ctypes.data for array in caches.past] == before
    for key in caches.past:
        assert key[1, :11].any(axis=-1).all()  # the first head's tokens, in row 1
        assert not key[1, 11:128].any()  # nothing was moved or left behind
        assert not key[0, 1:128].any()  # an idle row writes one slot, that of its next token


def test_a_second_turn_continues_the_cache(dense: Path) -> None:
    session = opened(dense)
    first = session.generate(tokens(20), 10, stop_tokens=frozenset())[0]
    second = session.generate(tokens(5, 1), 10, continue_=True, stop_tokens=frozenset())[0]
    assert second.prompt_tokens == 6
    whole = [*tokens(20), *first.tokens, *tokens(5, 1)]
    assert session.state.tokens[0][: len(whole)] == whole
    assert opened(dense).generate(whole, 10, stop_tokens=frozenset())[0].tokens == second.tokens


def test_text_streams_and_stops(dense: Path) -> None:
    session = opened(dense, batch=2)
    pieces: list[str] = []
    chat = [{"role": "user", "content": "hé"}]
    results = session.generate([chat, "abc"], 20, on_text=lambda row, piece: pieces.append(piece) if row == 0 else None)
    assert "".join(pieces) == results[0].text
    assert results[0].prompt_tokens == len("user\nhé\n".encode()) + len("assistant\n") + 3
    for result in results:
        assert result.text == session.tokenizer.decode(result.tokens)
        assert (result.finish_reason == "stop") == (result.tokens[-1] == 258)


def test_what_does_not_fit_is_refused(sparse: Path) -> None:
    session = opened(sparse)
    calls: list[tuple[Any, str]] = [
        (lambda: session.prefill(0, tokens(513)), "513.*n_max = 512"),
        (lambda: session.prefill(0, [1, 300]), "token id 300.*0 to 299"),
        (lambda: session.prefill(0, [1, -1]), "token id -1"),
        (lambda: session.prefill(0, []), "one or more"),
        (lambda: session.prefill(1, [1]), "rows 0 to 0"),
        (lambda: session.prefill(0, [1, 2], keep=3), "keep is 3"),
        (lambda: session.decode([1, 2]), r"shape \[2\]"),
        (lambda: session.decode([300]), "token id 300"),
        (lambda: session.generate(tokens(500), 20), "520.*n_max = 512"),
        (lambda: session.generate([tokens(5), tokens(5)], 2), "1 to 1"),
    ]
    for call, message in calls:
        with pytest.raises(UserError, match=message):
            call()
    assert session.lengths.tolist() == [0]
    session.prefill(0, tokens(512))
    with pytest.raises(UserError, match="512 tokens and 1 more"):
        session.decode([1])


def test_other_targets_libraries_and_versions_are_refused(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    import onnxruntime

    from attnspan.runtime.artefact import Artefact

    with pytest.raises(UserError, match="target 'tensorrt'"):
        Session(dataclasses.replace(Artefact.load(sparse), target="tensorrt"))
    with pytest.raises(UserError, match="does not exist; change --library"):
        Session(sparse, library=tmp_path / "none.so")
    (tmp_path / "bad.so").write_text("not a library")
    with pytest.raises(UserError, match="cannot be loaded"):
        Session(sparse, library=tmp_path / "bad.so")
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    with pytest.raises(UserError, match=r"onnxruntime is 1\.24\.4: must be 1\.25"):
        Session(sparse)


def test_without_any_library_a_warning_says_so(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> Path:
        raise UserError("not built")

    monkeypatch.setattr("attnspan.cpu_runtime.library.library_path", missing)
    session = Session(sparse, threads=1)
    assert session.library is None
    assert "no op library" in caplog.text
    assert np.isfinite(session.prefill(0, tokens(3))).all()


def test_no_python_library_is_needed_but_the_runtime(sparse: Path) -> None:
    code = (
        "import sys; from attnspan.cpu_runtime.session import Session;"
        f"Session({str(sparse)!r}, use_library=False).generate([1, 2], 3); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "onnx", "onnx_ir", "attnspan.export"} & set(loaded)


def test_caches_that_do_not_fit_are_a_user_error(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("attnspan.cpu_runtime.session.Caches", full)
    with pytest.raises(UserError, match=r"no memory for caches of .* GB"):
        opened(sparse)

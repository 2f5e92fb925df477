"""The small retrieval model of the benchmarks: its documents, and a few steps of its trainer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "benchmarks" / "tiny_retrieval"


def load(name: str) -> ModuleType:
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(f"tiny_retrieval_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


train = load("train")
task, build = train.task, train.build


@given(st.data(), st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 20))
def test_a_document_answers_every_question_by_one_line(data: st.DataObject, seed: int, queries: int, filler: int) -> None:
    n = data.draw(st.integers(1 + 6 * queries, 2500))
    tokens, targets = task.document(np.random.default_rng(seed), n, queries, filler)
    assert tokens.shape == (n,)
    assert targets.shape == (queries,)
    assert tokens.dtype == targets.dtype == np.int64
    assert tokens[0] == task.BOS
    assert list(np.flatnonzero(tokens == task.QUERY)) == list(targets - 2) == list(range(n - 3 * queries, n, 3))
    lines = np.flatnonzero(tokens == task.LINE)
    value = dict(zip(tokens[lines + 1].tolist(), tokens[lines + 2].tolist(), strict=True))
    assert len(value) == len(lines) == np.sum(np.isin(tokens, task.KEYS)) - queries  # no key has two lines
    asked = tokens[targets - 1].tolist()
    assert len(set(asked)) == queries
    assert [value[key] for key in asked] == tokens[targets].tolist()
    assert set(value) <= set(task.KEYS)
    assert set(value.values()) <= set(task.VALUES)


@given(st.integers(0, 2**32))
def test_filler_follows_the_chain_of_the_last_topic(seed: int) -> None:
    tokens, targets = task.document(np.random.default_rng(seed), 400, 4, 8)
    chain = task.successors()
    topic = previous = None
    seen = 0
    for token in tokens.tolist():
        if token in task.TOPICS:
            topic = token
        elif token in task.FILLERS:
            if topic is not None and previous is not None:
                assert token in chain[topic - task.TOPICS.start, previous - task.FILLERS.start]
                seen += 1
            previous = token
    assert seen
    assert not np.isin(tokens[targets[0] - 2 :], task.FILLERS).any()


def test_the_seed_decides_a_document() -> None:
    def make(seed: int) -> list[int]:
        return task.document(np.random.default_rng(seed), 512, 16, 8)[0].tolist()

    assert make(3) == make(3)
    assert make(3) != make(4)


def test_filler_runs_have_the_mean_asked_for() -> None:
    tokens, _ = task.document(np.random.default_rng(0), 4096, 4, 8)
    starts = np.flatnonzero(tokens == task.LINE)
    assert np.mean(np.diff(starts) - 3) == pytest.approx(8, abs=1.0)  # standard error .27


def test_keys_are_never_used_up() -> None:
    tokens, _ = task.document(np.random.default_rng(0), 4096, 512, 0)
    assert np.sum(tokens == task.LINE) == len(task.KEYS)


@pytest.mark.parametrize(("tokens", "queries"), [(6, 1), (60, 10), (10000, 513), (100, 0)])
def test_what_does_not_fit_is_refused(tokens: int, queries: int) -> None:
    with pytest.raises(ValueError, match=f"{queries} queries in {tokens} tokens"):
        task.document(np.random.default_rng(0), tokens, queries, 8)


def model() -> Any:
    torch.manual_seed(5)
    return build(layers=2, hidden=64, heads=2, kv_heads=1)


def test_the_loss_is_of_answers_and_fillers_only() -> None:
    tokens, targets = train.batch(0, 0, train.Stage(96, 3, 4, 3, goal=0.9))
    net = model()
    with torch.no_grad():
        scores = net(tokens).logits[:, :-1].double()
    tokens[:, -1] = scores[:, -1].argmax(-1)  # three right answers of a model that knows nothing
    got = train.forward(net, tokens, targets)
    surprise = scores.logsumexp(-1) - scores.gather(-1, tokens[:, 1:, None])[..., 0]
    answers = surprise.gather(1, targets - 1)
    fillers = surprise[torch.isin(tokens[:, 1:], torch.tensor(task.FILLERS))]
    assert answers.numel() == 12
    assert got.answer_loss == pytest.approx(answers.mean().item(), rel=1e-2)  # bf16
    assert got.filler_loss == pytest.approx(fillers.mean().item(), rel=1e-2)
    assert got.loss.item() == pytest.approx(got.answer_loss + train.FILLER_WEIGHT * got.filler_loss, rel=1e-6)
    assert got.accuracy == pytest.approx(3 / 12, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 32, 96), (2, 96, 32)])
def test_muon_moves_singular_values_near_one(shape: tuple[int, ...]) -> None:
    got = torch.linalg.svdvals(sys.modules["muon"].orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
    assert got.shape == (shape[0], min(shape[1:]))
    assert torch.all((got > 0.3) & (got < 1.4))


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goals that every step passes: behind the seam come the cool-down and, as the fourth step, a replayed length."""
    monkeypatch.setattr(train, "STEPS_AT_LEAST", 0)
    curriculum = (train.Stage(256, 2, 4, 2, goal=-1.0), train.Stage(512, 1, 4, 2, goal=-1.0))
    once, twice = model(), model()
    start = [w.clone() for w in once.parameters()]
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    train.train(tmp_path / "once", 1000.0, 5, once, curriculum, most_steps=5)
    train.train(tmp_path / "twice", 1000.0, 5, model(), curriculum, most_steps=2)
    now = train.train(tmp_path / "twice", 1000.0, 5, twice, curriculum, most_steps=5)
    assert (now.step, now.stage, now.cool_from) == (5, 1, 2)
    for before, a, b in zip(start, once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, before)


def test_the_folder_holds_the_model_and_its_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "QUESTIONS", 32)
    monkeypatch.setattr(train, "build", model)
    monkeypatch.setattr(train, "CURRICULUM", (train.Stage(64, 2, 4, 0, goal=-1.0),))
    monkeypatch.setattr(train, "STEPS_AT_LEAST", 0)
    monkeypatch.setattr(train, "COOL_DOWN", 1)
    monkeypatch.setattr(train, "LENGTHS", (256,))
    threads = torch.get_num_threads()
    try:
        assert train.main([str(tmp_path / "out"), "--minutes", "1", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    config = loaded.config
    assert (config.vocab_size, config.num_key_value_heads, config.head_dim, config.tie_word_embeddings) == (640, 1, 32, False)
    accuracy = train.accuracy_by_length(loaded, (256,))[256]
    assert f"| 256 | {accuracy:.3f} |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()

"""The comparison of answers at equal bytes: its documents, prompts put into other artefacts, Top-K and windows, its intervals."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_coder import FakeCoder
from hypothesis import given
from hypothesis import strategies as st
from sampled_artefacts import op_library
from tiny_models import export_rules

from attnspan.cpu_runtime.session import Session
from attnspan.planner.rules import HeadRule, LshParams

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import equal_bytes  # noqa: E402
import equal_bytes_report as report  # noqa: E402
from equal_bytes_caches import computed, fill  # noqa: E402
from equal_bytes_documents import COMMON, DEPTHS, KEYS, LIST, RARE, RARE_TIMES, Document, Question, build  # noqa: E402
from equal_bytes_reduced import Reduced, Reduction  # noqa: E402

N_MAX = 1024
LSH = HeadRule("lsh", lsh=LshParams("sketch", 64, fraction=0.1))
EXACT = HeadRule("lsh", lsh=LshParams("exact", 64))
RULES = {
    "dense": [[HeadRule("dense")] * 2] * 2,
    "span": [[HeadRule("span", 0, 0.25), HeadRule("span", 128, 0)], [HeadRule("span", 0, 0.5), HeadRule("dense")]],
    "exact": [[EXACT] * 2] * 2,
    "mixed": [[LSH, HeadRule("span", 0, 0.5)], [LSH, LSH]],
}


@pytest.mark.parametrize("length", [700, 2048])
@pytest.mark.parametrize("kind", ["prose", "list"])
def test_documents_hold_their_answers(kind: str, length: int) -> None:
    coder = FakeCoder()
    document = build(kind, coder, length, 3)
    assert document == build(kind, coder, length, 3) != build(kind, coder, length, 4)
    longest = max(len(q.prompt) + len(q.answer) for q in document.questions)
    assert length - 150 < len(document.tokens) + longest <= length + 1
    text = coder.decode([*document.tokens, document.questions[0].prompt[0]])
    assert len({q.name for q in document.questions}) == len(document.questions)
    if kind == "list":
        counts = Counter(text.removeprefix(LIST).split(", "))
        words = {coder.decode(q.answer).strip(): q.right for q in document.questions}
        often = {word for word, right in words.items() if right}
        assert (len(often), len(words)) == (COMMON, COMMON + RARE)
        assert {counts[word] for word in words if word not in often} == {RARE_TIMES}
        assert min(counts[word] for word in often) > 2 * RARE_TIMES
        return
    assert Counter(q.task for q in document.questions) == {"passkey": 1, "needle": 1, "prose": 1, "multikey": KEYS}
    for q in document.questions:
        stem, answer = coder.decode(q.prompt[1:]).strip(), coder.decode(q.answer)
        if q.task == "prose":
            assert q.prompt == (q.prompt[0],)
            assert len(q.answer) == 64
        else:
            assert f"{stem}{'' if q.task == 'needle' else ' '}{answer}" in text


def test_pass_keys_lie_at_all_depths() -> None:
    coder, places = FakeCoder(), []
    for index in range(DEPTHS):
        document = build("prose", coder, 1500, index)
        text = coder.decode(document.tokens)
        places.append(text.index("The pass key is") / len(text))
    np.testing.assert_allclose(places, np.linspace(0, 1, DEPTHS), atol=0.12)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("equal_bytes")
    return {name: export_rules(root / name, rules, n_max=N_MAX).folder for name, rules in RULES.items()}


def opened(folder: Path, batch: int) -> Session:
    library = op_library()
    return Session(folder, batch=batch, threads=1, library=library, use_library=library is not None)


def toy(tokens: int) -> Document:
    """Random tokens with two questions of different lengths."""
    ids = [int(x) for x in np.random.default_rng(tokens).integers(0, 256, tokens + 20)]
    asked = [Question("passkey", i, tuple(ids[tokens : tokens + n]), tuple(ids[tokens + n : tokens + n + 3 + i]))
             for i, n in enumerate((1, 9))]  # fmt: skip
    return Document("prose", tokens + 20, 0, tuple(ids[:tokens]), tuple(asked))


@pytest.mark.parametrize("tokens", [150, 900])
def test_an_exact_artefact_answers_like_the_dense_one(artefacts: dict[str, Path], tmp_path: Path, tokens: int) -> None:
    dense = opened(artefacts["dense"], 2)
    prompt = computed(dense, toy(tokens), tmp_path)
    runs = [(prompt, q) for q in prompt.document.questions]
    for name in ("dense", "exact"):
        for (_, question), got in equal_bytes.decoded(opened(artefacts[name], 3), runs):
            np.testing.assert_allclose(got, prompt.true(question), atol=2e-4)


@pytest.mark.parametrize("tokens", [100, 301, 1000])
@pytest.mark.parametrize("name", ["span", "mixed"])
def test_a_row_is_filled_as_its_own_prompt_fills_it(artefacts: dict[str, Path], tmp_path: Path, name: str, tokens: int) -> None:
    """Caches of the first layer, which no attention comes before: wrapped rings, in the slots where decoding looks for them."""
    prompt = computed(opened(artefacts["dense"], 2), toy(tokens), tmp_path)
    question = prompt.document.questions[1]
    session = opened(artefacts[name], 2)
    fill(session, 0, prompt, question)
    session.prefill(1, [*prompt.document.tokens, *question.prompt[:-1]])
    assert session.lengths.tolist() == [tokens + 8] * 2
    filled, own = (session._caches.views(row, tokens + 8) for row in (0, 1))
    compared = 0
    for (kind, a), (_, b) in zip(filled, own, strict=True):
        if kind.split(".")[1] == "0" and not kind.startswith("state"):
            np.testing.assert_allclose(a, b, atol=1e-5)
            compared += 1
    assert compared >= 2


def test_reductions_in_pytorch_begin_at_the_dense_answer(artefacts: dict[str, Path], tmp_path: Path) -> None:
    prompt = computed(opened(artefacts["dense"], 2), toy(400), tmp_path)
    questions = prompt.document.questions
    model = Reduced(artefacts["dense"].parent / "model")
    kinds = [Reduction("exact"), Reduction("rows", 1.0), Reduction("rows", 0.02)]
    exact, everything, few = model.answers(prompt, questions, kinds)
    for question, *got, less in zip(questions, exact, everything, few, strict=True):
        for answer in got:
            np.testing.assert_allclose(answer, prompt.true(question), atol=2e-4)
        assert np.abs(less - prompt.true(question)).max() > 0.05


@given(st.integers(1, 4), st.integers(130, 300), st.floats(0.01, 1), st.integers(0, 2**32))
def test_what_is_kept_are_the_largest_or_the_last(rows: int, tokens: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    totals = rng.integers(129, tokens, rows, endpoint=True)
    scores = rng.normal(size=(rows, 2, 3, tokens)).astype(np.float32)
    for row, total in enumerate(totals):
        scores[row, ..., total:] = -np.inf
    masks = {
        kind: Reduction(kind, share).kept(torch.from_numpy(scores), torch.from_numpy(totals), 1).numpy()
        for kind in ("topk", "window", "rows")
    }
    for row, total in enumerate(totals.tolist()):
        count = round(float(np.float32(share) * np.float32(total - 128)))
        middle = scores[row, ..., 64 : total - 64]
        least = np.sort(middle)[..., -count, None] if count else np.inf
        wanted = np.zeros((2, 3, tokens), bool)
        wanted[..., :64] = wanted[..., total - 64 : total] = True
        wanted[..., 64 : total - 64] = middle >= least
        np.testing.assert_array_equal(masks["topk"][row][..., :total], wanted[..., :total])
        wanted[..., 64 : total - 64] = np.arange(64, total - 64) >= total - 64 - count
        np.testing.assert_array_equal(masks["window"][row][..., :total], wanted[..., :total])
        chosen = masks["rows"][row]
        assert (chosen == chosen[:, :1]).all()  # a row is read for the whole group
        assert (chosen.sum(-1) == max(round(float(np.float32(share) * np.float32(total))), 1)).all()
        assert chosen[..., total - 1].all()
    assert Reduction("topk", share).kept(torch.from_numpy(scores), torch.from_numpy(totals), 0) is None


def row(contender: str, document: int, number: int, exact: bool, logp: float, right: bool = True, task: str = "multikey") -> dict:
    return {"contender": contender, "task": task, "length": 4096, "document": document, "number": number, "depth": None,
            "right": right, "tokens": 2, "exact": exact, "logp": logp, "kl": 0.5, "top1": 0.5}  # fmt: skip


def test_figures_and_their_intervals(tmp_path: Path) -> None:
    """Dense gets 3 of 4; the other 2 of these; documents are what is drawn again."""
    rows = [row("dense", d, i, (d, i) != (1, 1), -1.0) for d in (0, 1) for i in (0, 1)]
    rows += [row("span-0.1-4096", d, i, i == 0, -2.0) for d in (0, 1) for i in (0, 1)]
    rows += [row(name, 0, i, False, -float(i), i < 2, "frequency") for name in ("dense", "span-0.1-4096") for i in (0, 3, 2, 1)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    entries = {(entry["task"], entry["contender"]): entry for entry in report.summary(report.load(tmp_path))}
    dense, span = entries["multikey", "dense"], entries["multikey", "span-0.1"]
    assert (dense["documents"], dense["answers"]) == (2, 4)
    assert dense["exact"] == [0.75, 0.5, 1.0]
    assert span["exact"] == [0.5, 0.5, 0.5]
    assert span["kept"] == [pytest.approx(2 / 3), 0.5, 1.0]
    assert span["rise"] == [0.5, 0.5, 0.5]
    assert span["kl"] == [0.5, 0.5, 0.5]
    assert entries["frequency", "dense"]["rank"][0] == 1.0  # words 0 and 1 are frequent, and likelier than 2 and 3
    assert entries["frequency", "dense"]["rank"][1] < 0.3  # of one document, which is not sure of anything
    assert "| `span-0.1` | 2 | 4 | 50.0 [50.0, 50.0] | 66.7 [50.0, 100.0] |" in report.tables(list(entries.values()))


def test_differences_are_taken_document_by_document() -> None:
    ours, theirs = ({d: (d / 10 + add, 1.0) for d in range(10)} for add in (0.1, 0.0))
    found = report.difference(ours, theirs)
    assert found is not None
    np.testing.assert_allclose([found.value, found.low, found.high], 0.1)
    assert report.estimate(ours, False).high - report.estimate(ours, False).low > 0.2
    assert report.difference(ours, {11: (0.0, 1.0)}) is None


def test_tasks_together() -> None:
    """A mean of differences over tasks, of the documents that all of them have, drawn together."""
    ours = {"a": {1: (2.0, 2.0), 2: (1.0, 2.0), 3: (9.0, 9.0)}, "b": {1: (1.0, 1.0), 2: (1.0, 1.0)}}
    theirs = {"a": {1: (2.0, 2.0), 2: (0.0, 2.0)}, "b": {1: (1.0, 1.0), 2: (1.0, 1.0)}}
    found = report.together(ours, theirs)
    assert found is not None
    figure, count = found
    assert count == 2
    assert figure.value == pytest.approx((0.25 + 0.0) / 2)
    assert (figure.low, figure.high) == pytest.approx((0.0, 0.25))
    assert report.together({"a": {1: (1.0, 1.0)}}, {"a": {2: (1.0, 1.0)}}) is None



@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a benchmark's main with these words; what it printed, on standard error where it is to fail with status 2."""

    def run(main: Callable[[], None], *words: str | Path, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, words)])
        capsys.readouterr()
        if not fails:
            main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as error:
            main()
        assert error.value.code == 2
        return capsys.readouterr().err

    return run


def test_the_command_goes_on_where_it_was(artefacts: dict[str, Path], tmp_path: Path, command: Callable[..., str]) -> None:
    """Scores that are there are not made again, those that a killed run lacks are."""
    words = (equal_bytes.main, artefacts["dense"], artefacts["mixed"], "--tasks", "passkey,frequency", "--lengths", "1000",
             "--documents", "1", "--threads", "1", "--rows", "3", "-o", tmp_path)  # fmt: skip
    command(*words, "--sample-all", "--model", artefacts["dense"].parent / "model", "--reduced", "topk:0.1")
    log = tmp_path / "answers.jsonl"
    lines = log.read_text().splitlines()
    asked = 1 + COMMON + RARE
    assert Counter(json.loads(line)["contender"] for line in lines) == {"dense": asked, "artefact": asked, "topk:0.1": asked}
    kept = [line for line in lines if '"artefact"' not in line or '"number": 2' not in line]
    log.write_text("".join(line + "\n" for line in kept))
    command(*words, "--sample-all")
    again = log.read_text().splitlines()
    assert sorted(again) == sorted(lines)
    assert again[: len(kept)] == kept
    assert "| `topk:0.1` | 1 | 12 |" in command(report.main, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "poetry"], "task is 'poetry'"),
        (["--reduced", "topk:0.1"], "give it with --model"),
        (["--reduced", "best:0.1", "--model", "x"], "reduction is 'best:0.1'"),
        (["--lengths", "100"], "length is 100"),
        (["--documents", "0"], "documents is 0"),
        (["a/same", "b/same"], "different names"),
    ],
)
def test_wrong_arguments_take_one_line(tmp_path: Path, words: list[str], message: str, command: Callable[..., str]) -> None:
    error = command(equal_bytes.main, "nothing", *words, "-o", tmp_path, fails=True)
    assert message in error
    assert error.count("\n") == 1

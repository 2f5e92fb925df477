"""Methods side by side: scores, intervals, resuming, tables, pictures; `attnspan eval` of a tiny model and its artefact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fake_coder import FakeCoder
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from tiny_models import export_rules, export_tiny, save_tiny_model

from attnspan.calibration import evaluate as module
from attnspan.calibration.eval_command import register_eval
from attnspan.calibration.eval_methods import _Uniform
from attnspan.calibration.evaluate import DENSE, LOG, cells_of, depths_of, evaluate
from attnspan.calibration.figures import draw
from attnspan.calibration.items import Item
from attnspan.calibration.scores import ROWS, answer_logits, score, summarise, wilson
from attnspan.calibration.tables import table
from attnspan.calibration.texts import EVALUATION, TextSource
from attnspan.export.cli import Parser
from attnspan.export.pipeline import Options, export_model
from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.planner.shape import ModelShape

VOCAB = 20_000
SINKS = 64


class Copier:
    """Predicts what followed the longest earlier match of the last tokens, among those that its window leaves."""

    def __init__(self, window: int | None = None) -> None:
        self.window, self.calls = window, 0

    def logits(self, tokens: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.float32]:
        self.calls += 1
        out = np.zeros((len(tokens) - first, VOCAB), np.float32)
        for row, i in enumerate(range(first, len(tokens))):
            best = (0, -1)
            for j in range(i):
                seen = self.window is None or j < SINKS or j > i - self.window
                length = 0
                while seen and length < 6 and j >= length and tokens[j - length] == tokens[i - length]:
                    length += 1
                best = max(best, (length, j))
            if best[0]:
                out[row, tokens[best[1] + 1]] = 9
        return out


CODER = FakeCoder()
SOURCE = TextSource.named(lambda text: CODER.encode(text, special=False), EVALUATION)


def run(scorers: dict[str, Any], folder: Path | None = None, **more: Any) -> module.Results:
    values: dict[str, Any] = {"tasks": ["passkey"], "lengths": [300, 600], "depths": depths_of(5), "n": 2, "source": SOURCE}
    return evaluate(scorers, CODER, **values | {"folder": folder, "progress": False} | more)


def test_a_window_loses_what_lies_before_it() -> None:
    results = run({DENSE: Copier(), "narrow": Copier(200)})
    cells = {(x["method"], x["length"], x["depth"]): x for x in results.groups("length", "depth")}
    assert all(x["accuracy"] == 1 and x["kl"] == 0 and x["top1"] == 1 for (name, *_), x in cells.items() if name == DENSE)
    for length in (300, 600):
        for depth in depths_of(5):
            x = cells["narrow", length, depth]
            # The window begins 200 tokens before the end; the first sentence may be longer than the sinks.
            if (1 - depth) * length < 150:
                assert x["accuracy"] == 1
            elif depth > 0 and (1 - depth) * length > 250 and depth * length > 2 * SINKS:
                assert x["accuracy"] == 0
                assert x["kl"] > 0.1
                assert x["nll"] > cells[DENSE, length, depth]["nll"]
    assert results.groups("task")[0]["n"] == 20


def test_identical_items_interleaved() -> None:
    order: list[tuple[str, bytes]] = []

    class Recorder(Copier):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def logits(self, tokens: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.float32]:
            order.append((self.name, tokens.tobytes()))
            return np.zeros((len(tokens) - first, VOCAB), np.float32)

    results = run({"b": Recorder("b"), DENSE: Recorder(DENSE)}, lengths=[300])
    assert [name for name, _ in order] == [DENSE, "b"] * 10
    assert all(a[1] == b[1] for a, b in zip(order[::2], order[1::2], strict=True))
    assert len({tokens for _, tokens in order}) == 10
    assert results.methods == ["b", DENSE]


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson(pair: tuple[int, int]) -> None:
    expected = binomtest(*pair).proportion_ci(method="wilson")
    assert wilson(*pair) == pytest.approx((expected.low, expected.high), abs=1e-9)


def item(targets: list[int], count: int = 200) -> Item:
    rng = np.random.default_rng(len(targets))
    return Item(rng.integers(0, 30, count), np.array(targets), "k", count)


@pytest.mark.parametrize("targets", [[150], [3, 4, 90], list(range(100, 100 + ROWS + 7))])
def test_scores(targets: list[int]) -> None:
    one = item(targets)
    rng = np.random.default_rng(0)
    raw = [rng.normal(0, 4, (len(one.tokens) - one.first, 30)).astype(np.float32) for _ in range(2)]
    dense, sparse = (answer_logits(x, one) for x in raw)
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (dense, sparse))
    wanted = one.tokens[targets]
    assert (dense == raw[0][[t - 1 - one.first for t in targets]]).all()
    got = score(sparse, one, dense, "sparse")
    assert got.nll == pytest.approx(-np.log(q[np.arange(len(wanted)), wanted]).mean())
    assert got.kl == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert got.top1 == (p.argmax(1) == q.argmax(1)).mean()
    assert got.correct == (q.argmax(1) == wanted).all()
    perfect = sparse.copy()
    perfect[np.arange(len(wanted)), wanted] = 99
    assert score(perfect, one, None, "x").correct
    perfect[-1, wanted[-1]] = -99
    assert not score(perfect, one, None, "x").correct
    assert score(perfect, one, None, "x").kl is None


def test_logits_that_are_no_numbers() -> None:
    one = item([150])
    logits = np.zeros((1, 30), np.float32)
    logits[0, 3] = np.nan
    with pytest.raises(UserError, match=f"'broken' computes logits that are no numbers on item {one.id} .*--dtype fp32"):
        score(logits, one, None, "broken")
    with pytest.raises(UserError, match="not in the vocabulary"):
        score(logits[:, : one.tokens[150]], one, None, "x")
    with pytest.raises(ValueError, match="positions: must be 51"):
        answer_logits(logits, one)


def test_summaries_weigh_tokens() -> None:
    rows = [score(np.zeros((n, 30), np.float32), item(list(range(9, 9 + n)), 20), None, "x").to_dict() for n in (1, 3)]
    rows[0]["nll"], rows[1]["nll"] = 4.0, 0.0
    got = summarise(rows)
    assert got.nll == 1.0
    assert got.ppl == pytest.approx(np.e)
    assert got.kl is None
    assert summarise(rows, scored=False).accuracy is None


def test_cells_are_balanced_at_any_time() -> None:
    cells = cells_of(["passkey", "perplexity"], [300, 600], depths_of(3), 4)
    assert len(cells) == len(set(cells)) == 4 * 2 * (3 + 1)
    assert [cell.index for cell in cells] == sorted(cell.index for cell in cells)
    assert {cell.depth for cell in cells if cell.task == "perplexity"} == {None}
    assert depths_of(1) == [0.5]
    assert depths_of(5) == [0, 0.25, 0.5, 0.75, 1]


class Interrupted(Copier):
    """Stops the run at its n-th item."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def logits(self, tokens: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.float32]:
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().logits(tokens, first)


def test_interrupted_runs_lose_one_item(tmp_path: Path) -> None:
    whole = run({DENSE: Copier(), "s": Copier(150)}, lengths=[300])
    with pytest.raises(KeyboardInterrupt):
        run({DENSE: Copier(), "s": Interrupted(4)}, tmp_path, lengths=[300])
    log = tmp_path / LOG
    assert len(log.read_bytes().splitlines()) == 1 + 4
    with log.open("a") as file:
        file.write('{"task":"passk')  # killed while it wrote
    dense, sparse = Copier(), Copier(150)
    with pytest.raises(KeyboardInterrupt):
        run({DENSE: dense, "s": Interrupted(2)}, tmp_path, lengths=[300])
    assert dense.calls == 3
    dense = Copier()
    results = run({DENSE: dense, "s": sparse}, tmp_path, lengths=[300])
    assert dense.calls == sparse.calls == 10 - 4 - 2
    assert [row["id"] for row in results.rows] == [row["id"] for row in whole.rows]
    # The same scores, but for the first items, whose method had no window.
    assert results.rows[6:] == whole.rows[6:]
    again = run({DENSE: (dense := Copier())}, tmp_path, lengths=[300])
    assert dense.calls == 0
    assert again.methods == [DENSE]
    assert set(again.rows[0]["scores"]) == {DENSE}


def test_dense_may_be_added(tmp_path: Path) -> None:
    """What was scored alone is scored again, to be compared."""
    alone = run({"s": Copier(150)}, tmp_path, lengths=[300])
    assert {row["scores"]["s"]["kl"] for row in alone.rows} == {None}
    more = Copier(150)
    both = run({DENSE: Copier(), "s": more}, tmp_path, lengths=[300])
    assert more.calls == 10
    assert both.groups("task")[1]["kl"] > 0
    run({DENSE: (dense := Copier()), "s": more}, tmp_path, lengths=[300])
    assert (dense.calls, more.calls) == (0, 10)


def test_methods_and_items_may_be_added(tmp_path: Path) -> None:
    run({DENSE: Copier()}, tmp_path, lengths=[300], n=1, describe={DENSE: 1})
    dense, more = Copier(), Copier(150)
    results = run({DENSE: dense, "s": more}, tmp_path, lengths=[300], n=2, describe={DENSE: 1, "s": {"plan": "x"}})
    assert dense.calls == more.calls == 10  # the dense logits are needed for the KL of the other
    assert results.groups("task")[1]["kl"] > 0
    log = tmp_path / LOG
    log.write_text(log.read_text().replace(results.rows[0]["id"], "0" * 16))  # as if its text had changed
    dense = Copier()
    again = run({DENSE: dense}, tmp_path, lengths=[300], n=2, describe={DENSE: 1})
    assert again.rows[0]["id"] == results.rows[0]["id"]
    assert dense.calls == 1
    for other, words in (
        ({"seed": 1}, "another seed"),
        ({"plain": True}, "another plain"),
        ({"describe": {"s": 2}}, "another s;"),
    ):
        with pytest.raises(UserError, match=words):
            run({"s": Copier()}, tmp_path, lengths=[300], **other)


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", '{"task": 1, "scores": {}}\n', '{"a": 1}\n'])
def test_files_that_hold_no_scores(content: str, tmp_path: Path) -> None:
    (tmp_path / LOG).write_text(content)
    with pytest.raises(UserError, match="is not a file of scores"):
        run({DENSE: Copier()}, tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*change -o"):
        run({DENSE: Copier()}, tmp_path / "nowhere")


@pytest.mark.parametrize("more", [{"n": 0}, {"tasks": []}, {"lengths": []}, {"depths": []}, {"depths": [1.5]}, {"tasks": ["x"]}])
def test_nothing_to_evaluate(more: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        run({DENSE: Copier()}, **more)


def test_table_and_pictures(tmp_path: Path) -> None:
    results = run({DENSE: Copier(), "half": Copier(150), "uniform": Copier(80)}, tasks=["passkey", "perplexity"], n=1)
    densities = {DENSE: {"300": 1.0, "600": 1.0}, "half": {"300": 0.5, "600": 0.4}, "uniform": {"300": 0.3, "600": 0.2}}
    content = json.loads(json.dumps(results.to_dict() | {"densities": densities}))
    text = table(content)
    row = next(x for x in content["totals"] if (x["task"], x["length"], x["method"]) == ("passkey", 600, "half"))
    assert "accuracy by depth" in text
    first = next(line for line in text.splitlines() if line.startswith("passkey") and " 600 " in line and " half " in line)
    assert f"{100 * row['accuracy']:.1f} %" in first
    assert " 0.400 " in first
    assert re.search(r"perplexity +300 +dense +1\.000 +1 +- +-", text)
    pictures = draw(content, tmp_path)
    assert [path.name for path in pictures] == ["heat_passkey.png", "density_passkey.png"]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000 for path in pictures)
    dense_only = json.loads(json.dumps(run({DENSE: Copier()}, tasks=["perplexity"], n=1).to_dict()))
    assert draw(dense_only, tmp_path) == []
    assert "by depth" not in table(dense_only)


def test_uniform_keeps_as_many_blocks_as_the_plan() -> None:
    shape = ModelShape("m", 3, 4, 2, 8)
    rules = [
        [HeadRule("span", 0.0, 0.3), HeadRule("dense")],
        [HeadRule("span", 128.0, 0.0)] * 2,
        [HeadRule("span", 0.0, 0.7)] * 2,
    ]
    plan = Plan(shape, 4096, rules)
    for n in (300, 2048, 4001, 4096):
        got = _Uniform(shape, plan)(n)
        assert got.spans(n).sum() == plan.spans(n).sum()
        assert np.ptp(got.spans(n)) <= 64
    assert (_Uniform(shape, 0.25)(2048).spans(2048) == 512).all()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    export_tiny(folder)
    export_tiny(folder / "all", density=1.0)
    return folder


@pytest.fixture
def attnspan_eval(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def call(*arguments: Any, status: int = 0) -> dict[str, Any]:
        parser = Parser()
        register_eval(parser.add_subparsers())
        args = parser.parse_args(["eval", *map(str, arguments), "-o", str(tmp_path / "out")])
        assert args.run(args) == status
        content: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
        return content

    return call


QUICK = ("--tasks", "passkey", "--lengths", "320,448", "--depths", "2", "--n", "1", "--threads", "1")


def test_eval_of_an_artefact_says_what_eval_of_its_checkpoint_says(
    exported: Path, attnspan_eval: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, plan = exported / "model", exported / "tiny-plan.json"
    torch = attnspan_eval(model, "--plan", plan, "--dtype", "fp32", *QUICK)
    assert [x["method"] for x in torch["totals"]] == ["dense", "tiny-plan", "uniform"] * 2
    assert torch["densities"]["uniform"] == torch["densities"]["tiny-plan"]
    shown = capsys.readouterr().out
    assert "tiny-plan" in shown
    assert (tmp_path / "out" / "table.txt").read_text().strip() in shown
    assert (tmp_path / "out" / "heat_passkey.png").is_file()
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    session = attnspan_eval(exported / "all" / "artefact", exported / "artefact", *QUICK)
    assert session["densities"]["dense"] == {"320": 1.0, "448": 1.0}
    got = {(x["length"], x["method"]): x for x in session["totals"]}
    for x in torch["totals"]:
        other = {"dense": "dense", "tiny-plan": "artefact"}.get(x["method"])
        if other:
            y = got[x["length"], other]
            assert [y[key] for key in ("n", "accuracy")] == [x[key] for key in ("n", "accuracy")]
            assert y["nll"] == pytest.approx(x["nll"], rel=2e-4)
            assert y["kl"] == pytest.approx(x["kl"], rel=2e-3, abs=1e-6)
    assert got[448, "artefact"]["kl"] > 1e-3


def test_sampled_heads_decode_the_answers(tmp_path: Path, attnspan_eval: Callable[..., dict[str, Any]]) -> None:
    """Prompts are exact with every plan: sampling shows in answers, and the oracle that draws everything is the dense model."""
    plans = {
        "all": HeadRule("dense"),
        "exact": HeadRule("lsh", lsh=LshParams("exact", 64)),
        "few": HeadRule("lsh", lsh=LshParams("sketch", 64, fraction=0.002)),
        "fewer": HeadRule("lsh", lsh=LshParams("sketch", 64, fraction=0.001)),
    }
    for name, rule in plans.items():
        export_rules(tmp_path / name, [[rule] * 2] * 2, n_max=2560, out=tmp_path / name / name)
    folders = [tmp_path / name / name for name in plans]
    items = ("--tasks", "passkey", "--lengths", "2304", "--depths", "1", "--n", "1", "--threads", "1")
    results = attnspan_eval(*folders, *items)
    got = {x["method"]: x for x in results["totals"]}
    assert got["exact"]["kl"] < 1e-6
    assert got["few"]["kl"] > 1e-4
    assert got["fewer"]["kl"] != got["few"]["kl"]
    described = [json.dumps(what) for what in results["settings"]["methods"].values()]
    assert len(set(described)) == len(plans)
    (tmp_path / "few" / "few").rename(tmp_path / "dense")
    results = attnspan_eval(tmp_path / "dense", folders[0], *items)
    assert {x["method"]: x["kl"] > 0 for x in results["totals"]} == {"dense": False, "dense'": True}
    with pytest.raises(UserError, match=r"sampled heads.*attnspan export MODEL OUT --plan .*attnspan eval DENSE OUT"):
        attnspan_eval(tmp_path / "few" / "model", "--plan", tmp_path / "dense", *items)


def test_scores_of_other_weights_are_not_taken(tmp_path: Path, attnspan_eval: Callable[..., dict[str, Any]]) -> None:
    """Neither of an artefact that was exported again, nor of a checkpoint that was trained on."""
    model = save_tiny_model(tmp_path / "model")
    out = tmp_path / "artefact"
    quick = ("--tasks", "passkey", "--lengths", "320", "--depths", "1", "--n", "1", "--threads", "1")
    for weights in ("int8", "int4"):
        export_model(Options(model=str(model), out=out, density=0.5, n_max=512, weights=weights, overwrite=True))
        if weights == "int8":
            attnspan_eval(out, *quick)
        else:
            with pytest.raises(UserError, match="holds scores of another artefact; use another -o"):
                attnspan_eval(out, *quick)
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    attnspan_eval(model, "--baselines", "dense", *quick)
    save_tiny_model(model, seed=1)
    with pytest.raises(UserError, match="holds scores of another dense; use another -o"):
        attnspan_eval(model, "--baselines", "dense", *quick)


def test_artefacts_of_two_models(exported: Path, tmp_path: Path, attnspan_eval: Callable[..., dict[str, Any]]) -> None:
    for change, what in (({"vocab_size": 320}, "configuration"), ({}, "tokenizer")):
        other = save_tiny_model(tmp_path / what, **change)
        if what == "tokenizer":
            file = other / "tokenizer.json"
            file.write_text(file.read_text().replace("<s>", "<t>"))
        done = export_model(Options(model=str(other), out=tmp_path / f"{what}-artefact", density=0.5, n_max=512))
        with pytest.raises(UserError, match=f"have another {what}: must be artefacts of one model"):
            attnspan_eval(exported / "artefact", done.folder, "--lengths", "320")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere"),
        (["{model}", "--tasks", "passkeys"], "--tasks"),
        (["{model}", "--lengths", "2k"], "--lengths"),
        (["{model}", "--lengths", "8192"], "length 8192 is beyond the 4096 tokens of the model or plan; change --lengths"),
        (["{model}", "--lengths", "1024", "--plan", "{plan}"], "length 1024 is beyond the 512 tokens"),
        (["{model}", "--baselines", "streaming"], "--baselines"),
        (["{model}", "--baselines", "none"], "nothing to evaluate"),
        (["{model}", "--plan", "{plan}", "--density", "0.5"], "drop one of them"),
        (["{model}", "{model}"], "2 models: must be one checkpoint"),
        (["{model}", "--n", "0"], "--n"),
        (["{model}", "--depths", "0"], "--depths"),
        (["{artefact}", "{model}"], "give artefacts only"),
        (["{artefact}", "--plan", "{plan}"], "--plan is for checkpoints"),
        (["{artefact}", "--dtype", "fp32"], "--dtype is for checkpoints"),
        (["{artefact}", "--device", "cuda"], "--device is for checkpoints"),
        (["{model}", "--lengths", "64", "--tasks", "passkey"], "change --lengths"),
        (["{artefact}", "--lengths", "1024"], "length 1024 is beyond the 512 tokens"),
    ],
)
def test_what_users_get_wrong(
    arguments: list[str], words: str, exported: Path, attnspan_eval: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    paths = {"model": exported / "model", "plan": exported / "tiny-plan.json", "artefact": exported / "artefact"}
    quick = [] if "--lengths" in arguments else ["--lengths", "320"]
    with pytest.raises(UserError, match=re.escape(words)):
        attnspan_eval(*(word.format(**paths) for word in arguments), *quick)
    assert not (tmp_path / "out" / "results.json").exists()

"""How well heads sample: expectations against draws and references, the gradient against another path, files and resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lsh_reference import Hashing, estimate, exact_attention, merge
from sketch_reference import draws, encode, products

from attnspan.calibration import sampling
from attnspan.calibration.attention import Setting, attention
from attnspan.calibration.choices import FOLDER, build_choices, load_choices, span_curves
from attnspan.calibration.folder import Calibration
from attnspan.calibration.item_profile import ItemProfile
from attnspan.calibration.items import Item
from attnspan.calibration.loading import load_model
from attnspan.calibration.sampling import sample_item, sample_items
from attnspan.calibration.sampling_error import Steps, log_inclusion, tally
from attnspan.calibration.sampling_profile import ItemSampling
from attnspan.cpu_runtime.bench_lsh_sketch import SketchDraw
from attnspan.export.cli import main
from attnspan.planner.errors import UserError
from attnspan.planner.lsh import projection_of, signs
from attnspan.planner.lsh_grid import lsh_grid
from attnspan.planner.plan import Plan
from attnspan.planner.rules import HeadRule, LshParams
from tests.tiny_models import save_tiny_model

DIM, TOKENS, GROUP, COUNT = 32, 900, 2, 4


def steps(seed: int = 0, peak: float = 3.0) -> Steps:
    """Keys with a mean, queries that look at some of them."""
    rng = np.random.default_rng(seed)
    key = (rng.standard_normal((TOKENS, DIM)) + rng.standard_normal(DIM)).astype(np.float32)
    query = rng.standard_normal((GROUP, COUNT, DIM)).astype(np.float32) + peak * key[rng.integers(64, 700, (GROUP, COUNT))] / 4
    value, gradient = rng.standard_normal((TOKENS, DIM)), rng.standard_normal((GROUP, COUNT, DIM))
    return Steps(
        query.astype(np.float32), gradient.astype(np.float32), key, value.astype(np.float32),
        np.array([860, 871, 880, 899]), DIM**-0.5,
    )  # fmt: skip


def dense(s: Steps, g: int, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [tokens], 0 ahead of the step, and the output [dim], in float64."""
    score = s.key.astype(np.float64) @ s.query[g, i] * s.scale
    score[s.position[i] + 1 :] = -np.inf
    weight = np.exp(score - score.max())
    weight /= weight.sum()
    return weight, weight @ s.value


def test_probabilities_are_those_of_the_reference() -> None:
    """Up to the entries of six bits in the tables of the op, which this leaves out."""
    s = steps()
    mean = s.key[64:797].mean(0)
    level, factor = encode(s.key, mean, signs(DIM, 0))
    params = [LshParams("sketch", 64, fraction=f) for f in (0.01, 0.1)]
    flat = s.query.reshape(-1, DIM)
    got = list(log_inclusion(flat, s.key - mean, params, s.scale, 797))
    for q, query in enumerate(flat):
        y = np.float32(0.85) * factor * products(query * np.float32(s.scale), level, signs(DIM, 0))
        for p, log_p in zip(params, got, strict=True):
            assert p.fraction is not None
            between = np.arange(64, 797)
            _, want = draws(y[between], y[64:768], between, p.fraction, 860, 0)
            ours = np.exp(log_p[q, between])
            assert ours.sum() == pytest.approx(np.exp(want).sum(), rel=0.03)
            assert np.abs(ours - np.exp(want)).mean() < 0.1 * np.exp(want).mean()


@pytest.mark.parametrize("peak", [0.0, 4.0])
@pytest.mark.parametrize("how", ["independent", "as the op draws"])
def test_expectation_against_draws(peak: float, how: str) -> None:
    """What sketches are expected to lose is the mean over many draws, on flat heads and on peaked ones."""
    s, p = steps(1, peak), LshParams("sketch", 64, fraction=0.05)
    got = tally(s, [p])
    mean = s.key[64:797].mean(0, dtype=np.float64).astype(np.float32)
    draw = SketchDraw(signs(DIM, 0), 0.05, s.scale)
    draw.index(0, s.key - mean)
    rng = np.random.default_rng(2)
    loss, error, union = [], [], []
    for i, at in enumerate(s.position.tolist()):
        tail = at + 1 - 64
        exact = [dense(s, g, i) for g in range(GROUP)]
        chance = [np.exp(draw.log_inclusion(s.query[g, i], 64, tail).astype(np.float64)) for g in range(GROUP)]
        for turn in range(150):
            masks, changes = [], []
            for g in range(GROUP):
                weight, output = exact[g]
                if how == "independent":
                    mask = chance[g] > rng.random(tail - 64)
                else:
                    mask = draw.draw(s.query[g, i][None], at + 1009 * turn + 17 * g, 64, tail)[0][0]
                raised = weight.copy()
                raised[64:tail] = np.where(mask, weight[64:tail] / chance[g], 0)
                changes.append((raised @ s.value) / raised.sum() - output)
                masks.append(mask)
                error.append((changes[-1] ** 2).sum() / (output**2).sum())
            loss.append(sum((c @ s.gradient[g, i]) ** 2 for g, c in enumerate(changes)) / 2)
            union.append(np.any(masks, 0).mean())
    assert got.loss[0] == pytest.approx(np.mean(loss), rel=0.25)
    assert got.error[0] == pytest.approx(np.mean(error), rel=0.2)
    assert got.share[0] == pytest.approx(np.mean(union), rel=0.05)
    assert got.read[0] == DIM / 4 + 2


@pytest.mark.parametrize("index", ["signature", "tables"])
def test_hashes_against_the_reference(index: str) -> None:
    """One draw by the plan's own projection: loss, error and share of the reference's output."""
    kind: dict[str, Any] = {"signature_bits": 64, "max_hamming": 24} if index == "signature" else {
        "bits": 5, "tables": 20, "min_collisions": 2
    }  # fmt: skip
    s, p = steps(3), LshParams(index, 64, **kind)
    got = tally(s, [p])
    projection = projection_of(p, DIM)
    hashing = Hashing(index, projection, p.bits or 0, p.tables or 0, max_hamming=(p.max_hamming or 0,))
    loss, error, share = [], [], []
    mean = s.key[64:797].astype(np.float64).mean(0).astype(np.float32).astype(np.float64)
    for i, at in enumerate(s.position.tolist()):
        drawn, pulled = [], 0.0
        between, static = slice(64, at + 1 - 64), np.r_[0:64, at + 1 - 64 : at + 1]
        for g in range(GROUP):
            query = s.query[g, i].astype(np.float64)
            *part, mask = estimate(hashing, query, s.key[between], s.value[between], mean, s.scale)
            output, _ = merge([(part[0], part[1]), exact_attention(query, s.key[static], s.value[static], s.scale)])
            change = output - dense(s, g, i)[1]
            pulled += float(change @ s.gradient[g, i])
            error.append((change**2).sum() / (dense(s, g, i)[1] ** 2).sum())
            drawn.append(mask)
        loss.append(pulled**2 / 2)
        share.append(np.any(drawn, 0).mean())
    assert got.loss[0] == pytest.approx(np.mean(loss), rel=1e-2)
    assert got.error[0] == pytest.approx(np.mean(error), rel=1e-2)
    assert got.share[0] == pytest.approx(np.mean(share), rel=1e-3)


def test_everything_drawn_loses_nothing() -> None:
    """A window over the whole text leaves nothing to sample, and more draws lose less."""
    s = steps(4)
    got = tally(s, [LshParams("sketch", 64, fraction=f) for f in (0.01, 0.05, 0.5)] + [LshParams("sketch", 900, fraction=0.01)])
    assert got.loss[0] > got.loss[1] > got.loss[2] > got.loss[3] == 0
    assert (np.diff(got.error[:3]) < 0).all()
    assert got.share[3] == 0


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("sampling") / "model")


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return load_model(model_folder, "fp32")[0]


def item(seed: int = 0, tokens: int = 700, answers: int = 12) -> Item:
    rng = np.random.default_rng(seed)
    return Item(rng.integers(0, 250, tokens), np.arange(tokens - answers, tokens), "facts", 704)


CANDIDATES = lsh_grid(("sketch", "signature"), (0.02, 0.2), (64,))


def test_gradient_by_another_path(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """g . o and g . V_j of the last rows are those of a backward pass through the whole sequence in tiles."""
    one, seen = item(), []
    monkeypatch.setattr(sampling, "_layer", lambda *what: seen.append(what) or [tally(steps(), CANDIDATES)] * 2)
    sample_item(model, one, CANDIDATES)
    bases: dict[tuple[int, int], np.ndarray] = {}

    class Watcher:
        def tile(self, layer: int, head: int, weight: torch.Tensor, gradient: torch.Tensor, base: torch.Tensor) -> None:
            if weight.shape[-1] == len(one.tokens):  # the last rows
                bases[layer, head] = np.stack([base.numpy().copy(), gradient[..., 3].numpy().copy()])

    ids = torch.from_numpy(one.tokens.copy())[None]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    sign = np.random.default_rng([0, int(one.id, 16)]).choice([-1.0, 1.0], 12)
    with attention(Setting(None, Watcher())), torch.enable_grad():
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0][one.targets - 1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, one.targets], reduction="none")
        torch.autograd.grad((torch.from_numpy(sign).float() * losses).sum(), embedded)
    for layer, (arrays, grad, at, first, _) in enumerate(seen):
        query, keys, values, scale = arrays
        assert keys.shape[1] == len(one.tokens) - 1
        for head in range(4):
            for row in at.tolist():
                score = (query[head, row - first] @ keys[head // 2, : row + 1].T) * scale
                output = score.softmax(-1) @ values[head // 2, : row + 1]
                g = grad[head, row - first]
                base, third = bases[layer, head // 2][:, head % 2, row - len(one.tokens)]
                assert float(g @ output) == pytest.approx(float(base), rel=2e-3, abs=1e-6)
                assert float(g @ values[head // 2, 3]) == pytest.approx(float(third), rel=2e-3, abs=1e-6)


def test_item_files_and_resuming(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [item(0), item(1)]
    first = sample_items(model, items, CANDIDATES, tmp_path)
    assert all((each.loss > 0).all() and each.loss.shape == (2, 2, len(CANDIDATES)) for each in first)
    assert all((each.loss[..., 0] > each.loss[..., 1]).all() for each in first)  # sketches of 2 and of 20 %
    assert model.config._attn_implementation == sampling.EXACT
    (tmp_path / f"{items[1].id}.npz").unlink()
    made: list[str] = []
    real = sampling.sample_item
    monkeypatch.setattr(sampling, "sample_item", lambda m, i, *rest: made.append(i.id) or real(m, i, *rest))
    again = sample_items(model, items, CANDIDATES[:2], tmp_path)  # fewer candidates are known already
    assert made == [items[1].id]
    assert again[0].candidates == CANDIDATES
    np.testing.assert_allclose(again[1].loss, first[1].loss[..., :2], rtol=1e-6)
    other = [LshParams("sketch", 64, fraction=0.05)]
    sample_items(model, items, [*other, *other, *CANDIDATES], tmp_path)
    assert made == [items[1].id, items[0].id, items[1].id]
    kept = [ItemSampling.load(tmp_path / f"{each.id}.npz") for each in items]  # what was there stays, beside what was lacking
    assert kept[0].candidates == (*CANDIDATES, *other)
    assert kept[1].candidates == (*CANDIDATES[:2], *other, *CANDIDATES[2:])
    whole = sample_item(model, items[1], kept[1].candidates)
    for name in ("loss", "error", "share", "read"):
        np.testing.assert_allclose(getattr(kept[1], name), getattr(whole, name), rtol=1e-5)
    (tmp_path / f"{items[0].id}.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="delete it and run the command again"):
        sample_items(model, items, CANDIDATES, tmp_path)
    with pytest.raises(UserError, match="tokens before its answer: at least 512"):
        sample_item(model, item(2, 400), CANDIDATES)


def profile(n: int, change: float, targets: int) -> tuple[ItemProfile, Item]:
    """An item whose loss changes by `change` whatever is cut."""
    joint = np.zeros((2, 2, n // 64 + 1))
    joint[..., :-1] = change
    one = Item(np.arange(n) % 7 + targets, np.arange(n - targets, n), "facts", n)
    return ItemProfile(one.id, n, 1.0, joint), one


def test_currency() -> None:
    """T s^2 / 2 for spans, averaged over items; samples as measured, nothing where a step is exact, the longest's at n_max."""
    pairs = [profile(1024, 0.1, 8), profile(1024, -0.3, 2), profile(4096, 0.2, 4)]
    curves = span_curves([p for p, _ in pairs], [i for _, i in pairs])
    assert curves[1024][0, 0, 2] == pytest.approx((8 * 0.01 + 2 * 0.09) / 4)
    assert curves[4096][1, 1, 2] == pytest.approx(4 * 0.04 / 2)
    assert (curves[1024][..., -1] == 0).all()
    wanted = lsh_grid(("sketch", "tables"), (0.02,), (64,))
    rng = np.random.default_rng(0)
    measured = [
        ItemSampling(str(i), n, n, weight, wanted, *rng.uniform(0.1, 1, (4, 2, 2, 2)))
        for i, (n, weight) in enumerate(((1024, 1.0), (4096, 1.0), (4096, 3.0)))
    ]
    shape = Plan.from_dict(_plan_dict()).model
    made = build_choices(shape, 8192, curves, measured, [HeadRule("span", 0.0, 0.5)])
    assert made.lengths == (1024, 4096, 8192)
    assert [rule.mode for rule in made.rules] == ["span", "dense", "lsh", "lsh"]
    mean = (measured[1].loss + 3 * measured[2].loss) / 4
    assert (made.loss[0, ..., 2:] == 0).all()  # shorter than 2048
    np.testing.assert_allclose(made.loss[1, ..., 2:], mean)
    np.testing.assert_allclose(made.loss[2, ..., 2:], mean)
    np.testing.assert_allclose(made.drawn[..., 2:], (measured[1].share + 3 * measured[2].share) / 4)
    assert (made.loss[..., 1] == 0).all()
    assert made.loss[1, 0, 0, 0] == pytest.approx(4 * 0.04 / 2)
    assert math.isclose(made.read[0, 0, 0], 0)
    none = build_choices(shape, 8192, curves, [], [HeadRule("span", 0.0, 0.5)])
    assert [rule.mode for rule in none.rules] == ["span", "dense"]
    odd = build_choices(shape, 8001, curves, measured, [HeadRule("span", 0.0, 0.5)])
    assert odd.lengths == (1024, 4096, 8001)  # no length above n_max
    assert (odd.loss[2, ..., 1] == 0).all()
    # Items that were measured with other ways of sampling, and a way that one of them lacks.
    apart = [
        dataclasses.replace(each, candidates=lsh_grid(("sketch", "tables"), (0.1 + i / 10,), (64,)))
        for i, each in enumerate(measured)
    ]
    shared = build_choices(shape, 8192, curves, apart, [])
    assert [rule.lsh.index for rule in shared.rules if rule.lsh] == ["tables"]
    with pytest.raises(
        UserError, match=r"the 3 sampled items have in common no sketch 0\.1, window 64, .* attnspan plan DIR --target"
    ):
        build_choices(shape, 8192, curves, apart, [], apart[0].candidates)
    alone = [
        dataclasses.replace(each, candidates=lsh_grid(("sketch",), (0.1 + i / 10, 0.05 + i / 10), (64,)))
        for i, each in enumerate(measured)
    ]
    with pytest.raises(UserError, match="have in common no way of sampling: run attnspan plan DIR --target again"):
        build_choices(shape, 8192, curves, alone, [])


def _plan_dict() -> dict[str, Any]:
    from attnspan.planner.shape import ModelShape
    from attnspan.planner.uniform import uniform

    return uniform(ModelShape("m", 2, 4, 2, 16), 0.5, 8192).to_dict()


@pytest.fixture(scope="module")
def calibrated(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "calib"
    options = ["--lengths", "1536", "--items", "2", "--held-out", "1", "--held-out-length", "1536", "--dtype", "fp32"]
    assert main(["calibrate", str(model_folder), "-o", str(folder), *options]) == 0
    return folder


def test_command(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "calib", tmp_path / "plan.json"
    shutil.copytree(calibrated, folder)
    options = ["--n-max", "4096", "--index", "sketch,signature", "--sampling-items", "1", "--threads", "1", "-o", str(out)]
    assert main(["plan", str(folder), "--target", "hybrid", "--read", "40%", "--gpu-kv", "300KiB", *options]) == 0
    said = capsys.readouterr().out
    assert "span+dense+lsh" in said
    assert "<- written" in said
    plan = Plan.load(out)
    assert plan.provenance["bounds"]["share of dense bytes read at 4096 tokens"]["bound"] == 0.4
    assert plan.provenance["items"] == [each.id for each in Calibration.load(folder).calibration_items()]
    assert plan.solver_gap is not None
    assert plan.solver_gap <= 0.002
    assert len(list((folder / FOLDER).glob("*.npz"))) == 1
    assert main(["report", str(folder), "-o", str(tmp_path / "report.html")]) == 0
    assert "40% of dense reads a token" in (tmp_path / "report.html").read_text()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(sampling, "sample_items", never)
    assert main(["plan", str(folder), "--target", "cpu", "--kv", "700KiB", "--kinds", "span,lsh", *options]) == 0
    assert {rule.mode for layer in Plan.load(out).rules for rule in layer} <= {"span", "lsh"}
    spans = ["--n-max", "4096", "-o", str(out)]
    assert main(["plan", str(folder), "--target", "cpu", "--read", "50%", "--kinds", "span,dense", *spans]) == 0
    assert dataclasses.asdict(load_choices(folder, 4096).shape) == dataclasses.asdict(plan.model)


def time_tables(folder: Path) -> tuple[Path, Path]:
    """Of bench attention with 2 threads; of bench lsh with 1 and 2 threads, signatures of 64 bits only."""
    spans, sampled = folder / "attention.json", folder / "lsh.json"
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16}
    both = {"dtype": "bf16", "batch": 1}
    step = both | {"kernel": "attnspan", "phase": "decode"}
    decode = [step | {"kept_bytes": n * 128, "median_ms": 0.01 + n * 1e-5} for n in (1024, 8192)]
    spans.write_text(json.dumps({"settings": shape | {"threads": 2}, "results": decode}))
    step = both | shape | {"kernel": "signature", "parameters": {"signature_bits": 64}, "index_bytes_per_token": 8.0}
    drawn = [
        step | {"threads": threads, "context": n, "kept_bytes": n * 2 * 8 + rows * 64, "median_ms": 0.01 / threads}
        for n in (4096, 8192) for rows in (200, 400) for threads in (1, 2)
    ]  # fmt: skip
    sampled.write_text(json.dumps({"results": drawn}))
    return spans, sampled


def test_time_and_its_tables(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only ways of sampling whose times are known are measured and chosen; a target with a GPU is told what was timed."""
    folder, out = tmp_path / "calib", tmp_path / "plan.json"
    shutil.copytree(calibrated, folder)
    spans, sampled = time_tables(tmp_path)
    tables = ["--cost-table", str(spans), "--lsh-cost-table", str(sampled)]
    command = ["plan", str(folder), "--n-max", "4096", "-o", str(out), "--target"]
    timed = [*command, "hybrid", "--ms-per-token", "1", "--sampling-items", "1", *tables]
    assert main([*timed, "--index", "sketch,signature"]) == 2
    assert (
        "has times of signature of 64 bits: of each index it must have some of sketch, signature of 64" in capsys.readouterr().err
    )
    assert not (folder / FOLDER).exists()
    assert main([*timed, "--kinds", "lsh"]) == 0
    assert "--ms-per-token counts all attention as target cpu computes it" in capsys.readouterr().out
    assert {rule.lsh.signature_bits for layer in Plan.load(out).rules for rule in layer if rule.lsh} == {64}
    kept = ItemSampling.load(next((folder / FOLDER).glob("*.npz")))
    assert {each.signature_bits for each in kept.candidates} == {64}
    assert main([*command, "cpu", "--ms-per-token", "1", *tables[:2]]) == 2
    assert "give --lsh-cost-table, or leave them out with --kinds span,dense" in capsys.readouterr().err
    assert main([*command, "cpu", "--ms-per-token", "1", "--kinds", "span", *tables[:2]]) == 0
    assert "--ms-per-token counts" not in capsys.readouterr().out


def test_a_folder_for_each_set_of_options(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plans that differ in anything lie apart, however long their options are; reports know the bounds."""
    folder = tmp_path / "calib"
    shutil.copytree(calibrated, folder)
    command = [
        "plan",
        str(folder),
        "--n-max",
        "4096",
        "-o",
        str(tmp_path / "plan.json"),
        "--target",
        "cpu",
        "--kinds",
        "span,dense",
    ]
    many = ",".join(str(64 * n) for n in range(2, 64))
    timed = ["--ms-per-token", "1", "--cost-table"]
    for name in ("a.json", "b.json"):
        shutil.copy(time_tables(tmp_path)[0], tmp_path / name)
    for more in (
        ["--read", "60%"], ["--read", "60%", "--max-rules-per-layer", "1"], [*timed, str(tmp_path / "a.json")],
        [*timed, str(tmp_path / "b.json")], ["--read", "60%", "--alphas", many, "--betas", "0,0.5"],
        ["--read", "60%", "--alphas", many, "--betas", "0,0.25"],
    ):  # fmt: skip
        assert main([*command, *more]) == 0, capsys.readouterr().err
    assert len(list((folder / "plans").glob("*/candidates.json"))) == 6
    assert main(["report", str(folder), "-o", str(tmp_path / "report.html")]) == 0
    assert "Budget: 60% of dense reads a token." in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--read 10%", "--read needs --target"),
        ("--target tpu --read 10%", "change --target"),
        ("--target hybrid --read ten", "must be a value, perhaps with @"),
        ("--target hybrid --read 10%@8192 --n-max 4096", "at most n_max, 4096"),
        ("--target hybrid --gpu-kv much", "must be a size such as"),
        ("--target hybrid", "nothing is bounded"),
        ("--target hybrid --read 10% --density 0.5", "--density does not go with --target"),
        ("--target hybrid --read 10% --rounds 1", "--rounds does not go with --target"),
        ("--target hybrid --read 10% --kinds span,near", "change --kinds"),
        ("--target hybrid --read 10% --index exact", "change --index"),
        ("--target hybrid --read 10% --fractions a", "must be numbers with commas"),
        ("--target hybrid --read 10% --sampling-items 0", "change --sampling-items"),
        ("--target hybrid --read 1% --kinds span", "raise it to --read"),
        ("--target hybrid --read 10% --kinds span --index sketch", "--index is sketch, which needs lsh among --kinds"),
        ("--target hybrid --read 10% --kinds dense --fractions 0.1", "--fractions is 0.1, which needs lsh among --kinds"),
        ("--target hybrid --read 10% --kinds dense --sampling-items 2", "--sampling-items is 2, which needs lsh among --kinds"),
        ("--target hybrid --read 10% --index tables --fractions 0.1", "--fractions is 0.1, which needs sketch among --index"),
        ("--target hybrid --read 10% --other-ms 5", "--other-ms is 5.0, which needs --ms-per-token"),
        ("--target hybrid --read 10% --cost-table a.json", "--cost-table is a.json, which needs --ms-per-token"),
        ("--target hybrid --read 10% --lsh-cost-table a.json", "--lsh-cost-table is a.json, which needs --ms-per-token"),
        ("--target hybrid --read 10% --kinds span --threads -3", "threads is -3: must be an integer from 1"),
        ("--target hybrid --read 10% --kinds span --threads 0", "change --threads"),
        ("--density 0.5 --threads 0", "change --threads"),
        ("--target hybrid --read 10% --cache-dtype int8", "must be one of fp16, bf16, fp32 for target hybrid"),
    ],
)
def test_wrong_options(
    calibrated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    words: str,
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was read")

    monkeypatch.setattr("attnspan.calibration.loading.load_model", never)
    assert main(["plan", str(calibrated), *options.split(), "-o", str(tmp_path / "plan.json")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "plan.json").exists()

"""`attnspan calibrate` and `attnspan plan DIR` on a tiny model: files, resuming, and what users get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnspan.calibration import loading, profile, refine
from attnspan.calibration.estimators import ESTIMATORS, curves
from attnspan.calibration.folder import Calibration
from attnspan.calibration.item_profile import ItemProfile
from attnspan.calibration.items import Item, load_items
from attnspan.calibration.profile import profile_item, profile_items
from attnspan.calibration.scorer import TorchScorer
from attnspan.calibration.validate import validate
from attnspan.export.cli import main
from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.uniform import uniform
from tests.tiny_models import save_tiny_model

LENGTHS = "1536,2048"  # of a tokenizer that has a token a byte
CALIBRATE = f"--lengths {LENGTHS} --items 3 --held-out 2 --held-out-length 3072 --dtype fp32 --entries --threads 1".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("calibration") / "model")


@pytest.fixture(scope="module")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "calib"
    assert main(["calibrate", str(model), "-o", str(folder), *CALIBRATE]) == 0
    return folder


def test_folder(calibrated: Path) -> None:
    cal = Calibration.load(calibrated)
    items = cal.calibration_items()
    assert [item.length for item in items] == [1536] * 3 + [2048] * 3
    assert {item.length for item in cal.held_out_items()} == {3072}
    for item in items:
        got = ItemProfile.load(calibrated / "profile" / f"{item.id}.npz")
        assert got.joint.shape == (2, 2, item.length // 64 + 1)
        assert got.entry is not None
        assert got.joint[..., -1] == pytest.approx(0, abs=1e-5)
        assert (np.diff(got.entry, axis=-1) <= 1e-9).all()
    assert cal.provenance()["items"] == [item.id for item in items]


def test_same_seed_same_corpus_and_interrupted_runs_go_on(
    model: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = profile.profile_item, []

    def interrupted(*args: Any, **kwargs: Any) -> ItemProfile:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(profile, "profile_item", interrupted)
    command = ["calibrate", str(model), "-o", str(tmp_path / "c"), *CALIBRATE]
    assert main(command) == 130
    assert len(list((tmp_path / "c" / "profile").glob("*.npz"))) == 2
    assert main(["plan", str(tmp_path / "c"), "--density", "0.5", "-o", str(tmp_path / "p.json")]) == 2
    assert "4 of 6 items are not profiled yet; run attnspan calibrate again" in capsys.readouterr().err
    calls.append(None)
    assert main(command) == 0
    assert len(calls) == 3 + 1 + 4  # the two that were done are not done again
    same = [item.id for item in load_items(tmp_path / "c" / "items.jsonl")]
    assert same == [item.id for item in load_items(calibrated / "items.jsonl")]
    for name in same:
        a, b = (ItemProfile.load(folder / "profile" / f"{name}.npz") for folder in (tmp_path / "c", calibrated))
        np.testing.assert_allclose(a.joint, b.joint, rtol=1e-4, atol=1e-6)
    assert main([*command, "--seed", "5"]) == 2
    assert "was made with another seed; use the same options to go on, or another -o" in capsys.readouterr().err


def test_plan(calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    few = ["--rounds", "1", "--search", "4", "--ablate", "1", "--points", "2", "--threads", "1"]
    assert main(["plan", str(calibrated), "--density", "0.6", "--n-max", "4096", *few, "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "<- written" in shown
    plan = Plan.load(out)
    for n in (1536, 2048, 4096):
        assert plan.density(n) <= 0.6 + 1e-9
    assert all(len({rule for rule in layer}) <= 2 for layer in plan.rules)
    assert plan.solver_gap is None or plan.solver_gap <= 0.01
    listed = plan.validation["candidates"]
    assert plan.validation["length"] == 3072
    assert {"dense profile", "ablation", "round 1"} <= {row["name"] for row in listed} | {"ablation", "round 1"}
    assert min(listed, key=lambda row: row["kl"])["name"] == plan.validation["chosen"]
    assert all(0 <= row["top1"] <= 1 and row["kl"] >= 0 for row in listed)
    assert plan.provenance["items"] == Calibration.load(calibrated).provenance()["items"]


def test_plan_without_the_model(calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = shutil.copytree(calibrated, tmp_path / "calib")
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    for grid in (["--grid", "proportional"], ["--grid", "reference"], ["--alphas", "0,128", "--betas", "0,0.5,1"]):
        command = ["plan", str(moved), "--density", "0.5", "--n-max", "4096", "--rounds", "0", "--no-validate", *grid]
        assert main([*command, "-o", str(tmp_path / "p.json")]) == 0
        assert Plan.load(tmp_path / "p.json").density(4096) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "1.5"], "density is 1.5: must be a number from 0 to 1; change --density"),
        ([], "nothing is bounded"),
        (["--density", "0.01"], "more; raise --density"),
        (["--density", "0.5", "--n-max", "8192"], "n_max is 8192: must be an integer from 3072 to 4096"),
        (["--density", "0.5", "--grid", "coarse"], "grid is 'coarse': must be one of reference, fine, proportional"),
        (["--density", "0.5", "--estimator", "guess"], "estimator is 'guess'"),
        (["--density", "0.5", "--max-rules-per-layer", "two"], "rules per layer is 'two'"),
        (["--density", "0.5", "--alphas", "0"], "needs both --alphas and --betas"),
        (["--kv-bytes", "much"], "--kv-bytes is 'much'"),
        (["--milliseconds", "5"], "--cost-table"),
    ],
)
def test_wrong_plan_options(
    calibrated: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(calibrated), *options, "-o", str(tmp_path / "p.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_wrong_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path), "--density", "0.5"]) == 2
    assert "is no calibration folder" in capsys.readouterr().err
    assert main(["plan", "unifrm", "--density", "0.5"]) == 2
    assert "did you mean 'uniform'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "8192"], "length 8192 is beyond the 4096 tokens the model was made for; change --lengths"),
        (["--lengths", "1000"], "profiled length is 1000: must be a multiple of 64"),
        (["--lengths", "x"], "lengths is 'x'"),
        (["--held-out-length", "8192", "--lengths", "512"], "held-out length 8192 is beyond"),
        (["--dtype", "int4", "--lengths", "512"], "dtype is 'int4': must be one of fp32, bf16, fp16"),
        (["--answers", "mine"], "answers is 'mine': must be one of model, given"),
        (["--items", "0"], "items is 0"),
        (["--device", "cuda", "--lengths", "512"], "sees no GPU"),
        (["--data", "none.jsonl"], "cannot read none.jsonl"),
    ],
)
def test_wrong_calibrate_options(
    model: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["calibrate", str(model), "-o", str(tmp_path / "c"), *options]) == 2
    assert message in capsys.readouterr().err


def test_models_that_cannot_be_hooked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "slides", "mistral", sliding_window=128)
    assert main(["calibrate", str(tmp_path / "slides"), "-o", str(tmp_path / "c"), "--lengths", "512"]) == 2
    assert "only models whose every layer attends to all tokens can be calibrated" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path / "none"), "-o", str(tmp_path / "c"), "--lengths", "512"]) == 2
    assert "is no model" in capsys.readouterr().err


def test_own_documents(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Contexts too long lose their middle; too short ones are an error that names the lengths."""
    data = tmp_path / "data.jsonl"
    rows = [
        {"context": f"Record {i}. " + "All is well here. " * 60, "question": "What is the number?", "answer": f"It is {i}."}
        for i in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "calibrate",
        str(model),
        "-o",
        str(tmp_path / "c"),
        "--data",
        str(data),
        "--answers",
        "given",
        "--items",
        "2",
        "--held-out",
        "1",
        "--dtype",
        "fp32",
    ]
    assert main([*command, "--lengths", "512", "--held-out-length", "768"]) == 0
    assert all(len(item.tokens) <= 512 for item in load_items(tmp_path / "c" / "items.jsonl"))
    command[3] = str(tmp_path / "d")
    assert main([*command, "--lengths", "4096"]) == 2
    assert "none of the" in capsys.readouterr().err


def test_nan_loss(model: Path, tmp_path: Path) -> None:
    net, _ = loading.load_model(model, "fp32")
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    item = Item(np.arange(200) % 250, np.array([150, 199]), "test", 256)
    with pytest.raises(UserError, match=r"the loss of item .* is nan: must be a number; try --dtype fp32"):
        profile_item(net, item)


def test_checkpointed_layers_say_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = loading.load_model(model, "fp32")
    rng = np.random.default_rng(0)
    item = Item(rng.integers(0, 250, 300), np.array([250, 260, 299]), "test", 320)
    again = profile_item(net, item, entries=True)
    monkeypatch.setattr(profile, "_checkpoint", lambda model: model.eval())
    kept = profile_item(net, item, entries=True)
    np.testing.assert_allclose(again.joint, kept.joint, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(again.entry, kept.entry, rtol=1e-4, atol=1e-7)


def test_curve_is_the_slope_of_the_measured_loss(model: Path) -> None:
    """Through the whole model in fp64: with a head's output moved a little of the way to its output under another span, the loss
    moves by that share of the curve."""
    net, shape = loading.load_model(model, "fp32")
    net = net.double()
    rng = np.random.default_rng(1)
    item = Item(rng.integers(0, 250, 290), np.array([200, 250, 289]), "test", 320)
    got = profile_item(net, item)
    layer, head, blocks, eps = 1, 1, 2, 1e-4

    def loss(part: float) -> float:
        """The head's output is (1 - part) dense + part cut, by mixing the outputs of its layer's attention."""
        module = net.model.layers[layer].self_attn
        spans = np.full((shape.layers, shape.kv_heads), 320, np.int32)
        cut = spans.copy()
        cut[layer, head] = 64 * blocks
        outs = {}

        def grab(name: str) -> Any:
            return lambda _m, args: outs.__setitem__(name, args[0].detach())

        for name, s in (("dense", spans), ("cut", cut)):
            handle = module.o_proj.register_forward_pre_hook(grab(name))
            refine.answer_loss(net, item, s)
            handle.remove()
        mixed = outs["dense"] + part * (outs["cut"] - outs["dense"])
        handle = module.o_proj.register_forward_pre_hook(lambda _m, _a: (mixed,))
        value = refine.answer_loss(net, item, spans)
        handle.remove()
        return value

    # fp32 of answer_loss bounds the difference quotient: take a wide step and a central difference.
    step = 1e-2
    slope = (loss(step) - loss(-step)) / (2 * step)
    assert got.joint[layer, head, blocks] == pytest.approx(slope, rel=2e-2, abs=2e-5)
    assert eps < step


def test_estimators(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    profiles = [ItemProfile(str(i), 256, 1.0, rng.normal(size=(2, 3, 5)), np.abs(rng.normal(size=(2, 3, 5)))) for i in range(3)]
    for name in ESTIMATORS:
        curve = curves([profiles, profiles], name)[256]
        assert curve.shape == (2, 3, 5)
        assert (np.diff(curve, axis=-1) <= 0).all()
        assert (curve[..., -1] == 0).all()
    positive, signed, absolute = (curves([profiles], f"joint{x}")[256] for x in ("_positive", "", "_absolute"))
    assert (positive >= signed - 1e-12).all()
    assert (absolute >= positive - 1e-12).all()
    profiles[0].save(tmp_path / "a.npz")
    back = ItemProfile.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(back.joint, profiles[0].joint)
    (tmp_path / "a.npz").write_bytes(b"PK junk")
    with pytest.raises(UserError, match="delete it and run the command again"):
        ItemProfile.load(tmp_path / "a.npz")


def test_validation_and_scorer(model: Path, tmp_path: Path) -> None:
    net, shape = loading.load_model(model, "fp32")
    rng = np.random.default_rng(2)
    items = [Item(rng.integers(0, 250, 500), np.arange(400, 500, 7), "test", 512) for _ in range(2)]
    full, half = (uniform(shape, d, 512) for d in (1.0, 0.5))
    got = validate(net, items, {"full": full, "half": half})
    assert got["full"].kl == pytest.approx(0, abs=1e-5)
    assert got["full"].top1 == 1
    assert got["full"].loss == pytest.approx(got["full"].dense_loss, abs=1e-4)
    assert got["half"].kl > 1e-3
    dense, cut = TorchScorer(net), TorchScorer(net, half)
    a, b = (s.logits(items[0].tokens, 490) for s in (dense, cut))
    assert a.shape == (10, 300)
    assert np.abs(a - b).max() > 1e-3
    assert len(profile_items(net, items, tmp_path, half)) == 2

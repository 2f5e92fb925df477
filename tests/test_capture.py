"""`attnspan capture` on a tiny model: what it writes is what the model's attention is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from attnspan.calibration import loading
from attnspan.calibration.capture import capture
from attnspan.calibration.texts import load
from attnspan.cpu_runtime import bandwidth, bench_lsh_rounds
from attnspan.cpu_runtime.lsh_keys import Capture, from_bf16
from attnspan.export.cli import main
from tests.tiny_models import save_tiny_model

TOKENS = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("capture") / "model")


@pytest.fixture(scope="module")
def file(model: Path) -> Path:
    out = model.parent / "keys.npz"
    arguments = ["--builtin", "--tokens", str(TOKENS), "--layers", "1,0", "--queries", "40", "--dtype", "fp32", "--threads", "1"]
    assert main(["capture", str(model), *arguments, "-o", str(out)]) == 0
    return out


def attended(model: Path, ids: list[int], layer: int) -> np.ndarray:
    """What transformers' own attention gives, [tokens, heads, head_dim]: the input of the layer's output projection."""
    net = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa")
    seen: list[Any] = []
    net.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with torch.inference_mode():
        net(torch.tensor(ids)[None])
    return np.asarray(seen[0].reshape(len(ids), 4, -1).numpy())


def test_attention_over_the_file_is_the_model_s(model: Path, file: Path) -> None:
    got = Capture.load(file)
    meta = got.meta
    assert (meta["layers"], meta["tokens"], meta["queries"]) == ([0, 1], TOKENS, 40)
    assert (meta["heads"], meta["kv_heads"], meta["head_dim"], meta["scale"]) == (4, 2, 16, 0.25)
    assert (meta["model"], meta["dtype"], meta["text"]["name"]) == ("model", "bfloat16", "moby_dick")
    assert meta["rope"]["max_position_embeddings"] == 4096
    ids = list(load("moby_dick").encode()[:TOKENS])  # of a tokenizer that has a token a byte
    for layer in (0, 1):
        q, k, v = (from_bf16(got.arrays[f"{name}_{layer}"]) for name in "qkv")
        assert (q.shape, k.shape, v.shape) == ((4, 40, 16), (2, TOKENS, 16), (2, TOKENS, 16))
        score = q @ k.repeat(2, 0).swapaxes(1, 2) * meta["scale"]
        score[:, np.arange(TOKENS) > np.arange(TOKENS - 40, TOKENS)[:, None]] = -np.inf
        weight = np.exp(score - score.max(-1, keepdims=True))
        out = (weight / weight.sum(-1, keepdims=True)) @ v.repeat(2, 0)
        want = attended(model, ids, layer)[-40:].swapaxes(0, 1)
        assert np.abs(out - want).max() < 0.02 * np.abs(want).max()  # bfloat16


def test_fp16_and_own_text(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(load("persuasion")[:1000], encoding="utf-8")
    out = tmp_path / "keys.npz"
    command = ["capture", str(model), "--text", str(text), "--tokens", "256", "--dtype", "fp16", "--threads", "1", "-o", str(out)]
    assert main(command) == 0
    got = Capture.load(out)
    assert got.meta["layers"] == [1]  # the middle one
    assert got.meta["queries"] == 256
    assert got.arrays["k_1"].dtype == np.float16
    assert got.joined("k").dtype == np.uint16
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_nothing_runs_behind_the_last_layer(model: Path) -> None:
    net, _ = loading.load_model(model, "fp32")
    ran = []
    for module in net.model.layers:
        module.register_forward_pre_hook(lambda module, _args: ran.append(module.self_attn.layer_idx))
    tokens = np.arange(200) % 250
    arrays = capture(net, tokens, [0], 16)
    assert ran == [0]
    assert set(arrays) == {"q_0", "k_0", "v_0", "scale"}
    with torch.inference_mode(), loading.attention(loading.Setting()):  # the model is hooked as before
        net(torch.from_numpy(tokens)[None], use_cache=False)
    assert ran == [0, 0, 1]


def test_bench_on_captured_keys(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bandwidth.ReadPass
    monkeypatch.setattr(bandwidth, "ReadPass", lambda threads: whole(threads, 1 << 22))
    monkeypatch.setattr(bench_lsh_rounds, "_MIN_SECONDS", 0.002)
    out = tmp_path / "out.json"
    command = ["bench", "lsh", "--keys", str(file), "--context", "1000", "--rounds", "1", "--threads", "1", "--json", str(out)]
    assert main([*command, "--bits", "5", "--tables", "20", "--baselines", "attnspan-dense,topk"]) == 0
    results = json.loads(out.read_text())["results"]
    assert [r["kernel"] for r in results] == ["attnspan-dense", "sketch", "signature", "tables", *["topk"] * 3]
    assert {(r["heads"], r["kv_heads"], r["head_dim"]) for r in results} == {(8, 4, 16)}
    assert results[0]["rel_error"] < 1e-5
    assert "layers 0, 1, 4 KV heads, 600 tokens, repeated to 1000" in capsys.readouterr().out
    for arguments, message in (
        (["--layers", "7"], f"{file} has no layer 7: it holds 0, 1"),
        (["--kv-heads", "5"], "--kv-heads is 5"),
        (["--head-dim", "64"], "--head-dim 64"),
        (["--heads", "6"], "--heads 6"),
    ):
        assert main([*command, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--builtin", "--tokens", "5000"], "tokens is 5000: the model was made for 4096; change --tokens"),
        (["--builtin", "--tokens", "4096", "--layers", "0,2"], "layer is 2: must be an integer from 0 to 1; change --layers"),
        (["--builtin", "--layers", "first"], "layers is 'first'"),
        (["--builtin", "--tokens", "100"], "tokens is 100: must be an integer from 128"),
        (["--builtin", "--tokens", "512", "--queries", "600"], "queries is 600: must be an integer from 1 to 512"),
        (["--builtin", "ulysses", "--tokens", "512"], "no text is named 'ulysses'"),
        (["--text", "SHORT", "--tokens", "512"], "tokens is 512: the text short.txt has 11; change --tokens"),
        (["--text", "none.txt", "--tokens", "512"], "cannot read none.txt: No such file or directory; change --text"),
        (["--tokens", "512"], "one of the arguments --text --builtin is required"),
        (["--builtin", "--tokens", "512", "--threads", "0"], "threads is 0"),
        (["--builtin", "--tokens", "512", "--dtype", "int4"], "dtype is 'int4'"),
        (["--builtin", "--tokens", "512", "-o", "no/such/folder/x.npz"], "in a folder that exists; change -o"),
    ],
)
def test_mistakes_are_found_before_weights_are_read(
    model: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "model"
    bare.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    (tmp_path / "short.txt").write_text("eleven byte")
    arguments = [str(tmp_path / "short.txt") if word == "SHORT" else word for word in arguments]
    assert main(["capture", str(bare), "-o", str(tmp_path / "keys.npz"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "keys.npz").exists()

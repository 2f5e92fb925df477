"""`attnspan bench lsh`: its contenders, the shape of its JSON, and its mistakes."""

from __future__ import annotations

import ctypes.util
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from attnspan.cpu_runtime import bandwidth, bench_lsh_rounds
from attnspan.cpu_runtime.bench_lsh_caches import Caches, Feed, copies_of, huge
from attnspan.cpu_runtime.bench_lsh_contenders import Contender, Lsh, dense, sampled, torch_sdpa
from attnspan.cpu_runtime.bench_lsh_draw import relative_error, study
from attnspan.cpu_runtime.bench_lsh_sketch import SketchDraw
from attnspan.cpu_runtime.lsh_keys import LayerKeys, clustered, from_bf16, random
from attnspan.export.cli import main
from attnspan.planner.lsh import inclusion, projection_of, state_bytes
from attnspan.planner.rules import LshParams

SMALL = ["--context", "640", "--heads", "4", "--kv-heads", "2", "--head-dim", "64", "--rounds", "2", "--threads", "1"]
TABLES = LshParams("tables", window=64, bits=6, tables=40, min_collisions=2)
SIGNATURE = LshParams("signature", window=64, signature_bits=128, max_hamming=50)
SKETCH = LshParams("sketch", window=64, fraction=0.05)
WINDOW = SINK = 64


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of results do not need good measurements."""
    whole = bandwidth.ReadPass
    monkeypatch.setattr(bandwidth, "ReadPass", lambda threads: whole(threads, 1 << 22))
    monkeypatch.setattr(bench_lsh_rounds, "_MIN_SECONDS", 0.002)
    monkeypatch.setattr(bench_lsh_rounds, "_SETTLE_SECONDS", 0.0)


def _over(keys: LayerKeys, params: LshParams, dtype: str = "bf16") -> tuple[Contender, Lsh]:
    capacity = 1152
    lsh = Lsh(params, projection_of(params, keys.key.shape[2]), [params.max_hamming or 0] * len(keys.key))
    caches = Caches([keys], capacity, dtype, 2)
    size = state_bytes(params, len(keys.key), keys.key.shape[2], capacity)
    return sampled(caches, Feed.of([keys], 64, 0), 1, lsh, size), lsh


@pytest.mark.parametrize("params", [SKETCH, SIGNATURE, TABLES], ids=lambda params: params.index)
def test_op_draws_what_the_study_counts(params: LshParams) -> None:
    """The estimator over the keys that the study finds is what the op gives."""
    keys = clustered(1024, 64, 4, 2, 128)
    one, lsh = _over(keys, params)
    got = one.answers()[:, 0]
    draw = bench_lsh_rounds._draw(lsh, keys.scale)
    for h in range(2):
        key, value = (from_bf16(x[h, :1024]).astype(np.float64) for x in (keys.key, keys.value))
        mean = key[SINK : 1024 - 16 - WINDOW].mean(0)
        draw.index(h, (key - mean).astype(np.float32))
        for j in range(17):
            end = 1024 - 16 + j
            query = keys.query[j, 2 * h : 2 * h + 2]
            between = slice(SINK, end - WINDOW)
            mask, log_u = np.zeros((2, 1024), bool), np.zeros((2, 1024))
            mask[:, :end] = True
            mask[:, between] = draw.draw(query, end - 1, SINK, end - WINDOW)[0]
            if isinstance(draw, SketchDraw):
                log_u[:, between] = [draw.log_inclusion(q, SINK, end - WINDOW) for q in query]
            else:
                cos = query @ (key - mean).T / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(key - mean, axis=1)
                log_u[:, between] = np.log(inclusion(params, cos))[:, between]
            score = np.where(mask, query @ key.T * keys.scale - log_u, -np.inf)
            weight = np.exp(score - score.max(1, keepdims=True))
            want = weight @ value / weight.sum(1, keepdims=True)
            assert relative_error(got[j, 2 * h : 2 * h + 2], want).max() < 1e-4
    assert len(one.build_seconds) == 2


def test_steps_append_until_the_room_ends() -> None:
    one, _ = _over(clustered(1024, 64, 4, 2, 128), SIGNATURE)
    one.answers()
    for _ in range(300):
        one.step()
    assert np.isfinite(one.output).all()
    assert one.steps == 300


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "bf16"])
def test_dense_contenders_attend_to_everything(dtype: str) -> None:
    full = random(700, 64, 4, 2, 32)
    rows = [full, full.cut(500)]
    caches, feed = Caches(rows, 768, dtype, 2), Feed.of(rows, 64, 0)
    want = np.stack([study(row, SINK, WINDOW, [], topk=False).exact for row in rows], axis=1)
    assert relative_error(dense(caches, feed, 1).answers(), want).max() < (0.03 if dtype == "int8" else 1e-5)
    if dtype != "int8":
        assert relative_error(torch_sdpa(caches, feed, 1).answers(), want).max() < (0.02 if dtype == "bf16" else 2e-3)


def test_caches_rotate_past_the_last_level_cache() -> None:
    each = Caches.bytes_each(1, 8, 131072 + 2048, 128, "bf16")
    assert each == 2 * 8 * 133120 * 128 * 2
    assert copies_of(each) == 3
    assert copies_of(1000) == 64
    array = huge((3, 5), np.uint16)
    assert array.ctypes.data % (1 << 21) == 0
    assert not array.any()


@pytest.mark.usefixtures("quick")
def test_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    more = ["--tables", "30,40", "--bits", "6", "--max-hamming", "50,auto,50", "--append", "20", "--batch", "2", "--ragged"]
    assert main(["bench", "lsh", *SMALL, "--context", "1024", *more, "--json", str(out), "--plot", str(png)]) == 0
    report = json.loads(out.read_text())
    assert report["bandwidth_gbs"] > 0
    results = {r["label"]: r for r in report["results"]}
    kernels = [r["kernel"] for r in report["results"]]
    count = kernels.count("signature")
    assert count in (1, 2)  # auto may choose 50, too
    own = ["sketch", *["signature"] * count, *["tables"] * 2]
    assert kernels == ["attnspan-dense", *own, "ort-gqa-fp32", "ort-gqa-int8", "torch-sdpa-bf16", *["topk"] * len(own)]
    for r in report["results"]:
        assert r["contexts"] == [1024, 512]
        assert len(r["rel_error_heads"]) == len(r["effective_keys_heads"]) == 4
        assert r["median_ms"] is None if r["kernel"] == "topk" else 0 < r["min_ms"] <= r["median_ms"]
    full = results["attnspan-dense"]
    assert full["rel_error"] < 1e-5
    assert full["kept_bytes"] == 2 * 2 * 1536 * 64 * 2
    for label in ("sketch .02", "tables 6,40", "signature 128 h50"):
        r = results[label]
        assert 0 < r["sampled"] < r["sampled_max"] < 1
        assert 1e-4 < r["rel_error"] < 1
        assert r["limit_ms"] == pytest.approx(r["kept_bytes"] / r["bandwidth_gbs"] / 1e6)
        assert r["kept_bytes"] < full["kept_bytes"]
        assert r["build_seconds"] > 0
        assert r["append"]["tokens"] == 20
        assert r["split_ms"] is None or set(r["split_ms"]) == {"hash", "retrieve", "attend", "update"}
    assert results["signature 128 h50"]["index_bytes_per_token"] == 16
    sketch = results["sketch .02"]
    assert sketch["index_bytes_per_token"] == 18
    assert sketch["parameters"] == {"fraction": 0.02, "seed": 0, "window": 64}
    assert sketch["sampled"] == pytest.approx(0.02, abs=0.01)
    assert results["topk as sketch .02"]["sampled_heads"] == sketch["sampled_heads"]
    assert results["topk as tables 6,40"]["sampled"] == results["tables 6,40"]["sampled"]
    assert results["tables 6,30"]["sampled"] < results["tables 6,40"]["sampled"]
    assert "topk as tables 6,40" in capsys.readouterr().out
    assert imread(png).shape[1] > 500


@pytest.mark.usefixtures("quick")
def test_fractions_of_sketches(tmp_path: Path) -> None:
    """A list is swept. The limit counts the index but for sinks and window, and rows that a group draws once."""
    out = tmp_path / "out.json"
    more = ["--index", "sketch", "--fraction", "0.02,.5,0.1", "--baselines", "attnspan-dense", "--json", str(out)]
    assert main(["bench", "lsh", *SMALL, "--context", "2048", *more]) == 0
    few, most, some = json.loads(out.read_text())["results"][1:]
    assert [r["label"] for r in (few, most, some)] == ["sketch .02", "sketch .5", "sketch .1"]
    assert few["sampled"] < some["sampled"] < most["sampled"]
    assert few["rel_error"] > most["rel_error"]
    index, row = 2 * 18 * (2048 - 8 - 128), 2 * 64 * 2  # the queries stand at the last 17 positions
    for r in (few, some, most):
        assert r["kernel"] == "sketch"
        rows = (r["kept_bytes"] - index) / row
        drawn = 2048 * np.reshape(r["sampled_heads"], (2, 2))
        assert 0.99 * drawn.max(1).sum() < rows - 2 * 128 < 1.01 * drawn.sum()


@pytest.mark.usefixtures("quick")
def test_what_is_of_hashes_alone() -> None:
    """Beside them a sketch does not mind it."""
    more = ["--baselines", "none", "--index", "sketch,signature", "--min-inclusion", "0.1"]
    assert main(["bench", "lsh", *SMALL, *more]) == 0


@pytest.mark.usefixtures("quick")
def test_no_baselines_and_other_types() -> None:
    assert (
        main(["bench", "lsh", *SMALL, "--baselines", "none", "--keys", "random", "--dtype", "int8", "--index", "signature"]) == 0
    )
    assert main(["bench", "lsh", *SMALL, "--baselines", "ort-gqa-int8", "--threads", "1,2", "--max-hamming", "per-head"]) == 0


def test_libraries_without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_lsh_rounds, "library_path", lambda: ctypes.util.find_library("c"))
    assert bench_lsh_rounds._Profile.open() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "trees"], "--index holds 'trees'; allowed are sketch, signature, tables"),
        (["--index", "none"], "--index is empty"),
        (["--bits", "16"], "lsh bits is 16: must be an integer from 1 to 15; change --bits"),
        (["--bits", "8,9,10", "--tables", "75,75"], "--bits has 3 numbers, --tables 2"),
        (["--tables", "1025"], "lsh tables is 1025: must be an integer from 1 to 1024; change --tables"),
        (["--tables", "many"], "--tables is 'many'"),
        (["--min-collisions", "5"], "from 1 to 4"),
        (["--signature-bits", "96"], "must be 64, 128 or 256"),
        (["--max-hamming", "129"], "lsh max_hamming is 129: must be an integer from 0 to 128; change --max-hamming"),
        (["--max-hamming", "few"], "--max-hamming is 'few'; allowed is a list of numbers, auto or per-head"),
        (["--fraction", "0"], "fraction is 0.0: must be a number from 1e-06 to 1; change --fraction"),
        (["--fraction", "0.7"], "lsh fraction is 0.7: must be a number from 0 to 0.5; change --fraction"),
        (["--fraction", "2", "--index", "signature"], "fraction is 2.0: must be a number from 1e-06 to 1; change --fraction"),
        (["--index", "sketch", "--min-inclusion", "0.1"], "index 'sketch' does not take it; remove --min-inclusion"),
        (["--min-inclusion", "2"], "must be a number from 0 to 1; change --min-inclusion"),
        (["--window", "0"], "lsh window is 0"),
        (["--context", "300"], "--context makes rows of 300 tokens; an index needs at least 401"),
        (["--batch", "3", "--ragged"], "--context makes rows of [640, 426, 213] tokens"),
        (["--context", "1000000000"], "GB are free: lower --context"),
        (["--batch", "0"], "batch is 0"),
        (["--heads", "5"], "--heads is 5; it must be a multiple of --kv-heads (2)"),
        (["--dtype", "fp8"], "--dtype is 'fp8'; allowed are"),
        (["--baselines", "vllm"], "--baselines holds 'vllm'"),
        (["--threads", "0"], "threads is 0"),
        (["--rounds", "0"], "rounds is 0"),
        (["--append", "-1"], "tokens to append is -1"),
        (["--keys", "none.npz"], "cannot read none.npz"),
        (["--layers", ","], "--layers is empty"),
        (["--layers", "0"], "--layers is for a captured file"),
        (["--json", "no/such/folder/x.json"], "no such folder"),
        (["--json", "."], "it is a folder"),
        (["--plot", "."], "it is a folder"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "lsh", *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_files_that_are_no_captures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.npz"
    meta = {"format": "attnspan-capture", "layers": [0], "heads": 2, "kv_heads": 1, "queries": 4, "tokens": 100, "head_dim": 8}
    short = {name: np.zeros((1, 90, 8), np.float16) for name in ("q_0", "k_0", "v_0")}
    for write in (lambda: np.savez(bad, meta=np.array(json.dumps(meta)), **short), lambda: np.save(bad.open("wb"), np.zeros(3)),
                  lambda: np.savez(bad, meta=np.array(json.dumps(meta | {"layers": 7})), **short),
                  lambda: bad.write_bytes(b"PK junk"), lambda: bad.write_bytes(b""), lambda: np.savez(bad, x=np.zeros(3)),
                  lambda: np.savez(bad, meta=np.array('{"format": "other"}'))):  # fmt: skip
        write()
        assert main(["bench", "lsh", "--keys", str(bad)]) == 2
        error = capsys.readouterr().err
        assert "is not a file of attnspan capture" in error
        assert error.count("\n") == 1

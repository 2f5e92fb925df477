"""`attnspan bench attention`: what it measures, the shape of its JSON, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attnspan.cpu_runtime.bench_contenders import BASELINES, Case, attnspan_contender, baseline
from attnspan.export.cli import main

SMALL = ["--context", "256", "--heads", "4", "--kv-heads", "2", "--head-dim", "64", "--rounds", "3"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
def test_json(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["bench", "attention", "--phase", "decode,prefill", "--dtype", dtype, "--json", str(out), *SMALL]) == 0
    report = json.loads(out.read_text())
    assert report["bandwidth_gbs"] > 0
    torch = "torch-sdpa-bf16" if dtype == "int8" else f"torch-sdpa-{dtype}"
    kernels = ["attnspan", "attnspan", "ort-gqa-fp32", "ort-gqa-int8", torch]
    assert [(r["phase"], r["kernel"]) for r in report["results"]] == [(p, k) for p in ("decode", "prefill") for k in kernels]
    for r in report["results"]:
        assert {"context", "batch", "density", "dtype", "median_ms", "limit_ms"} <= r.keys()
        assert r["median_ms"] > 0
    dense, quarter = report["results"][:2]
    assert (dense["density"], quarter["density"]) == (1, 0.25)
    assert dense["kept_bytes"] == 2 * 2 * 256 * 64 * {"fp32": 4, "int8": 1}.get(dtype, 2)
    assert quarter["kept_bytes"] == dense["kept_bytes"] // 2  # 64 of 256 tokens are kept, and never fewer than 128
    assert torch in capsys.readouterr().out


def test_caches_rotate_past_the_last_level_cache() -> None:
    """A decode case walks through more cache memory than processors cache; a prefill case needs one cache."""
    case = Case("decode", 1 << 18, 1, 8, 8, 64, 1)
    contender = attnspan_contender(case, 0.25, "fp32")
    assert contender.copies * case.kv_bytes(contender.kept, "fp32") > 5e8
    assert attnspan_contender(Case("prefill", 256, 1, 4, 2, 64, 1), 1, "fp32").copies == 1


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_read_the_whole_context(name: str) -> None:
    case = Case("decode", 512, 2, 4, 2, 64, 1)
    contender = baseline(name, case, "bf16")
    contender.step()
    assert contender.kept == 512
    assert contender.density == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0"], "--density is '0'; allowed are numbers in (0, 1]"),
        (["--density", "1.5"], "(0, 1]"),
        (["--context", "many"], "--context is 'many'"),
        (["--context", "0"], "--context is [0]; at least 1"),
        (["--heads", "5"], "--heads is 5; it must be a multiple of --kv-heads (2)"),
        (["--dtype", "fp8"], "--dtype is 'fp8'; allowed are"),
        (["--baselines", "vllm"], "--baselines holds 'vllm'"),
        (["--phase", "train"], "--phase holds 'train'"),
        (["--threads", "0"], "--threads is [0]"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_random_bf16_is_normal() -> None:
    """The bf16 keys of the benchmark are real numbers of unit scale, not bit patterns."""
    from attnspan.cpu_runtime.bench_contenders import _random

    values = (_random((1000, 64), "bf16").astype(np.uint32) << 16).view(np.float32)
    assert abs(float(values.std()) - 1) < 0.02

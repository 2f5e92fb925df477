"""The GPU benchmark without a GPU: its dry run, its counting, its verdicts.

Dry runs are processes of their own: they decide how kernels are compiled before these are imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampled_artefacts import needs_library
from tiny_models import export_tiny

from attnspan.planner.plan import Plan
from attnspan.planner.rules import HeadRule
from attnspan.planner.shape import ModelShape

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_cases as cases  # noqa: E402
import gpu_report  # noqa: E402


def run(*words: str | Path, root: Path = ROOT, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """The benchmark of the checkout `root`, on a machine without a GPU; it must end with status `expect`."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, root / "benchmarks" / "gpu.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Result and tables of a dry run with a plan."""
    folder = tmp_path_factory.mktemp("dry")
    layers = [[HeadRule("span", 128.0, 0.0), HeadRule("span", float(n), 0.0)] for n in (128, 192, 256)]
    Plan(ModelShape("tiny", 3, 4, 2, 64, None), 256, layers).save(folder / "plan.json")
    done = run("--dry-run", "--plan", folder / "plan.json", "-o", folder)
    result: dict[str, Any] = json.loads((folder / "gpu-dry-run.json").read_text())
    return result, done.stdout


def test_dry_run_checks_and_measures_every_kernel(dry: tuple[dict[str, Any], str]) -> None:
    result, text = dry
    checked = {check["kernel"] for check in result["checks"]}
    assert checked >= {
        "span_prefill",
        "span_decode",
        "ring_update",
        "merge",
        "lsh_hash",
        "span_prefill lse",
        "span_decode update",
    }
    assert all(check["ok"] for check in result["checks"])
    assert {record["phase"] for record in result["records"]} == {"decode", "prefill", "chunk", "small"}
    assert all(record["seconds"] > 0 for record in result["records"])
    assert result["not_run"] == result["failed"] == []
    assert result["notes"] == ["FlashInfer is not installed"]
    assert result["targets"] == [], "the interpreter's times judge nothing"
    assert {"torch", "triton", "numpy", "python"} <= result["machine"].keys()
    for title in ("Decode: bytes", "Prefill: flops", "The other kernels", "| span_decode |", "| ok |"):
        assert title in text


def test_decode_counts_kept_bytes(dry: tuple[dict[str, Any], str]) -> None:
    found = [r for r in dry[0]["records"] if r["phase"] == "decode" and r["context"] == 320 and not r["ragged"]]
    dense = [r for r in found if r["density"] == 1]
    assert {r["kernel"] for r in dense} == {"attnspan", "sdpa"}
    # Keys and values of 2 rows, 2 heads of 320 tokens, 64 numbers of 2 bytes.
    assert all(r["kept_bytes"] == 2 * 2 * 2 * 320 * 64 * 2 for r in dense)
    half = [r for r in found if r["density"] == 0.5]
    assert all(r["kept_bytes"] == dense[0]["kept_bytes"] / 2 for r in half), "every kind of plan at one density keeps as much"
    copy = dry[0]["copy_bytes_per_second"]
    assert all(r["share_of_copy"] == pytest.approx(r["kept_bytes"] / r["seconds"] / copy) for r in found)
    assert all(r["speedup"]["sdpa"] > 0 for r in found if r["kernel"] == "attnspan")


def test_plan_file_is_measured(dry: tuple[dict[str, Any], str]) -> None:
    found = [r for r in dry[0]["records"] if r.get("plan") == "file"]
    assert [(r["phase"], r["spans"]) for r in found] == [("decode", [128, 192]), ("prefill", [128, 192])], (
        "the layer of median size"
    )


def test_what_lies_in_the_checkout_is_measured_and_a_wrong_kernel_fails(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for name in ("benchmarks", "planner", "plugins"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "plugins/trt_sparse_attn/kernels/span_decode.py").open("a") as file:
        file.write("\n_right = span_decode\n\n\ndef span_decode(*tensors, **options):\n")
        file.write("    output, lse = _right(*tensors, **options)\n    return output * 1.01, lse\n")
    with (root / "plugins/trt_sparse_attn/kernels/merge.py").open("a") as file:
        file.write("\n\ndef merge(outputs, lses):\n    raise RuntimeError('does not launch')\n")
    done = run("--dry-run", "--only", "checks", "-o", tmp_path, root=root, expect=1)
    checks = json.loads((tmp_path / "gpu-dry-run.json").read_text())["checks"]
    assert {check["kernel"] for check in checks if not check["ok"]} == {"span_decode"}
    assert "| FAILED |" in done.stdout
    assert "FAILED: check merge: RuntimeError: does not launch\n" in done.stdout


def test_budget_cuts_from_the_end_and_says_so(tmp_path: Path) -> None:
    done = run("--dry-run", "--budget", "0.000001", "-o", tmp_path)
    result = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert result["records"] == []
    assert result["not_run"][-4:] == [case.label() for case in cases.cases(dry=True)]
    assert f"Not run, for want of time (--budget 1e-06): {result['not_run'][0]}; " in done.stdout


def test_a_hybrid_artefact_is_not_compared_where_there_is_no_cuda_provider(tmp_path: Path) -> None:
    """The reason is told, and nothing has failed."""
    done = run("--dry-run", "--only", "hybrid", "--hybrid", tmp_path / "any", "-o", tmp_path)
    result = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert result["hybrid"] is None
    assert result["failed"] == []
    reason = f"not compared: {tmp_path / 'any'}: device is cuda: onnxruntime "
    assert [note for note in result["notes"] if note.startswith(reason)]
    assert reason in done.stdout


@needs_library
def test_a_hybrid_artefact_is_compared_token_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a session on the CPU in place of the one on the GPU, and then with one that is wrong."""
    import gpu_hybrid

    from attnspan.cpu_runtime import library, loading, session

    folder = export_tiny(tmp_path, n_max=256).folder
    shift = [0.0]

    class Stand(session.Session):
        def __init__(self, *arguments: Any, device: str = "cpu", **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.shift = shift[0] if device == "cuda" else 0.0

        def decode(self, tokens: Any) -> Any:
            logits = super().decode(tokens)
            logits[:, 0] += self.shift * np.abs(logits).max()
            return logits

    monkeypatch.setattr(loading, "check_device", lambda device: None)
    monkeypatch.setattr(library, "cuda_library_path", library.library_path)
    monkeypatch.setattr(session, "Session", Stand)
    found = gpu_hybrid.check(folder, tmp_path)
    assert (found["ok"], found["error"], found["tokens_equal"], found["tokens"]) == (True, 0.0, 33, 33)
    assert json.loads((tmp_path / "hybrid-trace.json").read_text())["traceEvents"]
    shift[0] = 3.0
    found = gpu_hybrid.check(folder, tmp_path)
    assert not found["ok"]
    assert found["error"] > found["limit"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no NVIDIA GPU here; run on a machine that has one, or add --dry-run"),
        (["--only", "decode,train"], "--only holds 'train'; allowed are checks, hybrid, decode, prefill, chunk, small"),
        (["--budget", "0"], "--budget is 0; allowed are seconds above 0"),
        (["-o", "/nowhere"], "-o is /nowhere; allowed is a folder that exists"),
        (["--dry-run", "--plan", "/nowhere.json"], "cannot read /nowhere.json: No such file or directory"),
        (["--quick"], "unrecognized arguments: --quick; see --help"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str) -> None:
    assert run(*words, expect=2).stderr == f"error: {line}\n"


@pytest.mark.parametrize("kv_heads", [1, 3, 8])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.25, 0.01])
def test_spans_of_all_kinds_keep_as_much(kv_heads: int, density: float) -> None:
    context = 4096
    found = {
        kind: cases.head_spans(cases.PlanCase(kind, density), context, kv_heads, 0) for kind in ("uniform", "spread", "one-long")
    }
    wanted = max(round(density * context * kv_heads / 64) * 64, 128 * kv_heads)
    for spans in found.values():
        assert spans.sum() == wanted
        assert (spans % 64 == 0).all()
        assert (spans >= 128).all()
        assert (spans <= context).all()
    if kv_heads == 8 and density in (0.5, 0.25):
        mean = wanted / kv_heads
        assert found["uniform"].max() - found["uniform"].min() <= 64
        assert found["spread"].min() < 0.5 * mean
        assert found["spread"].max() > 1.5 * mean
        assert (found["one-long"] == context).sum() == 1


@pytest.mark.parametrize(
    ("span", "context", "first"), [(128, 1000, 0), (640, 1000, 0), (1024, 1000, 0), (256, 777, 500), (128, 300, 299)]
)
def test_pairs_and_tiles_are_those_of_the_mask(span: int, context: int, first: int) -> None:
    q, k = np.arange(first, context)[:, None], np.arange(context)[None, :]
    mask = (k <= q) & ((k < 64) | (q - k < span - 64))
    assert cases.pairs(span, context, first) == mask.sum()
    if first % 128 == 0:
        tiles = [mask[i : i + 128, j : j + 128].any() for i in range(0, context - first, 128) for j in range(0, context, 128)]
        assert cases.kept_tiles(span, context, first) == sum(tiles)


@pytest.mark.parametrize(("context", "first"), [(640, 0), (700, 0), (640, 639)])
def test_flex_blocks_are_those_of_the_mask(context: int, first: int) -> None:
    import torch
    from gpu_baselines import block_mask

    spans = [128, 384, 704]
    mask = block_mask(torch.tensor(spans, dtype=torch.int32), 2, first, context)
    q, k = np.arange(first, context)[:, None], np.arange(context)[None, :]
    for head in range(6):
        seen = (k <= q) & ((k < 64) | (q - k < spans[head // 2] - 64))
        cells = {
            (i, j): seen[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            for i in range(-(-len(q) // 128))
            for j in range(-(-context // 128))
        }
        for i in range(-(-len(q) // 128)):
            some = set(mask.kv_indices[0, head, i, : mask.kv_num_blocks[0, head, i]].tolist())
            whole = set(mask.full_kv_indices[0, head, i, : mask.full_kv_num_blocks[0, head, i]].tolist())
            assert not some & whole
            assert some | whole == {j for (row, j), cell in cells.items() if row == i and cell.any()}
            assert all(cells[i, j].all() for j in whole)
        at = torch.arange(context - first)
        kept = mask.mask_mod(torch.tensor(0), torch.tensor(head), at[:, None], torch.arange(context)[None, :])
        assert np.array_equal(kept.numpy(), seen)


def _record(
    plan: str, density: float, share: float, speedup: dict[str, float], phase: str = "decode", **more: Any
) -> dict[str, Any]:
    shape = {"context": 32768, "batch": 8, "heads": 32, "kv_heads": 8, "dim": 128, "dtype": "bf16", "ragged": False, "chunk": 0}
    record = {"phase": phase, "kernel": "attnspan", "plan": plan, "density": density, "seconds": 1e-3, "share_of_copy": share}
    return shape | record | {"speedup": speedup} | more


def test_targets_take_the_worst_case() -> None:
    records = [
        _record("uniform", 1.0, 0.90, {"sdpa flash": 0.95}),
        _record("spread", 0.25, 0.86, {"sdpa flash": 3.2, "uniform of as many bytes": 0.94}),
        _record("uniform", 0.25, 0.10, {"sdpa flash": 0.1}, batch=1),
        _record("uniform", 1.0, 0.0, {"flex compiled": 1.2}, "prefill", tile_flops_per_second=3e14),
        _record("dense", 1.0, 0.0, {}, "prefill", kernel="sdpa cudnn", tile_flops_per_second=6e14),
    ]
    found = {target["target"].split(",")[0] + target["target"].split(",")[1]: target for target in gpu_report.targets(records)}
    verdicts = {name: (round(target["worst"], 3), target["met"]) for name, target in found.items()}
    assert verdicts == {
        "decode share of copy bandwidth": (0.86, True),
        "decode time over a uniform plan of as many bytes": (1.064, False),
        "decode speed-up over dense SDPA times density": (0.8, False),
        "prefill share of dense SDPA's rate": (0.5, False),
        "prefill speed-up over compiled flex_attention": (1.2, True),
    }

"""What --target, --dtype, --cache-dtype and --chunk mean together, and what the command does with a target that has an engine."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import save_tiny_model

from attnspan.export.cli import main
from attnspan.export.targets import TARGETS, choose_form
from attnspan.planner.errors import UserError
from attnspan.runtime.artefact import Artefact


@pytest.mark.parametrize(
    ("target", "given", "dtype", "cache", "chunk"),
    [
        ("cpu", {}, "fp32", "bf16", None),
        ("cpu", {"dtype": "fp32", "cache_dtype": "fp32"}, "fp32", "fp32", None),
        ("tensorrt", {}, "bf16", "bf16", None),
        ("tensorrt", {"dtype": "fp16"}, "fp16", "fp16", None),
        ("portable", {}, "fp32", "fp32", 256),
        ("portable", {"cache_dtype": "bf16", "chunk": 64}, "fp32", "bf16", 64),
        ("portable", {"dtype": "bf16"}, "bf16", "bf16", 256),
        ("hybrid", {}, "fp16", "fp16", None),
        ("hybrid", {"dtype": "fp32", "cache_dtype": "bf16"}, "fp32", "bf16", None),
    ],
)
def test_defaults(target: str, given: dict[str, Any], dtype: str, cache: str, chunk: int | None) -> None:
    form = choose_form(target, **given)
    assert (form.target.name, form.dtype, form.cache_dtype, form.chunk) == (target, dtype, cache, chunk)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("gpu", None, None, None), "--target is 'gpu'; must be one of cpu, tensorrt, portable, hybrid"),
        (("cpu", "fp16", None, None), "--dtype is 'fp16'; target cpu computes in fp32"),
        (("tensorrt", "fp32", None, None), "--dtype is 'fp32'; target tensorrt computes in bf16 or fp16"),
        (("cpu", None, "int4", None), "--cache-dtype is 'int4'; must be one of bf16, fp16, fp32, int8"),
        (("tensorrt", None, "fp16", None), "--cache-dtype is 'fp16'; must be bf16 with target tensorrt and --dtype bf16"),
        (("portable", "fp16", "fp32", None), "--cache-dtype is 'fp32'; must be fp16 with target portable and --dtype fp16"),
        (
            ("tensorrt", None, None, None, "int4"),
            "--weights is 'int4' with target tensorrt in bf16; must be with cpu, portable in fp32, drop it",
        ),
        (("cpu", None, None, 64), "--chunk is 64; target cpu takes chunks of any length, drop it"),
        (("portable", None, None, 0), "--chunk is 0: must be an integer from 1 to 1048576"),
    ],
)
def test_mistakes(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        choose_form(*given)
    assert str(error.value) == message


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("target", list(TARGETS))
def test_command(target: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each target by name alone: what lies beside the model, and bytes of the cache as the artefact has them."""
    out = tmp_path / "out"
    argv = ["export", str(model), str(out), "--target", target, "--n-max", "1024", "--no-verify", "--no-build"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    artefact = Artefact.load(out)
    assert artefact.target == target
    assert (out / "libattnspan_ort.so").is_file() == TARGETS[target].library
    assert f"for {target}, up to 1024 tokens" in printed
    assert f"{artefact.kv_bytes() / 1024:.0f} KiB, dense {artefact.dense_kv_bytes() / 1024:.0f} KiB" in printed
    assert "engine" not in printed


def test_the_engine_is_built_where_it_can_be(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where it cannot, one line says why, and what to run on the machine with the GPU."""
    built: list[Path] = []
    engine = SimpleNamespace(
        why_not_here=lambda: None, build_engine=lambda folder: built.append(folder) or folder / "engine" / "x"
    )
    import attnspan.plugins.trt_sparse_attn as package

    monkeypatch.setitem(sys.modules, "attnspan.plugins.trt_sparse_attn.engine", engine)
    monkeypatch.setattr(package, "engine", engine, raising=False)
    argv = ["export", str(model), str(tmp_path / "a"), "--target", "tensorrt", "--n-max", "1024", "--no-verify"]
    assert main(argv) == 0
    assert built == [tmp_path / "a"]
    assert capsys.readouterr().out.endswith(f"engine: {tmp_path / 'a' / 'engine' / 'x'}\n")

    engine.why_not_here = lambda: "no NVIDIA GPU here"
    argv[2] = str(tmp_path / "b")
    assert main(argv) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"no engine was built: no NVIDIA GPU here; on the machine with the GPU run: attnspan build {tmp_path / 'b'}"
    assert len(built) == 1

"""The real kernels compiled, and what their machine code needs: a small head for every architecture, the largest for one.

Of architectures with little shared memory sm_89 is the one that has e4m3, too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ARCHS = (80, 86, 89, 90, 100, 120)
SMALL = ["--arch", *map(str, ARCHS), "--head-dim", "64", "--dtype", "bf16"]
LARGE = ["--arch", "89", "--head-dim", "256", "--dtype", "bf16", "bf16_fp8"]
LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # CUDA programming guide, bytes of a block


def build(out: Path, words: list[str]) -> list[dict[str, Any]]:
    """The manifest's kernels of a build into the folder `out`."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "attnspan.plugins.trt_sparse_attn.build", *words, "-o", out],
        capture_output=True,
        text=True,
        env=env,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: ")
    found: list[dict[str, Any]] = json.loads((out / "manifest.json").read_text())["kernels"]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aot") / "kernels"


@pytest.fixture(scope="module")
def kernels(folder: Path) -> list[dict[str, Any]]:
    return build(folder, SMALL)


def test_every_kernel_for_every_architecture(kernels: list[dict[str, Any]]) -> None:
    symbols = {"span_prefill", "span_decode", "merge_chunks", "ring_update", "lsh_hash", "merge"}
    for arch in ARCHS:
        mine = [kernel for kernel in kernels if kernel["arch"] == arch]
        assert {kernel["symbol"] for kernel in mine} == {f"{symbol}_kernel" for symbol in symbols}
        assert {kernel["name"] for kernel in mine} == {kernel["name"] for kernel in kernels}


def check_resources(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["shared_bytes"] <= LIMIT[kernel["arch"]], kernel["name"]
        assert 0 < kernel["registers"] <= 255
        assert kernel["registers"] * kernel["warps"] * 32 <= 65536, "a block's registers fit a multiprocessor"
        if kernel["symbol"] != "span_prefill_kernel":
            assert kernel["stack_bytes"] == 0, "no spills where memory speed counts"


def test_resources_fit(kernels: list[dict[str, Any]]) -> None:
    check_resources(kernels)


def test_resources_of_the_largest_head_fit(tmp_path: Path) -> None:
    kernels = build(tmp_path / "kernels", LARGE)
    assert len(kernels) == 7 + 4
    check_resources(kernels)
    assert all(kernel["stack_bytes"] == 0 for kernel in kernels), "tiles are small enough for prefill, too"


def test_decode_streams_its_cache_in_vectors(folder: Path, kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["symbol"] != "span_decode_kernel":
            continue
        ptx = (folder / kernel["ptx"]).read_text()
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", ptx)
        # Keys and values go to shared memory 16 bytes a thread, ahead of their use; numbers beside them are words.
        assert set(copies) == {"0x10"}
        assert len(copies) >= 8
        assert not re.search(r"ld\.global\S*\.b(8|16)\b", ptx), "no element is loaded alone"


def test_symbols_are_in_the_code(folder: Path, kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        cubin = (folder / kernel["cubin"]).read_bytes()
        assert cubin[:4] == b"\x7fELF"
        assert f".text.{kernel['symbol']}\0".encode() in cubin

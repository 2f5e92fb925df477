"""The ahead-of-time build: what it writes, what it refuses. Toy kernels; test_aot_kernels.py builds the real ones.

Kernels are compiled in processes of their own: this one may hold them in the form that the interpreter runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from interrupts import heed

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn.aot_folder import build
from attnspan.plugins.trt_sparse_attn.build import main

ARCHS = ["80", "86", "90", "120"]
TOY = Path(__file__).with_name("aot_toy.py")
BUILD = "attnspan.plugins.trt_sparse_attn.build"


def run(*words: str | Path, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process without the interpreter's switch; it must end with status `expect`."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == expect, done.stderr
    return done


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "kernels"
    run(TOY, "build", out, "1", *ARCHS)
    return out


@pytest.fixture(scope="module")
def problems() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(TOY, "problems").stdout)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_manifest(toy: Path) -> None:
    manifest = json.loads((toy / "manifest.json").read_text())
    assert [kernel["arch"] for kernel in manifest["kernels"]] == [int(arch) for arch in ARCHS]
    for kernel in manifest["kernels"]:
        for kind in ("cubin", "ptx"):
            assert hashlib.sha256((toy / kernel[kind]).read_bytes()).hexdigest() == kernel[f"{kind}_sha256"]
        ptx = (toy / kernel["ptx"]).read_text()
        suffix = "a" if kernel["loads_on_this_capability_only"] else ""
        assert f".target sm_{kernel['arch']}{suffix}\n" in ptx, "which GPUs it loads on"
        assert f".version {manifest['ptx_version']}\n" in ptx
        entry = re.search(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
        assert entry is not None
        assert entry[1] == kernel["symbol"] == "span_decode_scores"
        # The launcher's view of the parameters is the code's: pointers of 64 bits and numbers of 32, two hidden pointers last.
        widths = re.findall(r"\.param \.[us](\d+)", entry[2])
        assert widths == ["64" if each["type"].startswith("*") else "32" for each in kernel["parameters"]]
        assert [each["name"] for each in kernel["parameters"][-2:]] == ["global_scratch", "profile_scratch"]
        assert kernel["constants"] == {"D": 64, "M": 16, "N": 32}
        assert (kernel["warps"], kernel["stack_bytes"]) == (4, 0)
        assert 16 < kernel["registers"] < 256
        assert 0 < kernel["shared_bytes"] <= manifest["shared_limit_bytes"][str(kernel["arch"])]


def test_same_bytes_twice_in_any_order_and_folder_and_an_earlier_build_is_replaced_whole(toy: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere"
    (again / "sm_75").mkdir(parents=True)
    (again / "sm_75/old.cubin").write_text("stale")
    shutil.copy(toy / "manifest.json", again)
    run(TOY, "build", again, "2", *reversed(ARCHS), TMPDIR=str(tmp_path))
    assert contents(again) == contents(toy)
    assert list(tmp_path.iterdir()) == [again], "nothing temporary is left"
    assert not any(str(TOY.parent).encode() in data for data in contents(toy).values()), "no path of this machine"


C_PROGRAM = r"""
#include <stdio.h>
#include "attnspan_kernels.h"
static void show(int capability, size_t limit) {
  const AttnspanKernel* k = attnspan_kernel_find("scores_bf16_d64", capability, limit);
  if (k == NULL) { printf("%d none\n", capability); return; }
  const unsigned char* image = attnspan_kernel_image(k, capability);
  printf("%d %d %s\n", capability, k->arch, image[0] == 0x7f ? "cubin" : strstr((const char*)image, ".entry") ? "ptx" : "?");
}
int main(void) {
  int capabilities[] = {75, 80, 86, 87, 89, 90, 100, 103, 120, 121};
  for (int i = 0; i < 10; ++i) show(capabilities[i], 99 << 10);
  show(90, 64);
  const AttnspanKernel* k = attnspan_kernel_find("scores_bf16_d64", 80, 99 << 10);
  printf("%s %s %s %d ", k->symbol, k->parameters[3].name, k->parameters[3].type, k->num_parameters);
  printf("%d %d\n", (int)attnspan_kernel_constant(k, "M", -1), (int)attnspan_kernel_constant(k, "missing", -1));
  printf("%d\n", attnspan_kernel_find("other", 80, 99 << 10) == NULL);
  fwrite(k->cubin, 1, k->cubin_bytes, stdout);
  return 0;
}
"""


def test_c_table(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(C_PROGRAM)
    program = tmp_path / "main"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{toy}", "-o", program]
    subprocess.run(["cc", *flags, tmp_path / "main.c", *sorted(toy.glob("*.c"))], check=True)
    out = subprocess.run([program], capture_output=True, check=True).stdout
    *lines, cubin = out.split(b"\n", 13)
    assert [line.decode() for line in lines] == [
        "75 none",
        "80 80 cubin",
        "86 86 cubin",
        "87 86 cubin",
        "89 86 cubin",
        "90 90 cubin",
        "100 80 ptx",
        "103 80 ptx",
        "120 120 cubin",
        "121 80 ptx",
        "90 none",
        "span_decode_scores rows i32 6 16 -1",
        "1",
    ]
    assert cubin == (toy / "sm_80/scores_bf16_d64.cubin").read_bytes()


def test_header_is_c_plus_plus(toy: Path, tmp_path: Path) -> None:
    main = tmp_path / "main.cc"
    main.write_text('#include "attnspan_kernels.h"\nint main() { return attnspan_kernel_find("x", 80, 0) != nullptr; }\n')
    subprocess.run(["c++", "-Wall", "-Wextra", "-Werror", f"-I{toy}", "-c", main, "-o", tmp_path / "main.o"], check=True)


def test_spills_are_refused_in_decode_only(problems: dict[str, Any]) -> None:
    assert problems["spills"]["stack"] > 0
    assert problems["spills"]["problems"] == [
        f"spills for sm_86 spills registers to a stack frame of {problems['spills']['stack']} bytes; allowed is none"
    ]
    assert problems["may_spill"]["stack"] > 0
    assert problems["may_spill"]["problems"] == []


def test_too_much_shared_memory_is_refused(problems: dict[str, Any]) -> None:
    assert problems["shared"]["problems"] == [
        f"shared for sm_86 needs {problems['shared']['shared']} bytes of shared memory; allowed are 101376"
    ]


def test_a_kernel_that_does_not_compile_is_one_line(problems: dict[str, Any]) -> None:
    error = problems["type"]["error"]
    assert error.startswith("type for sm_86 does not compile: ")
    assert "\n" not in error


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--arch", "75"], "--arch is '75'; allowed are 80, 86, 89, 90, 100, 120"),
        (["--head-dim", "72"], "--head-dim is '72'; allowed are 64, 80, 96, 128, 256"),
        (["--dtype", "fp64"], "--dtype is 'fp64'; allowed are fp16, bf16, fp16_fp8, bf16_fp8"),
        (["--jobs", "0"], "--jobs is '0'; allowed is a number from 1 to 256"),
        (["--arhc", "80"], "unrecognized arguments: --arhc 80; see --help"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        assert main([*words, "-o", str(tmp_path / "kernels")]) == 2
    finally:
        signal.signal(signal.SIGTERM, terminated)
    assert capsys.readouterr().err == f"error: {line}\n"
    assert list(tmp_path.iterdir()) == []


def test_fp8_below_sm_89_is_refused(tmp_path: Path) -> None:
    done = run("-m", BUILD, "--arch", "80", "--dtype", "bf16_fp8", "-o", tmp_path / "kernels", expect=2)
    allowed = "allowed are types without fp8 below sm_89"
    assert done.stderr == f"error: nothing to build for sm_80; {allowed}; change --dtype or --arch\n"
    assert list(tmp_path.iterdir()) == []


def test_interpreter_is_refused(tmp_path: Path) -> None:
    done = run("-m", BUILD, "--arch", "80", "-o", tmp_path / "kernels", expect=2, TRITON_INTERPRET="1")
    assert done.stderr == "error: TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it\n"


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists and is not an earlier build of kernels; allowed is a new folder; change -o"):
        build(lambda _: [], [80], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_interrupt_leaves_nothing(jobs: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", BUILD, "--arch", "80", "--jobs", jobs, "-o", tmp_path / "kernels"]
    options = {"text": True, "env": env, "start_new_session": True, "preexec_fn": heed}
    with subprocess.Popen(command, stderr=subprocess.PIPE, **options) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("attnspan-aot-*/*")) and time.monotonic() < deadline:  # the first kernel has been compiled
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: its workers, too
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "interrupted\n"
    assert list(tmp_path.iterdir()) == []

"""libattnspan_trt.so: how it is configured, what it exports, and what TensorRT-RTX makes of it.

All but the configuration needs TensorRT's public headers: TENSORRT_ROOT=DIR pytest tests/test_trt_cpp_plugin.py
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trt_launch

from attnspan.plugins.trt_sparse_attn import schema

ROOT = Path(__file__).resolve().parent.parent
TENSORRT = os.environ.get("TENSORRT_ROOT")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake here")
needs_cuda = pytest.mark.skipif(shutil.which("nvcc") is None and trt_launch.cuda_include() is None, reason="no CUDA toolkit here")
needs_headers = pytest.mark.skipif(TENSORRT is None, reason="no TensorRT headers here: TENSORRT_ROOT is not set")


def cmake(*words: str | Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TENSORRT_ROOT"}
    return subprocess.run(["cmake", *words], capture_output=True, text=True, env=env, timeout=500)


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return cmake("-S", ROOT, "-B", build, "-DATTNSPAN_ORT=OFF", *options)


def headers(folder: Path, version: str) -> Path:
    """Files with the names and version of TensorRT's headers, and nothing else of them."""
    major, minor = version.split(".")
    include = folder / "include"
    include.mkdir(parents=True)
    (include / "NvInferRuntime.h").write_text("")
    (include / "NvInferVersion.h").write_text(
        f"#define NV_TENSORRT_MAJOR {major} //!< major\n#define NV_TENSORRT_MINOR {minor}\n"
    )
    return folder


@needs_cmake
def test_without_headers_it_is_skipped_with_one_line(tmp_path: Path) -> None:
    done = configure(tmp_path / "a")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "TensorRT" in line]
    assert lines == ["-- TensorRT plugin: skipped; -DTENSORRT_ROOT=DIR (a TensorRT, or its headers) builds it"]
    done = configure(tmp_path / "a", f"-DTENSORRT_ROOT={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "TensorRT" in line]
    assert lines == [
        f"-- TensorRT plugin: skipped, TENSORRT_ROOT is '{tmp_path}', which has no NvInferRuntime.h, nor has its include/"
    ]


@needs_cmake
@needs_cuda
def test_what_cannot_be_built_is_told_when_it_is_configured(tmp_path: Path) -> None:
    old, new = headers(tmp_path / "old", "10.2"), headers(tmp_path / "new", "10.3")
    for name, options, words in (
        ("a", (f"-DTENSORRT_ROOT={old}",), "are of version 10.2; 10.3 or later is needed"),
        (
            "b",
            (f"-DTENSORRT_ROOT={new}", f"-DATTNSPAN_KERNELS_DIR={tmp_path}"),
            f"is '{tmp_path}', which has no attnspan_kernels.h",
        ),
        ("c", (f"-DTENSORRT_ROOT={new}", "-DATTNSPAN_PYTHON=/bin/false"), "/bin/false cannot compile the kernels"),
        ("d", ("-DATTNSPAN_ORT_CUDA=ON",), "ATTNSPAN_ORT_CUDA is ON and ATTNSPAN_ORT is OFF"),
    ):
        done = configure(tmp_path / name, *options)
        assert done.returncode == 1
        assert words in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with its own kernels for one architecture, type and head size; a warning is an error."""
    folder = tmp_path_factory.mktemp("plugin")
    options = ("-DCMAKE_CXX_FLAGS=-Werror -pedantic", "-DCMAKE_C_FLAGS=-Werror", "-DATTNSPAN_CUDA_ARCHS=80",
               "-DATTNSPAN_KERNELS_OPTIONS=--head-dim;64;--dtype;bf16", f"-DATTNSPAN_PYTHON={sys.executable}",
               f"-DTENSORRT_ROOT={TENSORRT}")  # fmt: skip
    done = configure(folder, *options)
    assert done.returncode == 0, done.stderr
    done = cmake("--build", folder, "--target", "attnspan_trt")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "plugins/trt_sparse_attn"


@pytest.fixture(scope="module")
def library(build: Path) -> Path:
    return build / "libattnspan_trt.so"


@needs_headers
@needs_cuda
def test_as_a_runtime_drives_it_under_the_sanitizers(tmp_path: Path) -> None:
    assert TENSORRT is not None
    flags = (f"-isystem{TENSORRT}", f"-isystem{TENSORRT}/include", *trt_launch.SANITIZED)
    trt_launch.compile_cpp(tmp_path / "test", "plugin_test.cc", *flags, more=("plugin.cc", "library.cc"))
    done = subprocess.run([tmp_path / "test"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" checks passed\n")


@needs_headers
@needs_cmake
@needs_cuda
class TestLibrary:
    def test_it_needs_nothing_but_the_c_library_and_exports_what_tensorrt_asks_for(self, library: Path) -> None:
        symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
        defined = set(re.findall(r"^[0-9a-f]+ [A-Za-z] (\S+)$", symbols, re.MULTILINE))
        assert defined == {"getCreators", "setLoggerFinder", "attnspan_trt_version"}
        undefined = re.findall(r"^ +U (\S+)$", symbols, re.MULTILINE)
        assert undefined
        assert [name for name in undefined if "@GLIBC" not in name] == []
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        names = re.findall(r"NEEDED.*\[(.*)\]", needed)
        assert all(re.match(r"(lib(c|m|dl|rt|pthread)|ld-linux.*)\.so", name) for name in names), names

    def test_it_holds_the_kernels(self, build: Path, library: Path) -> None:
        data = library.read_bytes()
        cubins = sorted((build / "kernels/sm_80").glob("*.cubin"))
        assert len(cubins) == 7
        assert all(cubin.read_bytes() in data for cubin in cubins)

    def test_it_loads_without_a_gpu_and_says_what_it_is(self, library: Path) -> None:
        version = ctypes.CDLL(str(library)).attnspan_trt_version
        version.restype = ctypes.c_char_p
        pattern = rf"attnspan 1; schema {schema.digest()[:12]}; kernels [0-9a-f]{{16}}; TensorRT headers \d+\.\d+"
        assert re.fullmatch(pattern, version().decode())


def run_program(plugin: str | Path, out: Path) -> dict[str, str]:
    out.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("trt_cpp_program.py")
    done = subprocess.run([sys.executable, program, plugin, out], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def both(library: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, str]]:
    """A folder with engines built with either plugin, and why either refused bad nodes."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    folder = tmp_path_factory.mktemp("engines")
    return folder, run_program(library, folder / "cpp"), run_program("python", folder / "python")


@needs_headers
@needs_cmake
@needs_cuda
class TestTensorRT:
    def test_it_builds_the_engines_that_the_plugin_in_python_builds(self, both: Any) -> None:
        folder, _, _ = both
        engines = sorted(path.name for path in (folder / "cpp").glob("*.engine"))
        assert len(engines) == 6
        for name in engines:
            ours, theirs = ((folder / way / name).read_bytes() for way in ("cpp", "python"))
            assert len(ours) == len(theirs)
            # Two builds of one network with one plugin differ in a few counters, too.
            assert sum(a != b for a, b in zip(ours, theirs, strict=True)) < 40, name
            assert b"attnspan" in ours

    def test_it_refuses_in_the_words_of_the_plugin_in_python(self, both: Any) -> None:
        _, cpp, python = both
        assert cpp == python
        assert cpp["type"] == "node node: SpanAttention: query is float32: must be float16 or bfloat16"
        assert cpp["slots"].startswith("node node: SpanAttention: past_key has shape [?, 300, 64]: must be [batch, slots, dim]")

"""The launch layer of libattnspan_trt.so behind ctypes, with a CUDA runtime that writes launches down; see cpp/launch_shim.cc."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import fake_kernels

from attnspan.plugins.trt_sparse_attn import schema

ROOT = Path(__file__).resolve().parent.parent
SANITIZED = ("-g", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SRC = ROOT / "plugins/trt_sparse_attn/src"
SOURCES = [SRC / f"{name}.cc" for name in ("node", "launch", "operation", "span_attention")]
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10,
                103: 227 << 10, 120: 99 << 10, 121: 99 << 10}  # fmt: skip
"""Shared memory that a block can have, by compute capability; CUDA programming guide."""

Attributes = Mapping[str, int | float | Sequence[int]]


def cuda_include() -> Path | None:
    """Where CUDA's headers lie: beside nvcc, or in the usual place."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    places += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    return next((place for place in places if (place / "cuda_runtime_api.h").is_file()), None)


@cache
def folder() -> Path:
    """A folder of this process, removed when it ends."""
    made = tempfile.TemporaryDirectory(prefix="attnspan-launch-")
    atexit.register(made.cleanup)
    return Path(made.name)


@cache
def table() -> list[Path]:
    """Objects of the table of all kernels without code, with its header beside them."""
    fake_kernels.write(folder())
    sources = sorted(folder().glob("*.c"))
    subprocess.run(["cc", "-c", "-fPIC", "-O0", *sources], check=True, cwd=folder())
    return [source.with_suffix(".o") for source in sources]


def compile_cpp(out: Path, main: str | None, *flags: str, more: Sequence[str] = (), end: Sequence[str | Path] = ()) -> None:
    """A program or library: the launch layer, `more` of its folder, a CUDA runtime that writes down, tests/cpp/`main`, `end`."""
    objects, include = table(), cuda_include()
    assert include is not None
    common = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fPIC", f"-I{SRC}", f"-I{folder()}", "-isystem", include]
    cpp = [ROOT / "tests/cpp" / name for name in ("fake_cudart.cc", main) if name]
    sources = [*SOURCES, *(SRC / name for name in more)]
    subprocess.run(["c++", *common, *flags, *sources, *cpp, *end, *objects, "-pthread", "-o", out], check=True)


class Refused(Exception):  # noqa: N818
    """What the library said."""


class Library:
    """The shared library, one device at a time."""

    def __init__(self, path: Path) -> None:
        self.c = c = ctypes.CDLL(str(path))
        c.node_make.restype = ctypes.c_void_p
        c.node_workspace.restype = ctypes.c_size_t
        for name in ("last_error", "node_text", "fake_log"):
            getattr(c, name).restype = ctypes.c_char_p
        self.device(90)

    def device(self, capability: int, multiprocessors: int = 132, ordinal: int = 0) -> None:
        self.c.fake_device(capability, multiprocessors, SHARED_BYTES.get(capability, 0), ordinal)

    def log(self) -> list[dict[str, Any]]:
        """What was loaded, copied and launched since the last call."""
        return [json.loads(line) for line in self.c.fake_log().decode().splitlines()]


@cache
def library() -> Library:
    """The library, compiled once a process."""
    out = folder() / "liblaunch.so"
    compile_cpp(out, "launch_shim.cc", "-O0", "-shared", "-Wl,-Bsymbolic")
    return Library(out)


class Node:
    """One node. Refused when the library does not take it."""

    def __init__(
        self,
        library: Library,
        op: schema.Op,
        attributes: Attributes,
        types: Sequence[str],
        shapes: Sequence[Sequence[int]],
        building: bool = False,
    ) -> None:
        self.c = library.c
        text = []
        for name, value in attributes.items():
            values = value if isinstance(value, Sequence) else [value]
            text.append(f"{name} {'f' if isinstance(value, float) else 'i'} {' '.join(map(repr, values))}")
        sizes = ";".join(" ".join(map(str, shape)) for shape in shapes)
        made = self.c.node_make(
            schema.OPS.index(op), ";".join(text).encode(), " ".join(types).encode(), sizes.encode(), int(building)
        )
        if made is None:
            raise Refused(self.c.last_error().decode())
        self.handle = ctypes.c_void_p(made)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.c.node_free(self.handle)

    def text(self) -> tuple[list[str], dict[str, int]]:
        """Types of the outputs, and sizes of all symbols."""
        types, sizes, _ = self.c.node_text(self.handle).decode().split(";")
        pairs = (part.split("=") for part in sizes.split())
        return types.split(), {name: int(value) for name, value in pairs}

    def workspace(self, batch: int) -> int:
        return int(self.c.node_workspace(self.handle, ctypes.c_int64(batch)))

    def run(
        self, inputs: Sequence[int], outputs: Sequence[int], batch: int, tokens: int, workspace: int, stream: int = 0
    ) -> None:
        """Addresses in the order of the op's table. Refused when the library fails."""
        ins, outs = ((ctypes.c_void_p * len(x))(*x) for x in (inputs, outputs))
        sizes = ctypes.c_int64(batch), ctypes.c_int64(tokens)
        failed = self.c.node_run(self.handle, ins, outs, *sizes, ctypes.c_void_p(workspace), ctypes.c_void_p(stream))
        if failed:
            raise Refused(self.c.last_error().decode())

"""Where the op libraries `libattnspan_ort.so` and `libattnspan_ort_cuda.so` are."""

from __future__ import annotations

import ctypes
import importlib.resources
import os
from pathlib import Path

from attnspan.planner.errors import UserError

NAME = "libattnspan_ort.so"
CUDA_NAME = "libattnspan_ort_cuda.so"
CUDA_VARIABLE = "ATTNSPAN_ORT_CUDA"


def library_path() -> Path:
    """Path of the installed op library; `SessionOptions.register_custom_ops_library` takes it.

    Raises `UserError` when the package was built without it (`ATTNSPAN_ORT=OFF`).
    """
    path = _installed(NAME)
    if not path.is_file():
        raise UserError(
            f"{NAME} is not installed ({path} does not exist); build it with `make install`, or run without it (slow)"
        )
    return path


def cuda_library_path() -> Path:
    """Path of the op library with kernels for ONNX Runtime's CUDA provider, which a session registers in place of the other.

    The one that the environment variable ATTNSPAN_ORT_CUDA names, else the one installed. UserError where there is none.
    """
    named = os.environ.get(CUDA_VARIABLE)
    path = Path(named) if named else _installed(CUDA_NAME)
    if not path.is_file():
        raise UserError(
            f"{CUDA_NAME} is not at {path}: build it with cmake -DATTNSPAN_ORT_CUDA=ON (docs/cuda.md) and set {CUDA_VARIABLE} to "
            "its path, or drop --device"
        )
    return path.resolve()


def _installed(name: str) -> Path:
    # An editable install spreads the package over the source tree and the build's install folder: ask for the file itself.
    return Path(str(importlib.resources.files("attnspan.cpu_runtime").joinpath(name)))


def guarded_steps(library: Path) -> tuple[int, int]:
    """Decode steps of KV heads with a guard that this process made with the library, and those that the guard made exact."""
    out = (ctypes.c_int64 * 2)()
    ctypes.CDLL(str(library)).attnspan_lsh_guarded(out, 0)
    return out[0], out[1]

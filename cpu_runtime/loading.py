"""Opening a model in ONNX Runtime: version, threads, op library."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError
from attnspan.runtime.artefact import Artefact

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["MIN_ORT", "default_threads", "open_session"]

MIN_ORT = (1, 25)
"""Older ones lack kernels that the function body of the ops needs."""
_log = logging.getLogger("attnspan")


def open_session(
    artefact: Artefact, *, threads: int, use_library: bool, library: str | Path | None
) -> tuple[ort.InferenceSession, Path | None]:
    """Load model.onnx; the session, and the op library it runs with (None: the ops run as standard ONNX).

    The library is the one given, else the one installed with this package, else the one in the artefact. With
    none of them the model runs, slowly, and a warning says so. UserError: ONNX Runtime missing or too old, a
    library given that does not load, a model that ONNX Runtime refuses.
    """
    ort = _import_ort()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; warnings of ONNX Runtime mean nothing to who runs a model
    loaded = _register(options, artefact, use_library, library)
    model = artefact.folder / "model.onnx"
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"]), loaded
    except Exception as error:  # pybind11 classes without a common base
        raise UserError(f"ONNX Runtime {ort.__version__} cannot load {model}: {_first_line(error)}") from None


def default_threads() -> int:
    """Physical cores this process may use: two threads of a core share the units that the work needs."""
    try:
        allowed = sorted(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def _import_ort() -> Any:
    try:
        import onnxruntime as ort
    except ImportError:
        raise UserError("onnxruntime is not installed: pip install 'onnxruntime>=1.25'") from None
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if version < MIN_ORT:
        wanted = ".".join(map(str, MIN_ORT))
        raise UserError(f"onnxruntime is {ort.__version__}: must be {wanted} or newer; pip install -U onnxruntime")
    return ort


def _register(options: ort.SessionOptions, artefact: Artefact, use_library: bool, library: str | Path | None) -> Path | None:
    if library is not None:
        path = Path(library)
        if not use_library:
            raise UserError(f"library is {library} and use_library is False: give one of them")
        if not path.is_file():
            raise UserError(f"the op library {path} does not exist; change --library")
        reason = _try_register(options, path)
        if reason is not None:
            raise UserError(f"the op library {path} cannot be loaded: {reason}; change --library")
        return path
    if not use_library:
        return None
    reasons = []
    try:
        from attnspan.cpu_runtime.library import library_path

        candidates = [library_path()]
    except (UserError, ImportError) as error:
        reasons.append(str(error))
        candidates = []
    # What the user installed is trusted more than what came with a model.
    for path in [*candidates, *([artefact.library] if artefact.library else [])]:
        reason = _try_register(options, path)
        if reason is None:
            return path
        reasons.append(f"{path}: {reason}")
    _log.warning(
        "warning: no op library, attention runs as standard ONNX: right, but slow and with more memory (%s)",
        "; ".join(reasons) or "none is installed and the artefact has none",
    )
    return None


def _try_register(options: ort.SessionOptions, path: Path) -> str | None:
    try:
        options.register_custom_ops_library(str(path.resolve()))
    except Exception as error:  # pybind11 classes without a common base
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Opening a model in ONNX Runtime: version, threads, op library."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.cpu_runtime.streams import open_with_near_apart, silent_stdout
from attnspan.planner.errors import UserError
from attnspan.runtime.artefact import Artefact

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["DEVICES", "MIN_ORT", "check_device", "default_threads", "open_session"]

MIN_ORT = (1, 25)
"""Older ones lack kernels that the function body of the ops needs."""
DEVICES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Execution providers by the device that they compute on."""
_HEAVY = frozenset({"MatMul", "Gemm", "RMSNormalization", "RotaryEmbedding"})
"""Standard ops that must not fall back to the CPU unnoticed."""
_STARTING = (
    "it needs a GPU, its driver, and the CUDA and cuDNN libraries of this onnxruntime-gpu; install them "
    "(pip install 'onnxruntime-gpu[cuda,cudnn]'), or drop --device"
)
_log = logging.getLogger("attnspan")


def check_device(device: str) -> None:
    """UserError, with what to install, when ONNX Runtime has no provider for a device. Reads nothing of a model."""
    if device not in DEVICES:
        raise UserError(f"device is {device!r}: must be one of {', '.join(DEVICES)}; change --device")
    ort = _import_ort()
    if DEVICES[device] not in ort.get_available_providers():
        raise UserError(
            f"device is {device}: onnxruntime {ort.__version__} as installed here has no {DEVICES[device]}; "
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu, or drop --device"
        )


def open_session(
    artefact: Artefact,
    *,
    threads: int,
    use_library: bool,
    library: str | Path | None,
    device: str = "cpu",
    profile: Path | None = None,
    overlap: bool = False,
) -> tuple[ort.InferenceSession, Path | None]:
    """Load model.onnx; the session, and the op library it runs with (None: the ops run as standard ONNX).

    The library is the one given, else the one installed with this package, else the one in the artefact. With
    none of them the model runs, slowly, and a warning says so; on a GPU there must be one, with kernels for it. profile: let
    ONNX Runtime write a profile to a file whose name starts so. overlap, target `hybrid` on device `cpu`: near and far parts at
    the same time; to measure, as it is slower where cores are few. UserError: ONNX Runtime missing or too old, a library given
    that does not load, a model that ONNX Runtime refuses, a device that does not take the ops that it should.
    """
    check_device(device)
    if overlap and device != "cpu":
        raise UserError(f"device is {device}: near and far parts are apart there without overlap; drop --overlap")
    ort = _import_ort()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; warnings of ONNX Runtime mean nothing to who runs a model
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if device != "cpu":
        library = _device_library(artefact, use_library, library)
        _preload(ort)
        # Nodes without edges between them, on the GPU and on the CPU, at the same time: see docs/cuda.md. Of two threads one
        # runs nodes, of both streams; the other is the caller's, which waits.
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        options.inter_op_num_threads = 2
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    loaded = _register(options, artefact, use_library, library)
    model = artefact.folder / "model.onnx"
    providers = [DEVICES[name] for name in dict.fromkeys((device, "cpu"))]

    def create() -> Any:
        return ort.InferenceSession(str(model), options, providers=providers)

    try:
        if overlap:
            session = open_with_near_apart(options, create)
        else:
            with silent_stdout() if device != "cpu" else nullcontext():
                session = create()
    except UserError:
        raise
    except Exception as error:  # pybind11 classes without a common base
        fix = ""
        if artefact.target == "hybrid" and artefact.dtype == "bfloat16" and device == "cpu":
            fix = "; its CPU provider has no bfloat16 arithmetic: add --device cuda, or export with --dtype fp16 or fp32"
        elif device != "cpu":  # without the provider it goes on, with the CPU alone, which lacks types
            fix = f"; if it says above that {DEVICES[device]} could not start: {_STARTING}"
        raise UserError(f"ONNX Runtime {ort.__version__} cannot load {model}: {_first_line(error)}{fix}") from None
    if device != "cpu":
        _check_placement(session, device)
    return session, loaded


def default_threads(device: str = "cpu") -> int:
    """Physical cores this process may use: two threads of a core share the units that the work needs.

    For a device other than the CPU one less: the thread that calls ONNX Runtime then waits in a loop that keeps a core busy.
    """
    return max(1, _physical_cores() - (device != "cpu"))


def _physical_cores() -> int:
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
    return len(cores)


def _device_library(artefact: Artefact, use_library: bool, library: str | Path | None) -> str | Path:
    """The op library with kernels for a GPU. UserError, before the model is read, where there is none, or none for the model."""
    if artefact.dtype not in ("float16", "bfloat16"):
        raise UserError(
            f"{artefact.folder} computes in {artefact.dtype}: a GPU takes float16 or bfloat16; export with --dtype fp16 or bf16, "
            "or drop --device"
        )
    if not use_library:
        raise UserError("without the op library a GPU does not know the attention ops: drop --no-library, or --device")
    if library is not None:
        return library
    from attnspan.cpu_runtime.library import cuda_library_path

    return cuda_library_path()


def _preload(ort: Any) -> None:
    """Load the CUDA libraries that pip installed, where no loader finds them by itself."""
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(StringIO()):  # it tells of each that is not there; what matters is whether the provider starts
            ort.preload_dlls()


def _check_placement(session: ort.InferenceSession, device: str) -> None:
    """UserError when the device's provider did not start, or did not take every op of ours but the one that samples."""
    wanted = DEVICES[device]
    if wanted not in session.get_providers():
        raise UserError(f"{wanted} did not start on this machine (ONNX Runtime says why above): {_STARTING}")
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes() if part.ep_name != wanted else ():
            if node.domain == "" and node.op_type in _HEAVY:
                raise UserError(
                    f"{wanted} of this onnxruntime-gpu has no kernel for node {node.name!r} ({node.op_type}), it would run on "
                    f"{part.ep_name}: pip install -U onnxruntime-gpu, or drop --device"
                )
            if node.domain == "attnspan" and node.op_type != "LshAttention":
                raise UserError(
                    f"{wanted} does not take node {node.name!r} ({node.op_type}), it would run on {part.ep_name}: the op library "
                    "has no kernel of its types for it; build it for CUDA, export with another --dtype, or drop --device"
                )


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

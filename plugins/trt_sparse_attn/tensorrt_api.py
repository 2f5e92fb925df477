"""The one place that knows which TensorRT is installed: TensorRT 10 or 11, or TensorRT-RTX, behind the same few functions.

TensorRT-RTX parses the same ONNX, takes the same plugins through the parser, and builds engines on machines without a GPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError

__all__ = ["Api", "Gpu", "gpu", "load", "product"]

FLAVOURS = {"tensorrt": ("TensorRT", "trt"), "tensorrt_rtx": ("TensorRT-RTX", "rtx")}
"""Python module -> product, and what it is called in the name of an engine."""
OLDEST = {"tensorrt": (10, 15), "tensorrt_rtx": (1, 4)}
"""First versions whose parser knows RotaryEmbedding, RMSNormalization and TensorScatter."""
_INSTALL = "install attnspan[tensorrt] on a machine with an NVIDIA GPU, or tensorrt-rtx anywhere"


@dataclass(frozen=True)
class Gpu:
    """The GPU in use. sm: compute capability as `90`; free, total: bytes of its memory; cuda: version that PyTorch came with."""

    name: str
    sm: str
    free: int
    total: int
    cuda: str


def gpu() -> Gpu | None:
    """The current GPU, as PyTorch sees it; None without one, or without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    return Gpu(torch.cuda.get_device_name(), f"{major}{minor}", free, total, str(torch.version.cuda))


@dataclass(frozen=True)
class Api:
    """An installed TensorRT. `trt`: its Python module; `flavour`: that module's name; `version`: as the package says."""

    trt: Any
    flavour: str
    version: str

    @property
    def product(self) -> str:
        """Name and version, for messages."""
        return product(self.flavour, self.version)

    @property
    def tag(self) -> str:
        """What engines of this TensorRT are called: `trt11.4`, `rtx1.7`."""
        return FLAVOURS[self.flavour][1] + ".".join(self.version.split(".")[:2])

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return self.flavour == "tensorrt_rtx"

    def logger(self, tell: Callable[[str, str], None]) -> Any:
        """A logger that gives messages from warnings on to `tell(severity, text)`; severity is error, warning or the like."""
        trt = self.trt

        class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if severity <= trt.ILogger.Severity.WARNING:
                    tell(str(severity).rpartition(".")[2].lower(), text)

        return Logger()

    def registry(self) -> Any:
        """The plugin registry of this process."""
        return self.trt.get_plugin_registry()

    def load_plugin(self, library: Path) -> None:
        """Adds the plugins of a library in C++ to the registry. UserError when it cannot be loaded."""
        try:
            handle = self.registry().load_library(str(library))
        except (RuntimeError, TypeError, OSError) as error:
            raise UserError(f"plugin library {library} does not load: {error}") from None
        if handle is None:
            raise UserError(f"plugin library {library} does not load: must be libattnspan_trt.so, built for this machine")

    def network_flags(self) -> int:
        """Flags of a strongly typed network; from TensorRT 11 on there is no other."""
        flags = self.trt.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED) if self.flavour == "tensorrt" and self.version.startswith("10.") else 0

    def allow_decomposition(self, network: Any) -> None:
        """Lets attentions without a kernel of their own, for their shapes and types, be computed by several."""
        attention = getattr(self.trt.LayerType, "ATTENTION_INPUT", None)
        for layer in (network.get_layer(i) for i in range(network.num_layers)):
            if layer.type == attention:
                layer.__class__ = self.trt.IAttentionInputLayer
                layer.attention.decomposable = True

    def set_arch(self, config: Any, sm: str) -> None:
        """Builds for compute capability `sm` instead of the GPU at hand. UserError where this TensorRT cannot."""
        if not self.is_rtx:
            raise UserError(f"--arch is {sm}: {self.product} builds for the GPU at hand only; drop --arch, or add --rtx")
        known = {name[2:]: value for name, value in self.trt.ComputeCapability.__members__.items() if name.startswith("SM")}
        if sm not in known:
            raise UserError(f"--arch is {sm}: {self.product} builds for {', '.join(sorted(known, key=int))}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(known[sm], 0)

    def data_type(self, kind: Any) -> str:
        """Name, as in NumPy, of a TensorRT data type; TensorRT's own for one that the plugins do not know."""
        return _types(self.trt).get(kind, str(kind).rpartition(".")[2].lower())

    def as_data_type(self, name: str) -> Any:
        """The TensorRT data type of that name."""
        return next(kind for kind, known in _types(self.trt).items() if known == name)


def product(flavour: str, version: str) -> str:
    """A TensorRT as messages name it: `TensorRT-RTX 1.7.1.116`."""
    return f"{FLAVOURS[flavour][0] if flavour in FLAVOURS else flavour} {version}"


@cache
def _types(trt: Any) -> dict[Any, str]:
    kinds = trt.DataType
    return {kinds.FLOAT: "float32", kinds.HALF: "float16", kinds.BF16: "bfloat16", kinds.FP8: "float8_e4m3fn",
            kinds.INT32: "int32", kinds.INT64: "int64", kinds.INT8: "int8", kinds.BOOL: "bool"}  # fmt: skip


def load(rtx: bool | None = None) -> Api:
    """The TensorRT to use: TensorRT where it is installed, else TensorRT-RTX; with `rtx` that one, or not that one.

    UserError when it is not installed, cannot be imported, or is too old.
    """
    wanted = ["tensorrt", "tensorrt_rtx"] if rtx is None else ["tensorrt_rtx"] if rtx else ["tensorrt"]
    for flavour in wanted:
        try:
            return _load(flavour)
        except ModuleNotFoundError as error:
            if error.name != flavour:
                raise UserError(f"{flavour} is installed but lacks {error.name}; install it again") from None
    missing = FLAVOURS[wanted[0]][0] + " is not" if len(wanted) == 1 else "neither TensorRT nor TensorRT-RTX is"
    raise UserError(f"{missing} installed; {_INSTALL}")


@cache
def _load(flavour: str) -> Api:
    try:
        trt = importlib.import_module(flavour)
    except ModuleNotFoundError:
        raise
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{flavour} is installed but does not load: {error}; {_INSTALL}") from None
    api = Api(trt, flavour, str(trt.__version__))
    oldest = OLDEST[flavour]
    if tuple(int(x) for x in api.version.split(".")[:2]) < oldest:
        raise UserError(f"{api.product} is installed: must be {oldest[0]}.{oldest[1]} or newer; {_INSTALL}")
    if api.is_rtx and sys.platform == "linux":
        from attnspan.plugins.trt_sparse_attn.soname import provide

        provide("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")
    return api

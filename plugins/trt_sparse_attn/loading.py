"""Opening an engine: TensorRT, the plugin, the GPU and its memory, each checked before the engine is read."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn.execution import Context, Profile, Tensor
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Api, Gpu, gpu, load
from attnspan.runtime.artefact import Artefact

if TYPE_CHECKING:
    import torch

__all__ = ["TensorRtEngine", "open_engine", "plugin_library"]

LIBRARY = "libattnspan_trt.so"
VARIABLE = "ATTNSPAN_TRT_PLUGIN"
_RESERVE = 1 << 30
"""Bytes left free beside streamed weights, caches and activations: buffers of calls, and what CUDA takes for itself."""
_LESS = "lower the batch, export with a smaller --n-max or --density, or free memory of the GPU"


def open_engine(
    artefact: Artefact, batch: int, *, rtx: bool | None = None, plugin: str | Path | None = None
) -> TensorRtEngine:
    """The engine of an artefact for the TensorRT and the GPU of this machine, for caches of `batch` rows.

    UserError: no TensorRT, no GPU, no engine for them, one of another version, damaged, or too large for the memory that is free.
    """
    from attnspan.plugins.trt_sparse_attn import sidecar

    api = load(rtx)
    device = gpu()
    if device is None:
        raise UserError(
            "no NVIDIA GPU is visible to PyTorch: engines run on GPUs only; check nvidia-smi and CUDA_VISIBLE_DEVICES, install a "
            "CUDA build of PyTorch, or export with --target cpu"
        )
    library = plugin_library(artefact.folder, plugin)
    path = sidecar.find(artefact.folder, api, device.sm)
    made = sidecar.check(path, artefact, flavour=api.flavour, version=api.version, sm=device.sm)
    caches = artefact.kv_bytes(batch)
    if not made.weight_streaming:
        _check_memory(path, caches, f"{batch} rows of {artefact.n_max} tokens", device)
    if made.plugin is None:
        origin = "none"
    elif library is None:
        from attnspan.plugins.trt_sparse_attn.plugin import register

        register(api)
        origin = "Python"
    else:
        api.load_plugin(library)
        origin = str(library)
    return TensorRtEngine(api, path, origin, caches if made.weight_streaming else None)


def plugin_library(folder: Path, given: str | Path | None) -> Path | None:
    """The plugin in C++: the one given, else ATTNSPAN_TRT_PLUGIN, else the one in the folder; None: the plugin in Python.

    UserError when the one that was asked for does not exist.
    """
    for asked, fix in ((given, "--plugin"), (os.environ.get(VARIABLE), VARIABLE)):
        if asked:
            if not Path(asked).is_file():
                raise UserError(f"the plugin library {asked} does not exist; change {fix}")
            return Path(asked).resolve()
    found = folder / LIBRARY
    return found.resolve() if found.is_file() else None


def _check_memory(path: Path, caches: int, what: str, device: Gpu) -> None:
    """UserError when weights and caches alone are more than what is free; activations come on top."""
    weights = path.stat().st_size
    if weights + caches > device.free:
        raise UserError(
            f"not enough GPU memory: the engine has {weights / 1e9:.2f} GB, caches of {what} take {caches / 1e9:.2f} GB, "
            f"{device.free / 1e9:.2f} GB of {device.name} are free; {_LESS}"
        )


class TensorRtEngine:
    """An `Engine` of TensorRT or TensorRT-RTX.

    plugin: where its plugins are from. caches: bytes to leave free when the weights that do not fit are streamed; None: the
    engine was not built for that. UserError when TensorRT cannot read it.
    """

    def __init__(self, api: Api, path: Path, plugin: str, caches: int | None = None) -> None:
        import torch

        self.label, self.plugin = f"{path.parent.name}/{path.name}", plugin
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._api, self._messages = api, deque[str](maxlen=5)
        self._logger = api.logger(lambda severity, text: self._messages.append(f"{severity}: {text}"))
        self._runtime = api.trt.Runtime(self._logger)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise UserError(
                f"{api.product} cannot read {path}: {self._reason()}; the plugin is {plugin}; make it again with: "
                f"attnspan build {path.parent.parent}"
            )
        self._engine = engine
        if caches is not None:  # to be said before there is a context
            room = torch.cuda.mem_get_info()[0] - caches - int(engine.device_memory_size_v2) - _RESERVE
            engine.weight_streaming_budget_v2 = max(0, min(int(engine.streamable_weights_size), room))
        self.tensors: Mapping[str, Tensor] = self._read_tensors()
        self.profiles: Sequence[Profile] = [self._read_profile(i) for i in range(engine.num_optimization_profiles)]
        self._memory: torch.Tensor | None = None

    def context(self, profile: int) -> Context:
        """A context for a profile. UserError when its activations do not fit into the memory of the GPU."""
        import torch

        trt = self._api.trt
        size = int(self._engine.device_memory_size_v2)
        try:
            if self._memory is None:
                self._memory = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
            context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        except torch.OutOfMemoryError:
            context = None
        if context is None or self._memory is None:
            what = f"activations of {size / 1e9:.2f} GB ({self.label})"
            raise UserError(f"not enough GPU memory for {what}: {self._reason()}; {_LESS}")
        stream = torch.cuda.current_stream()
        if not context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise RuntimeError(f"{self.label}: profile {profile} cannot be used: {self._reason()}")
        stream.synchronize()
        context.set_device_memory(self._memory.data_ptr(), size)
        return _TensorRtContext(self, context)

    def _reason(self) -> str:
        """What TensorRT said last."""
        return "; ".join(dict.fromkeys(self._messages)) or "it does not say why"

    def _read_tensors(self) -> dict[str, Tensor]:
        trt, engine = self._api.trt, self._engine
        return {
            name: Tensor(
                self._api.data_type(engine.get_tensor_dtype(name)),
                tuple(engine.get_tensor_shape(name)),
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                engine.get_tensor_location(name) == trt.TensorLocation.HOST,
            )
            for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
        }

    def _read_profile(self, index: int) -> Profile:
        least, _, most = (tuple(shape) for shape in self._engine.get_tensor_profile_shape("input_ids", index))
        kept = (1, most[1])
        if self.tensors["logits_to_keep"].on_host:
            values = self._engine.get_tensor_profile_values(index, "logits_to_keep")
            kept = (int(values[0][0]), int(values[-1][0]))
        return Profile(index, (least[0], most[0]), (least[1], most[1]), kept)


class _TensorRtContext:
    """A context of a TensorRtEngine."""

    def __init__(self, engine: TensorRtEngine, context: Any) -> None:
        self._engine, self._context = engine, context

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """As in `Context`."""
        if not self._context.set_input_shape(name, shape):
            raise RuntimeError(f"{self._engine.label} refuses {name} of shape {list(shape)}: {self._engine._reason()}")

    def set_address(self, name: str, address: int) -> None:
        """As in `Context`."""
        if not self._context.set_tensor_address(name, address):
            raise RuntimeError(f"{self._engine.label} refuses the address of {name}: {self._engine._reason()}")

    def enqueue(self, stream: int) -> None:
        """As in `Context`."""
        if not self._context.execute_async_v3(stream):
            raise RuntimeError(f"{self._engine.label} failed: {self._engine._reason()}")

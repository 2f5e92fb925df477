"""Caches on the device, and the calls that extend them: buffers, addresses, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attnspan.plugins.trt_sparse_attn.execution import Context, Engine
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.snapshot import Views

__all__ = ["Call", "DeviceCaches", "Stream"]

_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}


class Stream:
    """The one stream of a session: a CUDA stream, or nothing where the device is the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def handle(self) -> int:
        """What TensorRT takes as a stream."""
        return int(self._cuda.cuda_stream) if self._cuda else 0

    def current(self) -> Any:
        """A context in which PyTorch works in this stream."""
        return torch.cuda.stream(self._cuda) if self._cuda else nullcontext()

    def wait(self) -> None:
        """Wait for all that was put into the stream."""
        if self._cuda:
            self._cuda.synchronize()

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A CUDA graph of what `work` puts into this stream. RuntimeError when something of it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        # Other threads of the program may go on with what a capture forbids.
        with torch.cuda.graph(graph, stream=self._cuda, capture_error_mode="thread_local"):
            work()
        return graph


class DeviceCaches:
    """Key and value caches [batch, *cache_shape] of all attention ops, on the device. Past and present are the same memory."""

    def __init__(self, artefact: Artefact, batch: int, device: torch.device, stream: Stream) -> None:
        self._stream = stream
        self.tensors: dict[str, torch.Tensor] = {}
        self._capacity: dict[str, Sequence[int]] = {}
        kind = _TYPES[artefact.cache_dtype]
        for part in artefact.parts:
            for name in (f"key.{part.name}", f"value.{part.name}"):
                self.tensors[name] = torch.zeros((batch, *part.cache_shape(artefact.head_dim)), dtype=kind, device=device)
                self._capacity[name] = part.capacity

    def bind(self, context: Context, start: int, count: int) -> None:
        """Give rows [start, start + count) as the pasts and presents of each op."""
        for name, tensor in self.tensors.items():
            rows = tensor[start : start + count]
            context.set_shape(f"past_{name}", tuple(rows.shape))
            context.set_address(f"past_{name}", rows.data_ptr())
            context.set_address(f"present_{name}", rows.data_ptr())

    def views(self, row: int, length: int) -> Views:
        """Copies in this machine's memory of what a row of `length` tokens has in use, bytes of each head's slots."""
        with self._stream.current():
            return [(name, used.cpu().numpy()) for name, used in self._used(row, length)]

    def store(self, row: int, length: int, views: Views) -> None:
        """Take back what `views` gave, filled with other values."""
        with self._stream.current():
            for (_, used), (_, view) in zip(self._used(row, length), views, strict=True):
                used.copy_(torch.from_numpy(view))

    def copy(self, row: int, to: int, length: int) -> None:
        """Copy what a row of `length` tokens has in use to another row."""
        with self._stream.current():
            for (_, source), (_, target) in zip(self._used(row, length), self._used(to, length), strict=True):
                target.copy_(source)

    def _used(self, row: int, length: int) -> list[tuple[str, torch.Tensor]]:
        """What is in use, as bytes; a ring is filled from its first slot on."""
        found = []
        for name, tensor in self.tensors.items():
            slots = tensor[row].view(torch.uint8).reshape(-1, tensor.shape[-1] * tensor.itemsize)
            first = 0
            for capacity in self._capacity[name]:
                found.append((name, slots[first : first + min(length, capacity)]))
                first += capacity
        return found


class Call:
    """Calls of an engine for `count` rows and up to `tokens` new tokens each, with buffers of their own.

    What the engine reads is written to pinned memory first and copied in the stream, so that a call, copies included, can be a
    CUDA graph. Results are read after the stream was waited for: one call at a time.
    """

    def __init__(self, engine: Engine, caches: DeviceCaches, artefact: Artefact, stream: Stream, count: int, tokens: int) -> None:
        self._caches, self._stream, self._count = caches, stream, count
        self._on_gpu = engine.device.type == "cuda"
        shapes = {"input_ids": (count * tokens,), "length": (count,), "span": (artefact.layers, count, artefact.kv_heads)}
        self._host: dict[str, torch.Tensor] = {}
        self._device: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            kind = torch.int64 if name == "input_ids" else torch.int32
            self._host[name] = torch.zeros(shape, dtype=kind, pin_memory=self._on_gpu)
            self._device[name] = torch.zeros(shape, dtype=kind, device=engine.device)
        self._keep = torch.ones(1, dtype=torch.int64, device="cpu" if engine.tensors["logits_to_keep"].on_host else engine.device)
        self._logits = torch.zeros((count, 1, artefact.vocab_size), dtype=torch.float32, device=engine.device)
        self._result = torch.zeros(self._logits.shape, dtype=torch.float32, pin_memory=self._on_gpu)
        self._context: Context | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def write(self, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], span: npt.NDArray[np.int32]) -> None:
        """Set the inputs of the next call. tokens [count * tokens]; lengths [count]; span [layers, count, kv_heads]."""
        self._host["input_ids"].numpy()[: tokens.size] = tokens
        self._host["length"].numpy()[:] = lengths
        self._host["span"].numpy()[:] = span

    def run(self, context: Context, start: int, tokens: int, kept: int = 1) -> npt.NDArray[np.float32]:
        """Compute on rows [start, start + count), each with so many new tokens.

        Logits of the last `kept` positions, [count, kept, vocab]: good until the next call. RuntimeError when the device fails.
        """
        with self._stream.current():
            if self._logits.shape[1] != kept:
                shape = (self._count, kept, self._logits.shape[2])
                self._logits = torch.zeros(shape, dtype=torch.float32, device=self._logits.device)
                self._result = torch.zeros(shape, dtype=torch.float32, pin_memory=self._on_gpu)
                self._keep.fill_(kept)
            self._bind(context, start, tokens)
            self._work()
        return self._read()

    def capture(self) -> None:
        """Make a CUDA graph of the call that was made last, for `replay`; on a CPU nothing happens."""
        # TensorRT wants a call after its shapes were set, before one that is captured: `run` was that.
        if self._on_gpu:
            self._graph = self._stream.capture(self._work)

    def replay(self) -> npt.NDArray[np.float32] | None:
        """As `run`, by the graph that was captured; None when there is none."""
        if self._graph is None:
            return None
        with self._stream.current():
            self._graph.replay()
        return self._read()

    def _bind(self, context: Context, start: int, tokens: int) -> None:
        """Shapes and addresses of all tensors."""
        self._context = context
        for name, tensor in self._device.items():
            context.set_shape(name, (self._count, tokens) if name == "input_ids" else tuple(tensor.shape))
            context.set_address(name, tensor.data_ptr())
        # A shape tensor, whose value is read when shapes are worked out.
        context.set_shape("logits_to_keep", (1,))
        context.set_address("logits_to_keep", self._keep.data_ptr())
        context.set_address("logits", self._logits.data_ptr())
        self._caches.bind(context, start, self._count)

    def _work(self) -> None:
        assert self._context is not None
        for name, host in self._host.items():
            self._device[name].copy_(host, non_blocking=True)
        self._context.enqueue(self._stream.handle)
        self._result.copy_(self._logits, non_blocking=True)

    def _read(self) -> npt.NDArray[np.float32]:
        self._stream.wait()
        result: npt.NDArray[np.float32] = self._result.numpy()
        return result

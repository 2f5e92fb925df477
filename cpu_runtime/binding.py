"""Caches and the buffers that ONNX Runtime reads and writes in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attnspan.runtime.artefact import Artefact

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["Caches", "StepBuffers"]

_ALIGN = 64
"""Bytes: a cache line, and the widest vector load."""
# numpy has no bfloat16; the buffers hold its bits. Numbers are onnx.TensorProto.DataType.
_TYPES: dict[str, tuple[type[np.generic], int]] = {
    "float32": (np.float32, 1),
    "float16": (np.float16, 10),
    "bfloat16": (np.uint16, 16),
    "int8": (np.int8, 3),
}
_FLOAT32, _INT32, _INT64 = 1, 6, 7


class Caches:
    """Key and value caches of all layers, allocated once: one array [batch, slots, head_dim] each.

    The same memory is bound as past and as present: the op library updates it in place. The function bodies
    may write a present before they read the past, so without the library presents get arrays of their own,
    copied back by `settle`. Memory is zero and is taken from the system as it is first written.
    """

    def __init__(self, artefact: Artefact, batch: int, in_place: bool) -> None:
        dtype, self.onnx_type = _TYPES[artefact.cache_dtype]
        shapes = [(batch, slots, artefact.head_dim) for slots in artefact.slots for _ in ("key", "value")]
        self.names = [f"{kind}.{layer}" for layer in range(artefact.layers) for kind in ("key", "value")]
        self.past = [_aligned_zeros(shape, dtype) for shape in shapes]
        self.present = self.past if in_place else [_aligned_zeros(shape, dtype) for shape in shapes]

    def bind(self, binding: ort.IOBinding, start: int, count: int) -> None:
        """Bind rows [start, start + count) as past and present keys and values of each layer."""
        for name, past, present in zip(self.names, self.past, self.present, strict=True):
            shape = (count, *past.shape[1:])
            past_at, present_at = (a[start : start + count].ctypes.data for a in (past, present))
            binding.bind_input(f"past_{name}", "cpu", 0, self.onnx_type, shape, past_at)
            binding.bind_output(f"present_{name}", "cpu", 0, self.onnx_type, shape, present_at)

    def settle(self, start: int, count: int) -> None:
        """After a run on rows [start, start + count): make their present the past. Nothing to do in place."""
        if self.present is not self.past:
            for past, present in zip(self.past, self.present, strict=True):
                past[start : start + count] = present[start : start + count]


class StepBuffers:
    """One IOBinding for rows [start, start + count), bound once; a step writes its buffers and runs.

    length: int32 [count]. span: int32 [layers, count, kv_heads]. Token ids and logits are bound with
    `set_tokens` and `set_logits`, again only where their place or shape changes.
    """

    def __init__(self, session: ort.InferenceSession, caches: Caches, artefact: Artefact, start: int, count: int) -> None:
        self._session = session
        self._caches = caches
        self._rows = (start, count)
        self._binding = session.io_binding()
        self._held: dict[str, npt.NDArray[Any]] = {}
        caches.bind(self._binding, start, count)
        self.length = np.zeros(count, dtype=np.int32)
        self.span = np.zeros((artefact.layers, count, artefact.kv_heads), dtype=np.int32)
        self._keep = np.ones(1, dtype=np.int64)
        for name, array, kind in (("length", self.length, _INT32), ("span", self.span, _INT32)):
            self._binding.bind_input(name, "cpu", 0, kind, array.shape, array.ctypes.data)
        self._binding.bind_input("logits_to_keep", "cpu", 0, _INT64, (1,), self._keep.ctypes.data)

    def set_tokens(self, tokens: npt.NDArray[np.int64]) -> None:
        """Read token ids from this array, [count, tokens]."""
        self._held["tokens"] = tokens
        self._binding.bind_input("input_ids", "cpu", 0, _INT64, tokens.shape, tokens.ctypes.data)

    def set_logits(self, logits: npt.NDArray[np.float32]) -> None:
        """Write the logits of the last positions of the chunk to this array, [count, kept, vocab]."""
        self._held["logits"] = logits
        self._keep[0] = logits.shape[1]
        self._binding.bind_output("logits", "cpu", 0, _FLOAT32, logits.shape, logits.ctypes.data)

    def run(self) -> None:
        """Run the model on what the buffers hold."""
        self._session.run_with_iobinding(self._binding)
        self._caches.settle(*self._rows)


def _aligned_zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGN, dtype=np.uint8)
    skip = -raw.ctypes.data % _ALIGN
    return raw[skip : skip + size].view(dtype).reshape(shape)

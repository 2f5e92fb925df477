"""Caches, states and the buffers that ONNX Runtime reads and writes in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attnspan.runtime.artefact import Artefact
from attnspan.runtime.memory import zeros
from attnspan.runtime.snapshot import Views

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["Caches", "StepBuffers"]

# numpy has no bfloat16; the buffers hold its bits. Numbers are onnx.TensorProto.DataType.
_TYPES: dict[str, tuple[type[np.generic], int]] = {
    "float32": (np.float32, 1),
    "float16": (np.float16, 10),
    "bfloat16": (np.uint16, 16),
    "int8": (np.int8, 3),
}
_FLOAT32, _UINT8, _INT32, _INT64 = 1, 2, 6, 7


class Caches:
    """Key and value caches, [batch, *part.cache_shape], and states, [batch, bytes], of all attention ops, allocated once.

    The same memory is bound as past and as present: the op library and TensorScatter update it in place. The function bodies
    may write a present before they read the past, so without the library presents get arrays of their own,
    copied back by `settle`. Memory is zero and is taken from the system as it is first written.
    """

    device = "cpu"
    """Where the model computes."""

    def __init__(self, artefact: Artefact, batch: int, in_place: bool) -> None:
        dtype, onnx_type = _TYPES[artefact.cache_dtype]
        self.names: list[str] = []
        self.past: list[npt.NDArray[Any]] = []
        self._capacity: list[tuple[int, ...]] = []  # slots of each head; none for a state
        for part in artefact.parts:
            for kind in part.caches:
                self.names.append(f"{kind}.{part.name}")
                self.past.append(zeros((batch, *part.cache_shape(artefact.head_dim)), dtype))
                self._capacity.append(part.capacity)
            if part.lsh is not None:
                self.names.append(f"state.{part.name}")
                self.past.append(zeros((batch, part.state_bytes(artefact.head_dim)), np.uint8))
                self._capacity.append(())
        self._types = [onnx_type if capacity else _UINT8 for capacity in self._capacity]
        self.present = self.past if in_place else [zeros(array.shape, array.dtype) for array in self.past]

    def bind(self, binding: ort.IOBinding, start: int, count: int) -> None:
        """Bind rows [start, start + count) as the pasts and presents of each op."""
        for name, kind, past, present in zip(self.names, self._types, self.past, self.present, strict=True):
            shape = (count, *past.shape[1:])
            past_at, present_at = (a[start : start + count].ctypes.data for a in (past, present))
            binding.bind_input(f"past_{name}", "cpu", 0, kind, shape, past_at)
            binding.bind_output(f"present_{name}", "cpu", 0, kind, shape, present_at)

    def settle(self, start: int, count: int) -> None:
        """After a run on rows [start, start + count): make their present the past. Nothing to do in place."""
        if self.present is not self.past:
            for past, present in zip(self.past, self.present, strict=True):
                past[start : start + count] = present[start : start + count]

    def views(self, row: int, length: int) -> Views:
        """The memory that a row of `length` tokens has in use, in contiguous views by name: slots of each head, whole states."""
        found: list[tuple[str, npt.NDArray[Any]]] = []
        for name, array, capacities in zip(self.names, self.past, self._capacity, strict=True):
            if not capacities and length:
                found.append((name, array[row]))
            first, slots = 0, array[row].reshape(-1, array.shape[-1])
            for capacity in capacities:
                # A ring is filled from its first slot on, so that what is in use is at its beginning.
                found.append((name, slots[first : first + min(length, capacity)]))
                first += capacity
        return found

    def store(self, row: int, length: int, views: Views) -> None:
        """Nothing to do: the views of a row are its memory."""

    def copy(self, row: int, to: int, length: int) -> None:
        """Copy what a row of `length` tokens has in use to another row."""
        for (_, source), (_, target) in zip(self.views(row, length), self.views(to, length), strict=True):
            np.copyto(target, source)


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
        self._bind_inputs()

    def _bind_inputs(self) -> None:
        small = (("length", self.length, _INT32), ("span", self.span, _INT32), ("logits_to_keep", self._keep, _INT64))
        for name, array, kind in small:
            self._binding.bind_input(name, "cpu", 0, kind, array.shape, array.ctypes.data)

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
        if self._caches.device != "cpu":  # then ONNX Runtime copies inputs when they are bound, and not when it runs
            self._bind_inputs()
            self.set_tokens(self._held["tokens"])
        self._session.run_with_iobinding(self._binding)
        self._caches.settle(*self._rows)

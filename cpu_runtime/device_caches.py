"""Caches of target `hybrid` where a GPU computes: its rings in its memory, what sampled heads keep in that of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from attnspan.cpu_runtime.binding import Caches
from attnspan.planner.errors import UserError
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.snapshot import Views

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["DeviceCaches"]


class DeviceCaches(Caches):
    """As `Caches`, in place. Rows are saved, loaded and copied through arrays of the host, which otherwise take no memory."""

    def __init__(self, artefact: Artefact, batch: int, device: str) -> None:
        """UserError when the device has no memory for the rings."""
        import onnxruntime as ort

        super().__init__(artefact, batch, in_place=True)
        self.device = device
        sampled = {f"{kind}.{part.name}" for part in artefact.parts if part.lsh is not None for kind in (*part.caches, "state")}
        self._values: dict[str, Any] = {}
        for name, array in zip(self.names, self.past, strict=True):
            if name not in sampled:
                try:
                    self._values[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(array.shape, array.dtype), device, 0)
                except Exception as error:  # pybind11 classes without a common base
                    size = sum(a.nbytes for n, a in zip(self.names, self.past, strict=True) if n not in sampled) / 1e9
                    raise UserError(
                        f"no memory on device {device} for rings of {size:.2f} GB ({batch} rows of {artefact.n_max} tokens): "
                        f"{str(error).splitlines()[0]}; lower the batch, or export with a plan that keeps less"
                    ) from None

    def bind(self, binding: ort.IOBinding, start: int, count: int) -> None:
        """Bind rows [start, start + count) as the pasts and presents of each op."""
        for name, kind, past in zip(self.names, self._types, self.past, strict=True):
            value, offset = self._values.get(name), start * past.strides[0]
            where = "cpu" if value is None else self.device
            at = (past.ctypes.data if value is None else value.data_ptr()) + offset
            binding.bind_input(f"past_{name}", where, 0, kind, (count, *past.shape[1:]), at)
            binding.bind_output(f"present_{name}", where, 0, kind, (count, *past.shape[1:]), at)

    def views(self, row: int, length: int) -> Views:
        """What a row of `length` tokens has in use; of what is on the device, copies, that `store` takes back."""
        self._fetch()
        return super().views(row, length)

    def store(self, row: int, length: int, views: Views) -> None:
        """Take back what `views` gave."""
        self._send()

    def copy(self, row: int, to: int, length: int) -> None:
        """Copy what a row of `length` tokens has in use to another row."""
        super().copy(row, to, length)
        self._send()

    def _fetch(self) -> None:
        for name, array in zip(self.names, self.past, strict=True):
            if name in self._values:
                array[:] = self._values[name].numpy()

    def _send(self) -> None:
        for name, array in zip(self.names, self.past, strict=True):
            if name in self._values:
                self._values[name].update_inplace(array)

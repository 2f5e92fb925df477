"""The writer of model.onnx and of the file with its weights: a block in memory at a time, hashed as it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from attnspan.export.weights import Blocks, as_bytes, by_rows

ALIGNMENT = 4096  # bytes; of tensors that are larger, so that they can be mapped
_Places = dict[int, tuple[int, ir.TensorProtocol]]


class _Hashed:
    """A file to write, whose SHA-256 is computed beside the writing; at most two blocks wait for it."""

    def __init__(self, file: Any, on_bytes: Callable[[int], object]) -> None:
        self.file, self.on_bytes = file, on_bytes
        self.at = 0
        self.hash = hashlib.sha256()
        self.worker = ThreadPoolExecutor(1)
        self.waiting: list[Future[None]] = []

    def write(self, block: bytes | memoryview) -> None:
        """Append bytes, which must not change any more."""
        self.waiting.append(self.worker.submit(self.hash.update, block))
        self.file.write(block)
        self.at += len(block)
        self.on_bytes(len(block))
        if len(self.waiting) > 2:
            self.waiting.pop(0).result()

    def close(self) -> str:
        """End; the digest."""
        self.worker.shutdown()
        return self.hash.hexdigest()


def write_model(model: ir.Model, file: Path, data: str, small: int, on_bytes: Callable[[int], object] = int) -> dict[str, Any]:
    """Write `model` to `file`, and its tensors of `small` bytes or more to the file `data` beside it.

    Tensors of the same content are stored once. on_bytes is called with the bytes of each block that was written. The model's own
    tensors stay as they are. Returns bytes and SHA-256 of `data`, as attnspan.json has them.
    """
    places, _ = _layout(model, small)
    with (file.parent / data).open("wb") as stream:
        out = _Hashed(stream, on_bytes)
        try:
            for start, tensor in places.values():
                if out.at < start:
                    out.write(bytes(start - out.at))
                for block in _blocks(tensor):
                    out.write(block)
                if out.at - start != tensor.nbytes:
                    raise ValueError(f"{tensor.name} has {out.at - start} bytes, {tensor.nbytes} expected")
        finally:
            digest = out.close()
    with _stored(model, file.parent / data, places, lambda x: x.numpy()):
        ir.save(model, file)
    return {"bytes": out.at, "sha256": digest}


def written_bytes(model: ir.Model, data: str, small: int) -> tuple[int, int]:
    """Sizes of the two files that `write_model` would write, without reading a tensor that lies in a file."""
    places, size = _layout(model, small)

    def zeros(x: ir.TensorProtocol) -> np.ndarray:
        return np.zeros(tuple(int(n) for n in x.shape), x.dtype.numpy())

    with _stored(model, Path(data), places, zeros):
        return ir.serde.serialize_model(model).ByteSize(), size


def _layout(model: ir.Model, small: int) -> tuple[_Places, int]:
    """Where each tensor of `small` bytes or more begins in the file of weights, by its content; and the size of that file."""
    places: _Places = {}
    end = 0
    for x in model.graph.initializers.values():
        tensor = x.const_value
        if tensor.nbytes < small or _content(tensor) in places:
            continue
        start = -(-end // ALIGNMENT) * ALIGNMENT if tensor.nbytes >= ALIGNMENT else end
        places[_content(tensor)] = start, tensor
        end = start + int(tensor.nbytes)
    return places, end


def _content(tensor: ir.TensorProtocol) -> int:
    return id(getattr(tensor, "content", tensor))


@contextmanager
def _stored(model: ir.Model, data: Path, places: _Places, inside: Callable[[ir.TensorProtocol], np.ndarray]) -> Iterator[None]:
    """The model with its tensors as references into `data`, for as long as the body runs; `inside` gives the small ones."""
    initializers = list(model.graph.initializers.values())
    kept = [x.const_value for x in initializers]
    try:
        for x, tensor in zip(initializers, kept, strict=True):
            if _content(tensor) in places:
                start, shape = places[_content(tensor)][0], ir.Shape(tensor.shape)
                where = {"base_dir": data.parent, "shape": shape}
                x.const_value = ir.ExternalTensor(data.name, start, int(tensor.nbytes), tensor.dtype, name=x.name, **where)
            else:
                x.const_value = ir.Tensor(inside(tensor), tensor.dtype, name=x.name)  # wherever it was
        yield
    finally:
        for x, tensor in zip(initializers, kept, strict=True):
            x.const_value = tensor


def _blocks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """The bytes of a tensor of one axis or more, block by block."""
    if isinstance(tensor, ir.ExternalTensor):
        rows, step = by_rows(tensor)
        tensor = Blocks(rows, tensor.dtype, tuple(int(n) for n in tensor.shape), step)
    yield from map(as_bytes, tensor.blocks() if isinstance(tensor, Blocks) else [tensor.numpy()])

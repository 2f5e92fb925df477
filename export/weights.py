"""Tensors that are read, and computed, block by block, only when they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from attnspan.planner.errors import UserError

BLOCK = 2**24
"""Elements of a block, about: 64 MiB in fp32."""

Rows = Callable[[int, int], np.ndarray]


class Blocks(ir.LazyTensor):
    """A tensor of which no more than a block is in memory while it is written (`tofile`); `numpy` makes all of it.

    rows(first, end): the tensor's rows [first, end). step: rows of a block. content: what stands for the tensor's bytes: those of
    equal content are stored once.
    """

    def __init__(self, rows: Rows, dtype: ir.DataType, shape: tuple[int, ...], step: int, name: str | None = None) -> None:
        super().__init__(lambda: ir.tensor(np.concatenate(list(self.blocks()))), dtype, ir.Shape(shape), name=name)
        self.rows, self.step = rows, max(1, step)
        self.content: object = self

    def blocks(self) -> Iterator[np.ndarray]:
        """The tensor, some rows at a time."""
        count = int(self.shape[0])
        for first in range(0, count, self.step):
            yield self.rows(first, min(first + self.step, count))

    def reshaped(self, *shape: int, name: str) -> Blocks:
        """The same bytes under another name and shape of as many rows."""
        other = Blocks(lambda first, end: self.rows(first, end).reshape(-1, *shape[1:]), self.dtype, shape, self.step, name)
        other.content = self.content
        return other

    def tofile(self, file: Any) -> None:
        """Write the tensor, a block in memory at a time."""
        for block in self.blocks():
            file.write(as_bytes(block))


def as_bytes(array: np.ndarray) -> memoryview:
    """The memory of an array, of whatever type; a copy where it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def by_rows(tensor: ir.TensorProtocol) -> tuple[Rows, int]:
    """A function that reads rows [first, end) of a tensor of one axis or more, and how many it is best asked for.

    What lies in a file is read from it, not mapped: mapped pages would count as this process's memory. A lazy tensor is computed
    whole each time, so that it is best asked for everything.
    """
    shape = tuple(int(n) for n in tensor.shape)
    row = math.prod(shape[1:])
    step = max(1, BLOCK // max(row, 1))
    if isinstance(tensor, Blocks):
        return tensor.rows, step
    if isinstance(tensor, ir.ExternalTensor):
        kind = tensor.dtype.numpy()
        start = tensor.offset or 0

        def read(first: int, end: int) -> np.ndarray:
            bits = np.fromfile(tensor.path, f"u{kind.itemsize}", (end - first) * row, offset=start + first * row * kind.itemsize)
            if bits.size != (end - first) * row:
                raise UserError(f"{tensor.path} was cut short while it was read; download MODEL again")
            block: np.ndarray = bits.view(kind).reshape(end - first, *shape[1:])
            return block

        return read, step
    return lambda first, end: tensor.numpy()[first:end], step if not isinstance(tensor, ir.LazyTensor) else shape[0]


def cast(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """`tensor` as `dtype`: itself where it is that already, else converted in blocks each time it is read.

    Reading raises UserError for numbers that fp16 cannot hold.
    """
    if tensor.dtype == dtype:
        return tensor
    shape = tuple(int(n) for n in tensor.shape)
    if not shape:
        return ir.tensor(convert(np.asarray(tensor.numpy()), dtype, tensor.name), name=tensor.name)
    rows, step = by_rows(tensor)
    return Blocks(lambda first, end: convert(rows(first, end), dtype, tensor.name), dtype, shape, step, tensor.name)


def convert(x: np.ndarray, dtype: ir.DataType, name: str | None = None) -> np.ndarray:
    """`x` as `dtype`, rounded to the nearest. UserError, with the weight's name, when fp16 would make infinities of it."""
    if dtype == ir.DataType.FLOAT and x.dtype == ml_dtypes.bfloat16:
        wide = x.view(np.uint16).astype(np.uint32)
        return np.left_shift(wide, 16, out=wide).view(np.float32)  # several times as fast as astype
    if dtype == ir.DataType.FLOAT16 and x.dtype != np.float16:
        single = x.astype(np.float32)
        largest = float(np.abs(single).max(initial=0))
        if 65504 < largest < np.inf:
            raise UserError(f"weight {name!r} has numbers up to {largest:.3g}, fp16 ends at 65504; use --dtype bf16 or fp32")
        return single.astype(np.float16)
    return x.astype(dtype.numpy())

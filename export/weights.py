"""Tensors that are read, and converted, only when they are written."""

from __future__ import annotations

import onnx_ir as ir


def cast(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """`tensor` as `dtype`: itself where it is that already, else a lazy tensor, converted each time it is read."""
    if tensor.dtype == dtype:
        return tensor

    def read() -> ir.TensorProtocol:
        converted = ir.tensor(tensor.numpy().astype(dtype.numpy()))
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # else the mapped pages of every weight stay resident
        return converted

    return ir.LazyTensor(read, dtype, ir.Shape(tensor.shape), name=tensor.name)

"""A recorder of ONNX nodes: what both the builder of graphs and the rewrites write with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

WINDOW = "attnspan.window"
"""Metadata of an attention of the normal form: tokens that the model itself lets it see, where that is not all."""

Input: TypeAlias = "ir.Value | np.ndarray | Sequence[int] | None"


def value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """A named value; text in `shape` is a symbolic dimension."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


class Recorder:
    """Collects nodes and initializers for one graph, in order."""

    def __init__(self, prefix: str) -> None:
        """`prefix` starts the names of constants: recorders of one graph need different ones."""
        self.prefix = prefix
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def op(self, op_type: str, *inputs: Input, output: ir.Value | None = None, **attributes: Any) -> ir.Value:
        """Add a standard node and return its first output. Arrays and lists of int64 become initializers."""
        return self.node(op_type, inputs, [output or ir.Value()], attributes).outputs[0]

    def node(
        self,
        op_type: str,
        inputs: Sequence[Input],
        outputs: Sequence[ir.Value],
        attributes: dict[str, Any],
        domain: str = "",
        name: str | None = None,
    ) -> ir.Node:
        """Add any node."""
        values = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        node = ir.node(op_type, values, attributes, domain=domain, outputs=outputs, name=name)
        self.nodes.append(node)
        return node

    def constant(self, array: np.ndarray | Sequence[int]) -> ir.Value:
        """An initializer that holds `array`; lists are int64. Equal lists share one."""
        if isinstance(array, np.ndarray):
            return self.initializer(f"{self.prefix}.constant.{len(self.initializers)}", ir.tensor(array))
        name = f"{self.prefix}.{list(array)}"
        return self.initializers.get(name) or self.initializer(name, ir.tensor(np.array(array, np.int64)))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer of that name."""
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        self.initializers[name] = made
        return made

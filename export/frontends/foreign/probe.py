"""Small parts of a foreign graph, computed: what a mask, a position or a repeated key is, whatever nodes it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

MAX_NODES = 4000
MAX_CONSTANT = 64_000_000  # bytes; tables and masks are smaller, weights are not needed
# Neither masks nor positions come out of these: behind them are the activations of the model.
HEAVY = {"MatMul", "Gemm", "MatMulNBits", "Attention", "GroupQueryAttention", "MultiHeadAttention", "Conv", "Einsum", "Softmax"}


class BlockedError(Exception):
    """A value depends on more than sizes, masks and positions; the text says on what."""


@dataclass(frozen=True)
class Sizes:
    """A call with one row: tokens in the caches, and new ones."""

    past: int
    new: int

    @property
    def total(self) -> int:
        """Tokens that the new ones may see."""
        return self.past + self.new

    @property
    def positions(self) -> Array:
        """Of the new tokens, int64 [new]."""
        return np.arange(self.past, self.total, dtype=np.int64)


@dataclass
class Probe:
    """Computes values of `graph`, given what some others are."""

    graph: ir.Graph
    opsets: Mapping[str, int]
    roles: Mapping[ir.Value, str]
    """Of the graph's inputs: input_ids, attention_mask, position_ids or past; others cannot be computed with."""
    past_shape: tuple[int, int] = (1, 1)
    """KV heads and size of a head, for pasts."""
    order: dict[ir.Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.number()

    def number(self) -> None:
        """Take note of the order of the nodes: to be called again when there are others."""
        self.order = {node: i for i, node in enumerate(self.graph)}

    def __call__(self, outputs: Sequence[ir.Value], sizes: Sizes, given: Mapping[ir.Value, Array]) -> list[Array]:
        """`outputs` at those sizes, where the values in `given` are known. BlockedError when that is not enough."""
        import onnxruntime as ort

        nodes, feeds, constants = self._needed(outputs, sizes, given)
        graph = onnx.GraphProto(name="probe")
        for node in sorted(nodes, key=self.order.__getitem__):
            graph.node.append(ir.serde.serialize_node(node))
        for name, array in feeds.items():
            dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, array.shape))
        for name, array in constants.items():
            graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        # Outputs of their own, since one that is an input, too, would be refused.
        for i, x in enumerate(outputs):
            graph.node.append(onnx.helper.make_node("Identity", [x.name], [f"probe.{i}"]))
            graph.output.append(onnx.ValueInfoProto(name=f"probe.{i}"))
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(*x) for x in self.opsets.items()])
        model.ir_version = 10
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            computed: list[Array] = session.run(None, feeds)
        except Exception as error:  # whatever ONNX Runtime raises: this part of the graph does not run
            raise BlockedError(str(error).splitlines()[0]) from None
        return computed

    def _needed(
        self, outputs: Sequence[ir.Value], sizes: Sizes, given: Mapping[ir.Value, Array]
    ) -> tuple[set[ir.Node], dict[str, Array], dict[str, Array]]:
        """Nodes, inputs and constants from which `outputs` follow."""
        nodes: set[ir.Node] = set()
        feeds: dict[str, Array] = {}
        constants: dict[str, Array] = {}
        todo, seen = list(outputs), set(outputs)
        while todo:
            x = todo.pop()
            known = given.get(x)
            if known is None:
                known = self._known(x, sizes, given)
            if known is not None:
                (constants if x.const_value is not None else feeds)[x.name] = known
                continue
            node = x.producer()
            if node is None:
                raise BlockedError(f"input {x.name!r}")
            if node.op_type in HEAVY or any(
                a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()
            ):
                raise BlockedError(f"{node.op_type} {node.name!r}")
            nodes.add(node)
            if len(nodes) > MAX_NODES:
                raise BlockedError(f"more than {MAX_NODES} nodes")
            for y in node.inputs:
                if y is not None and y not in seen:
                    seen.add(y)
                    todo.append(y)
        return nodes, feeds, constants

    def _known(self, x: ir.Value, sizes: Sizes, given: Mapping[ir.Value, Array]) -> Array | None:
        """A value that follows from the sizes alone: an input, an initializer, the shape of an activation."""
        if x.const_value is not None:
            if x.const_value.nbytes > MAX_CONSTANT:
                raise BlockedError(f"weight {x.name!r}")
            return np.asarray(x.const_value.numpy())
        node = x.producer()
        if node is None:
            return self._input(x, sizes)
        if node.op_type == "Shape" and node.domain == "" and node.inputs[0] not in given:
            shape = self._shape(node.inputs[0], sizes)
            if shape is not None:
                start, end = (node.attributes[k].as_int() if k in node.attributes else None for k in ("start", "end"))
                return np.array(shape[start:end], np.int64)
        return None

    def _input(self, x: ir.Value, sizes: Sizes) -> Array | None:
        role = self.roles.get(x)
        dtype = x.dtype.numpy() if x.dtype is not None else np.dtype(np.int64)
        if role == "input_ids":
            return np.ones((1, sizes.new), dtype)
        if role == "attention_mask":
            return np.ones((1, sizes.total), dtype)
        if role == "position_ids":
            return sizes.positions[None].astype(dtype)
        if role == "past":
            return np.zeros((1, self.past_shape[0], sizes.past, self.past_shape[1]), dtype)
        return None

    def _shape(self, x: ir.Value | None, sizes: Sizes) -> list[int] | None:
        """The shape of a value by its annotation, whose symbols the graph's inputs explain; None when one is not explained."""
        if x is None or x.shape is None:
            return None
        symbols: dict[str, int] = {}
        for y in self.graph.inputs:
            array = None if y not in self.roles or y.shape is None else self._input(y, sizes)
            if array is not None and array.ndim == len(y.shape):
                for dim, size in zip(y.shape, array.shape, strict=True):
                    if not isinstance(dim, int) and dim.value is not None:
                        symbols.setdefault(dim.value, size)
        sized = [dim if isinstance(dim, int) else symbols.get(dim.value) for dim in x.shape]
        return None if None in sized else [int(size) for size in sized if size is not None]

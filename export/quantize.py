"""Weights in 4 or 8 bits: matrix products become ONNX Runtime's MatMulNBits, the embedding its GatherBlockQuantized.

Blocks of `BLOCK` weights along the input features of each output share a scale, in 4 bits also a zero point. Weights are
quantised by ONNX Runtime's own quantiser, some rows at a time, while they are written. Norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attnspan.export.weights import Blocks, Rows, by_rows, convert
from attnspan.planner.errors import UserError

__all__ = ["WEIGHTS", "fake_quantize", "quantize_weights"]

DOMAIN = "com.microsoft"
BLOCK = 32  # weights that share a scale
SMALLEST = 4096  # elements of a matrix; smaller ones are not worth it


@dataclass(frozen=True)
class Scheme:
    """Bits of the matrices, and of the embedding and of the head, whose errors reach the logits undamped."""

    bits: int
    ends: int


WEIGHTS = {"int4": Scheme(4, 8), "int8": Scheme(8, 8)}
"""What --weights can be, beside the model's type."""


def quantize_weights(model: ir.Model, weights: str) -> None:
    """Quantise the constant matrices of a model in fp32, in place; nothing is read yet.

    UserError when `weights` is not in `WEIGHTS`, or when ONNX Runtime is missing.
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights is {weights!r}; must be one of {', '.join(WEIGHTS)}, or leave it out")
    _quantizer()
    _Pass(model, WEIGHTS[weights]).run()


def fake_quantize(weight: np.ndarray, weights: str, end: bool) -> np.ndarray:
    """What a matrix [outputs, inputs] is after quantisation, in fp32; end: it is an embedding or the head."""
    scheme = WEIGHTS[weights]
    bits = scheme.ends if end else scheme.bits
    return _dequantized(weight.shape[1], bits, *_quantized(np.asarray(weight, np.float32), bits))


def is_quantized(shape: tuple[int, ...], name: str, embedding: bool = False) -> bool:
    """Whether a matrix of this shape, [outputs, inputs], is quantised: not small ones, and not those that choose experts.

    Rows of an embedding must be whole blocks.
    """
    chooses = name.endswith("mlp.gate.weight") or "router" in name
    return shape[0] * shape[1] >= SMALLEST and not chooses and not (embedding and shape[1] % BLOCK)


class _Pass:
    """One model. A matrix that is used twice, as a tied embedding is, is quantised and stored once."""

    def __init__(self, model: ir.Model, scheme: Scheme) -> None:
        self.model, self.scheme = model, scheme
        self.done: dict[tuple[int, int, bool], _Quantized] = {}
        self.initializers: dict[str, ir.Value] = {}

    def run(self) -> None:
        graph = self.model.graph
        ids = {x.name: x for x in graph.inputs}["input_ids"]
        logits = _producer_of_logits(graph.outputs[0])
        for node in list(graph):
            if node.domain != "":
                continue
            made: ir.Node | None = None
            if node.op_type in ("Gemm", "MatMul"):
                made = self.product(node, node is logits)
            elif node.op_type == "Gather" and node.inputs[1] is ids:
                made = self.embedding(node)
            if made is None:
                continue
            graph.insert_before(node, made)
            old, new = node.outputs[0], made.outputs[0]
            name = old.name
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            new.name = name
        graph.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(self.model)

    def product(self, node: ir.Node, is_head: bool) -> ir.Node | None:
        """MatMulNBits in place of a Gemm or MatMul by a constant; None where it has to stay."""
        attribute = {name: x.value for name, x in node.attributes.items()}
        if attribute.get("transA") or attribute.get("alpha", 1.0) != 1.0 or attribute.get("beta", 1.0) != 1.0:
            return None
        weight = _constant(node.inputs[1])
        if weight is None:
            return None
        stored_as_is = bool(attribute.get("transB"))  # [outputs, inputs]
        shape = tuple(int(n) for n in weight.shape)[:: 1 if stored_as_is else -1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if not is_quantized(shape, str(weight.name)) or (bias is not None and len(bias.shape or ()) != 1):
            return None
        q = self.quantized(weight, self.scheme.ends if is_head else self.scheme.bits, stored_as_is)
        inputs = [node.inputs[0], *self.values(q, q.packed)]
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        # Activations of each row in 8 bits, scaled by block: what makes int8 instructions usable.
        attributes: dict[str, Any] = {"K": q.inputs, "N": q.outputs, "bits": q.bits, "block_size": BLOCK, "accuracy_level": 4}
        return ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, outputs=[_like(node.outputs[0])], name=node.name)

    def embedding(self, node: ir.Node) -> ir.Node | None:
        """GatherBlockQuantized in place of the Gather of embeddings; None where it has to stay."""
        weight = _constant(node.inputs[0])
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if weight is None or axis != 0 or not is_quantized(tuple(weight.shape), str(weight.name), embedding=True):
            return None
        q = self.quantized(weight, self.scheme.ends, True)
        packed, *rest = self.values(q, q.packed.reshaped(q.outputs, q.inputs * q.bits // 8, name=f"{q.packed.name}_rows"))
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": q.bits}
        output = _like(node.outputs[0])
        inputs = [packed, node.inputs[1], *rest]
        return ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN, outputs=[output], name=node.name)

    def quantized(self, weight: ir.TensorProtocol, bits: int, stored_as_is: bool) -> _Quantized:
        key = (id(getattr(weight, "content", weight)), bits, stored_as_is)
        if key not in self.done:
            self.done[key] = _Quantized(weight, bits, stored_as_is)
        return self.done[key]

    def values(self, q: _Quantized, packed: Blocks) -> list[ir.Value]:
        """The initializers of a quantised matrix, its weights as `packed`."""
        made = []
        for tensor in (packed, q.scales, *((q.zero_points,) if q.zero_points is not None else ())):
            name = str(tensor.name)
            if name not in self.initializers:
                x = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
                self.initializers[name] = x
                self.model.graph.register_initializer(x)
            made.append(self.initializers[name])
        return made


class _Quantized:
    """A matrix [outputs, inputs] in `bits`: packed [outputs, blocks, bytes of a block], scales, and, in 4 bits, zero points.

    Writing `packed` yields the others, which are kept until they are written; asked for first, they cost a pass of their own.
    """

    def __init__(self, weight: ir.TensorProtocol, bits: int, stored_as_is: bool) -> None:
        self.bits = bits
        self.outputs, self.inputs = (int(n) for n in tuple(weight.shape)[:: 1 if stored_as_is else -1])
        blocks = -(-self.inputs // BLOCK)
        self.name = str(weight.name)
        self.rows, step = _fp32_rows(weight, stored_as_is)
        self.kept: dict[str, dict[int, np.ndarray]] = {"scales": {}, "zero_points": {}}

        def tensor(kind: str, dtype: ir.DataType, *shape: int, rows: Rows) -> Blocks:
            return Blocks(rows, dtype, (self.outputs, *shape), step, f"{self.name}_{kind}")

        self.packed = tensor(f"Q{bits}", ir.DataType.UINT8, blocks, BLOCK * bits // 8, rows=self.pack)
        self.scales = tensor("scales", ir.DataType.FLOAT, blocks, rows=self.take("scales"))
        self.zero_points: Blocks | None = None
        if bits == 4:
            self.zero_points = tensor("zero_points", ir.DataType.UINT8, -(-blocks // 2), rows=self.take("zero_points"))

    def pack(self, first: int, end: int) -> np.ndarray:
        packed, scales, zero_points = _quantized(self.rows(first, end), self.bits)
        self.kept["scales"][first] = scales
        if zero_points is not None:
            self.kept["zero_points"][first] = zero_points
        return packed

    def take(self, kind: str) -> Rows:
        def rows(first: int, end: int) -> np.ndarray:
            if first not in self.kept[kind]:
                self.pack(first, end)
            return self.kept[kind].pop(first)

        return rows


def _quantizer() -> Callable[..., Any]:
    """ONNX Runtime's quantiser of one matrix; UserError when it is not there."""
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
    except ImportError as error:
        raise UserError(f"--weights needs ONNX Runtime's quantiser ({error}); install attnspan[cpu,export]") from None

    def quantizer(bits: int) -> Any:
        # 8 bits can do without a zero point; in 4 it spares a level or two of each block.
        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=bits == 8, bits=bits)
        return DefaultWeightOnlyQuantizer(config)

    return quantizer


def _quantized(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows [outputs, inputs] in fp32, packed, with scales [outputs, blocks] and zero points (None in 8 bits)."""
    packed, scales, zero_points = _quantizer()(bits).qbits_block_quant(np.ascontiguousarray(weight.T))
    outputs = weight.shape[0]
    return packed, scales.reshape(outputs, -1), zero_points.reshape(outputs, -1) if bits == 4 else None


def _dequantized(inputs: int, bits: int, packed: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None) -> np.ndarray:
    outputs, blocks = scales.shape

    def numbers(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(outputs, -1)
        return np.stack([flat & 15, flat >> 4], -1).reshape(outputs, -1) if bits == 4 else flat

    stored = numbers(packed).reshape(outputs, blocks, BLOCK).astype(np.float32)
    zero = np.float32(128) if zero_points is None else numbers(zero_points)[:, :blocks, None].astype(np.float32)
    whole: np.ndarray = ((stored - zero) * scales[:, :, None]).reshape(outputs, -1)
    return whole[:, :inputs]


def _fp32_rows(weight: ir.TensorProtocol, stored_as_is: bool) -> tuple[Rows, int]:
    """Rows [outputs, inputs] of a matrix in fp32, and how many to ask for."""
    rows, step = by_rows(weight)
    if stored_as_is:
        return lambda first, end: convert(rows(first, end), ir.DataType.FLOAT), step
    count, outputs = (int(n) for n in weight.shape)
    # Stored the other way round: every block of outputs needs all rows.
    return lambda first, end: convert(rows(0, count)[:, first:end], ir.DataType.FLOAT).T, outputs


def _constant(x: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer of two axes in floating point."""
    tensor = None if x is None or not x.is_initializer() else x.const_value
    return tensor if tensor is not None and len(tensor.shape) == 2 and tensor.dtype.is_floating_point() else None


def _like(old: ir.Value) -> ir.Value:
    return ir.Value(type=old.type, shape=old.shape)


def _producer_of_logits(logits: ir.Value) -> ir.Node | None:
    """The product that makes the logits, behind what scales, caps, casts or reshapes them."""
    node = logits.producer()
    while node is not None and node.op_type not in ("Gemm", "MatMul"):
        # The first input that is computed: of a Reshape the data, of a Mul or Div whichever is no constant.
        node = next((x.producer() for x in node.inputs if x is not None and x.producer() is not None), None)
    return node

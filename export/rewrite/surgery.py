"""Surgery on a written graph for TensorRT, with onnx-graphsurgeon: what a 16-bit model computes in fp32.

TensorRT networks are strongly typed: what the file says is computed. Of a norm the parser makes single operations: that of
TensorRT-RTX 1.7 sums squares in fp32, as ONNX wants, and scales in the type of the input. What others do is not known, and
squares overflow in fp16: so the file says fp32. Weights are not read: graphsurgeon would hold every one of them twice.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir

FLOAT = onnx.TensorProto.FLOAT


def compute_norms_in_fp32(file: Path, dtype: ir.DataType) -> None:
    """Let the norms of a model of `dtype` compute in fp32, and its logits be fp32.

    The file is replaced; weights stay in the file beside it.
    """
    with gs.logger.G_LOGGER.suppress(gs.logger.G_LOGGER.ERROR):  # it warns that NumPy has no bfloat16
        graph = gs.import_onnx(onnx.load(file, load_external_data=False))
        for node in [node for node in graph.nodes if node.op == "RMSNormalization"]:
            node.inputs = [_cast(graph, tensor, FLOAT) for tensor in node.inputs]
            result = node.outputs[0]
            node.outputs = [gs.Variable(f"{result.name}.fp32", FLOAT, result.shape)]
            _cast(graph, node.outputs[0], dtype.value, result)
        logits = graph.outputs[0]
        logits.inputs[0].attrs["allowzero"] = 1  # of a Reshape; else TensorRT keeps room for a 0 that means another size
        wide = _cast(graph, logits, FLOAT)
        wide.name, logits.name, graph.outputs[0] = logits.name, f"{logits.name}.{dtype.short_name()}", wide
        onnx.save(gs.export_onnx(graph.cleanup(remove_unused_graph_inputs=False).toposort()), file)


def _cast(graph: gs.Graph, tensor: gs.Tensor, dtype: int, output: gs.Variable | None = None) -> gs.Variable:
    """`tensor` as `dtype`, an ONNX type, in `output` or a new variable."""
    output = output or gs.Variable(f"{tensor.name}.fp32", dtype, tensor.shape)
    graph.nodes.append(gs.Node("Cast", f"{output.name}.cast", {"to": dtype}, [tensor], [output]))
    return output

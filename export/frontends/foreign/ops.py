"""Foreign graphs in the terms of the normal form: fp32, standard ops where there are any, and its opset."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, ShapeInferencePass

from attnspan.export.graph import Recorder
from attnspan.export.ops import OPSET
from attnspan.export.weights import cast
from attnspan.planner.errors import UserError

SMALL = 1024  # elements; smaller tensors are converted at once
OLDEST = 13
CONVERTED_FROM = 18  # by onnxscript's converter
MICROSOFT = "com.microsoft"
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOAT = ir.DataType.FLOAT
TYPES = {"to", "dtype", "output_dtype", "softmax_precision"}
REDUCTIONS = {f"Reduce{x}" for x in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")}


def normalise(model: ir.Model) -> None:
    """Inline functions, widen to fp32, and bring the model to the normal form's opset, in place. Weights stay on disk.

    UserError when the opset is too old or too new, or a node runs parts of the graph on conditions.
    """
    version = model.graph.opset_imports.get("", 0)
    if not OLDEST <= version <= OPSET:
        raise UserError(f"the file is of opset {version}; allowed are {OLDEST} to {OPSET}: export it with another opset")
    if model.functions:
        InlinePass()(model)
    for node in model.graph:
        if any(x.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for x in node.attributes.values()):
            raise UserError(
                f"node {node.name!r} ({node.op_type}) runs a part of the graph on a condition; "
                "only graphs without branches and loops can be lifted (of models with long and short RoPE, export one)"
            )
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _widen(model)
    _standard_norms(model)
    if version < CONVERTED_FROM:
        _to_18(model)
    if version < OPSET:
        from onnxscript.version_converter import convert_version

        convert_version(model, OPSET)
        model.graph.opset_imports[""] = OPSET
    ShapeInferencePass()(model)


def _widen(model: ir.Model) -> None:
    """fp16 and bf16 become fp32, weights when they are read: ONNX Runtime computes in fp32 on CPUs."""
    graph = model.graph
    for x in (*graph.inputs, *graph.outputs, *graph.initializers.values(), *(x for node in graph for x in node.outputs)):
        if x.dtype in HALF:
            if x.const_value is not None:
                small = x.const_value.size < SMALL
                x.const_value = ir.tensor(x.const_value.numpy().astype(np.float32)) if small else cast(x.const_value, FLOAT)
            x.dtype = FLOAT
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in HALF:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype("float32")))
            elif name in TYPES and attribute.type == ir.AttributeType.INT and attribute.value in HALF:
                node.attributes[name] = ir.AttrInt64(name, int(FLOAT))


def _standard_norms(model: ir.Model) -> None:
    """ONNX Runtime's own root-mean-square norms become the standard op, with an Add before it for those that skip."""
    record = Recorder("norm")
    old = [x for x in model.graph if x.op_type in ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")]
    for node in old:
        skips = node.op_type.startswith("Skip")
        x, inputs = node.inputs[0], list(node.inputs)
        if skips:
            x = record.op("Add", inputs[0], inputs[1])
            if len(inputs) > 3 and inputs[3] is not None:
                x = record.op("Add", x, inputs[3])
        scale = inputs[2] if skips else inputs[1]
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else (1e-12 if skips else 1e-5)
        normed = record.op("RMSNormalization", x, scale, epsilon=epsilon)
        for i, new in ((0, normed), (3, x)):
            if i < len(node.outputs):
                _take_over(node.outputs[i], new)
    model.graph.extend(record.nodes)
    model.graph.remove(old, safe=False)
    _sort(model)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    if old.type is not None:
        new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _to_18(model: ir.Model) -> None:
    """What changed from opset 13 to 18 in ops of decoders: reductions take axes as an input, Split says how many parts."""
    graph = model.graph
    for node in graph:
        if node.domain != "":
            continue
        if node.op_type in REDUCTIONS and "axes" in node.attributes:
            axes = node.attributes.pop("axes").as_ints()
            constant = ir.Value(name=f"{node.outputs[0].name}.axes", const_value=ir.tensor(list(axes), dtype=ir.DataType.INT64))
            graph.register_initializer(constant)
            node.resize_inputs(2)
            node.replace_input_with(1, constant)
        elif node.op_type == "Split" and len(node.inputs) < 2:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    graph.opset_imports[""] = CONVERTED_FROM


def _sort(model: ir.Model) -> None:
    from onnx_ir.passes.common import TopologicalSortPass

    TopologicalSortPass()(model)

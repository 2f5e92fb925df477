"""A mixture of experts in standard ONNX: each expert computes the tokens that chose it, and no others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from attnspan.export.frontends.family import Experts
from attnspan.export.graph import Recorder

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def mixture(
    record: Recorder,
    x: ir.Value,
    router: ir.Value,
    experts: Experts,
    expert: Callable[[int, ir.Value], ir.Value],
    dtype: ir.DataType,
) -> ir.Value:
    """The weighted sum of the chosen experts' outputs, [tokens, features] as x, in `dtype`.

    router [tokens, experts]: logits. expert(number, some) computes one expert on some of the tokens, perhaps none.
    A graph has a few nodes for every expert: weights stay where they are, as gathering those of the chosen would copy them.
    """
    probability = record.op("Softmax", router if dtype == FLOAT else record.op("Cast", router, to=FLOAT), axis=-1)
    top = record.node("TopK", [probability, [experts.active]], [ir.Value(), ir.Value()], {"axis": -1})
    weight, chosen = top.outputs
    if experts.normalised:
        weight = record.op("Div", weight, record.op("ReduceSum", weight, [-1], keepdims=1))

    # [experts, tokens]: who is chosen, in the order in which NonZero lists the pairs, expert by expert.
    shape = record.op("Shape", probability)
    zeros = record.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.float32)))
    table = record.op("Transpose", record.op("ScatterElements", zeros, chosen, weight, axis=1), perm=[1, 0])
    ones = record.op("ConstantOfShape", record.op("Shape", chosen), value=ir.tensor(np.ones(1, np.int64)))
    none = record.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.int64)))
    hit = record.op("Transpose", record.op("ScatterElements", none, chosen, ones, axis=1), perm=[1, 0])
    pairs = record.op("Transpose", record.op("NonZero", hit), perm=[1, 0])  # [tokens * active, 2]
    token = record.op("Slice", pairs, [1], [2], [1])

    counts = record.op("ReduceSum", hit, [1], keepdims=0)
    some = [ir.Value() for _ in range(experts.count)]
    record.node("Split", [record.op("GatherND", x, token), counts], some, {"axis": 0})
    outputs = record.op("Concat", *(expert(number, part) for number, part in enumerate(some)), axis=0)
    factor = record.op("Unsqueeze", record.op("GatherND", table, pairs), [1])
    weighted = record.op("Mul", outputs, factor if dtype == FLOAT else record.op("Cast", factor, to=dtype))
    start = record.op("ConstantOfShape", record.op("Shape", x), value=ir.tensor(np.zeros(1, dtype.numpy())))
    return record.op("ScatterND", start, token, weighted, reduction="add")

"""Some heads of an activation, and all of them again: for layers with more than one attention op. Weights stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from attnspan.export.graph import Recorder


def pick(record: Recorder, x: ir.Value, heads: Sequence[int], dim: int, output: ir.Value) -> ir.Value:
    """Those heads of `x` [batch, tokens, heads * dim], in that order."""
    by_head = record.op("Reshape", x, [0, 0, -1, dim])
    return record.op("Reshape", record.op("Gather", by_head, list(heads), axis=2), [0, 0, len(heads) * dim], output=output)


def join(record: Recorder, parts: Sequence[tuple[ir.Value, Sequence[int]]], dim: int, output: ir.Value) -> ir.Value:
    """The activation of which `parts` are (some heads, their numbers), every head in its place again."""
    order = [head for _, heads in parts for head in heads]
    if order == sorted(order):
        return record.op("Concat", *(x for x, _ in parts), axis=-1, output=output)
    joined = record.op("Concat", *(x for x, _ in parts), axis=-1)
    places = sorted(range(len(order)), key=order.__getitem__)
    return pick(record, joined, places, dim, output)

"""What every rewrite does: from the normal form to a graph that counts lengths and keeps caches of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from attnspan.export.graph import WINDOW, Recorder, value
from attnspan.planner.plan import Plan

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64


class Rewriter(Recorder):
    """Replaces the attentions of a normal form one by one; a subclass says by what, in `layer`.

    Inputs of the graph afterwards: `input_ids` [batch, sequence] int64; `length` [batch] int32, tokens already cached in each
    row; `span` [layers, batch, kv_heads] int32, spans in force, sinks included; `logits_to_keep` [1] int64; the pasts. Outputs:
    `logits` [batch, kept, vocab]; each past's present.
    """

    opsets: ClassVar[Mapping[str, int]] = {}
    """Domains of the new nodes, other than the standard one, with their versions."""

    def __init__(self, plan: Plan, cache_dtype: ir.DataType, name: str) -> None:
        """`name`: the graph's, with which names of constants start."""
        super().__init__(name)
        self.plan, self.cache_dtype = plan, cache_dtype
        self.length = value("length", INT32, ["batch"])
        self.span = value("span", INT32, ["layers", "batch", plan.model.kv_heads])
        self.pasts: list[ir.Value] = []
        self.presents: list[ir.Value] = []

    def layer(self, i: int, old: ir.Node) -> ir.Value:
        """What takes the place of the output of `old`, the attention of layer i."""
        raise NotImplementedError

    def caches(self, shapes: Mapping[str, tuple[ir.DataType, Sequence[int | str]]]) -> tuple[list[ir.Value], list[ir.Value]]:
        """Inputs `past_{name}` and outputs `present_{name}` of the graph, of those types and shapes."""
        past, present = ([value(f"{when}_{name}", *of) for name, of in shapes.items()] for when in ("past", "present"))
        self.pasts += past
        self.presents += present
        return past, present

    def positions(self, ids: ir.Value) -> ir.Value:
        """length, length + 1, ...: every row counts on from what it has cached, int64 [batch, sequence]."""
        sequence = self.op("Squeeze", self.op("Shape", ids, start=1))
        steps = self.op("Range", np.array(0), sequence, np.array(1))
        first = self.op("Unsqueeze", self.op("Cast", self.length, to=INT64), [1])
        return self.op("Add", first, steps)

    def prepare(self, position: ir.Value) -> None:
        """Called once, before the first layer, with the positions of the new tokens, int64 [batch, sequence]."""

    def rewrite(self, model: ir.Model) -> None:
        """Turn a normal form into the new form, in place.

        ValueError when the graph is not a normal form with one attention per layer of the plan, or a layer of the model slides
        and the plan does not say so (see `planner.windows.limit_plan`).
        """
        graph = model.graph
        attentions = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
        names = [f"layers.{i}.attention" for i in range(self.plan.model.layers)]
        if [node.name for node in attentions] != names:
            raise ValueError(f"{len(attentions)} attentions in the graph, {len(names)} layers in the plan")
        for i, node in enumerate(attentions):
            window = int(node.metadata_props.get(WINDOW, self.plan.n_max))
            if self.plan.limits[i] > window < self.plan.n_max:
                raise ValueError(f"layer {i} has a window of {window} tokens, the plan has {self.plan.limits[i]}")

        given = {x.name: x for x in graph.inputs}
        position = self.positions(given["input_ids"])
        given["position_ids"].replace_all_uses_with(position)
        self.prepare(position)
        for i, node in enumerate(attentions):
            node.outputs[0].replace_all_uses_with(self.layer(i, node))

        graph.inputs[:] = [given["input_ids"], self.length, self.span, given["logits_to_keep"], *self.pasts]
        graph.outputs[:] = [graph.outputs[0], *self.presents]
        graph.remove(attentions, safe=True)
        graph.extend(self.nodes)
        for initializer in self.initializers.values():
            graph.register_initializer(initializer)
        graph.name = self.prefix
        graph.opset_imports.update(self.opsets)
        for clean in (RemoveUnusedNodesPass(), TopologicalSortPass()):
            clean(model)

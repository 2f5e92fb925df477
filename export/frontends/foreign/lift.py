"""Surgery on foreign graphs: recognised attentions become those of the normal form, and its inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass, TopologicalSortPass

from attnspan.export.frontends.build import END
from attnspan.export.frontends.foreign.core import Core, Rotary
from attnspan.export.frontends.foreign.probe import HEAVY, BlockedError, Probe, Sizes
from attnspan.export.graph import Recorder, value
from attnspan.export.ops import IR_VERSION
from attnspan.planner.errors import UserError

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
HEADS_TO_TOKENS = (0, 2, 1, 3)
PROBES = (Sizes(6, 5), Sizes(9, 4))
UNCACHED = (Sizes(0, 5), Sizes(0, 4))
LOGIT_OPS = {"Cast", "Mul", "Div", "Add", "Sub", "Tanh", "Identity"}  # of one position each, when all but one input is constant


def find_positions(probe: Probe, logits: ir.Value, cores: list[Core], cached: bool) -> dict[ir.Value, tuple[int, int]]:
    """Values that are positions, with their rank and the axis of the tokens: every row is to count them on its own.

    Without them the graph must not ask for lengths. They are found by what they are: [1, ..., new], counting up from the first
    new token. UserError when the graph depends on lengths or masks in another way.
    """
    live = _live(logits, cores)
    foreign = {x for x, role in probe.roles.items() if role not in ("input_ids", "position_ids")}
    tainted = _depending(live, foreign)
    found = {x: (2, 1) for x, role in probe.roles.items() if role == "position_ids"}
    if cached and not tainted:
        return found
    if cached or not found:
        probes = PROBES if cached else UNCACHED
        for x in (x for node in live for x in node.outputs if node.op_type not in HEAVY and x.name):
            axes = _position_axes(probe, x, probes) if not cached or x in tainted else None
            if axes is not None:
                found[x] = axes
    left = _depending(_live(logits, cores, cut=found), foreign)
    if left:
        node = next(iter(left.values()))
        raise UserError(
            f"node {node.name!r} ({node.op_type}) depends on the length of the cache or on the mask; "
            "only positions and attention masks may"
        )
    if not found:
        raise UserError("the graph has no positions that follow from its inputs; export it with the input position_ids")
    return found


def take_batch_from_ids(probe: Probe) -> None:
    """Where the graph reads the batch off a cache or mask, let it read it off input_ids: that one stays as it is."""
    ids = next(x for x, role in probe.roles.items() if role == "input_ids")
    record = Recorder("batch")
    batch = record.op("Shape", ids, start=0, end=1)
    scalar = record.op("Squeeze", batch)
    replaced = 0
    for x, role in probe.roles.items():
        shapes = [use.node for use in x.uses() if use.node.op_type == "Shape"] if role in ("past", "attention_mask") else []
        for node in shapes:
            start, end = (node.attributes[k].as_int() if k in node.attributes else None for k in ("start", "end"))
            if start in (None, 0) and end == 1:
                node.outputs[0].replace_all_uses_with(batch)
                replaced += 1
            elif start in (None, 0):
                for use in list(node.outputs[0].uses()):
                    index = ir.convenience.get_const_tensor(use.node.inputs[1]) if use.node.op_type == "Gather" else None
                    if index is not None and index.size == 1 and int(index.numpy().reshape(())) == 0:
                        use.node.outputs[0].replace_all_uses_with(scalar if index.numpy().ndim == 0 else batch)
                        replaced += 1
    if replaced:
        first = next(iter(probe.graph))
        probe.graph.insert_before(first, record.nodes)
        probe.number()


def _position_axes(probe: Probe, x: ir.Value, probes: Iterable[Sizes]) -> tuple[int, int] | None:
    """Rank and axis of the tokens of a value that is [1, ..., new] positions at all these sizes, else None."""
    axes = None
    for sizes in probes:
        try:
            (got,) = probe([x], sizes, {})
        except BlockedError:
            return None
        if got.ndim < 2 or got.shape[0] != 1 or got.size != sizes.new or got.dtype.kind not in "if":
            return None
        if not np.array_equal(got.reshape(-1), sizes.positions):
            return None
        axes = got.ndim, got.shape.index(sizes.new)
    return axes


def _live(logits: ir.Value, cores: list[Core], cut: Iterable[ir.Value] = ()) -> list[ir.Node]:
    """Nodes that the logits need once the attentions are lifted and the values in `cut` are given."""
    replaced = {core.output: core for core in cores}
    cut = set(cut)
    todo, seen = [logits], {logits}
    nodes: list[ir.Node] = []
    while todo:
        x = todo.pop()
        core, node = replaced.get(x), x.producer()
        if x in cut or (core is None and node is None):
            continue
        if core is not None:
            inputs = [core.query, core.key, core.value]
        else:
            assert node is not None
            nodes.append(node)
            inputs = list(node.inputs)
        for y in inputs:
            if y is not None and y not in seen:
                seen.add(y)
                todo.append(y)
    return nodes


def _depending(nodes: list[ir.Node], sources: set[ir.Value]) -> dict[ir.Value, ir.Node]:
    """Values among the outputs of `nodes` that follow from `sources`, and the nodes that use those sources first."""
    members = set(nodes)
    found: dict[ir.Value, ir.Node] = {}
    todo = list(sources)
    while todo:
        for use in todo.pop().uses():
            if use.node in members:
                for x in use.node.outputs:
                    if x not in found:
                        found[x] = use.node
                        todo.append(x)
    return found


class Lifter(Recorder):
    """Writes the normal form into a foreign graph, in place. All checks are done before."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__("lift")
        self.model = model
        self.positions = value("position_ids", INT64, ["batch", "sequence"])
        self.keep = value("logits_to_keep", INT64, [1])
        self.tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] = {}
        self.annotated: set[ir.Value] = set()

    def lift(self, cores: list[Core], positions: dict[ir.Value, tuple[int, int]], logits: ir.Value) -> None:
        """Replace all `cores`, in the order of the layers, what `find_positions` found, and the inputs and outputs."""
        graph = self.model.graph
        ids = next(x for x in graph.inputs if x.name == "input_ids")
        for old, (rank, axis) in positions.items():
            self.replace_positions(old, rank, axis)
        pasts: list[ir.Value] = []
        presents: list[ir.Value] = []
        for i, core in enumerate(cores):
            shape: list[int | str] = ["batch", core.kv_heads, "past", core.dim]
            past = [value(f"past_{kind}.{i}", FLOAT, shape) for kind in ("key", "value")]
            shape = ["batch", core.kv_heads, "total", core.dim]
            present = [value(f"present_{kind}.{i}", FLOAT, shape) for kind in ("key", "value")]
            self.attention(i, core, past, present)
            pasts += past
            presents += present
        logits = self.keep_last(logits)

        graph.inputs[:] = [self.input_ids(ids), self.positions, self.keep, *pasts]
        graph.outputs[:] = [logits, *presents]
        graph.extend(self.nodes)
        for initializer in self.initializers.values():
            graph.register_initializer(initializer)
        graph.name = "normal_form"
        self.model.ir_version = IR_VERSION
        for clean in (TopologicalSortPass(), RemoveUnusedNodesPass(), ClearMetadataAndDocStringPass()):
            clean(self.model)
        for node in graph:
            for x in node.outputs:
                if x not in self.annotated and x is not logits and x not in presents:
                    x.shape = None  # its symbols are those of the old inputs
        used = {node.domain for node in graph}
        for domain in [x for x in graph.opset_imports if x not in used]:
            del graph.opset_imports[domain]

    def input_ids(self, old: ir.Value) -> ir.Value:
        """The input of that name in int64."""
        old.shape = ir.Shape(["batch", "sequence"])
        if old.dtype == INT64:
            return old
        new = value("input_ids", INT64, ["batch", "sequence"])
        cast = self.op("Cast", new, to=old.dtype)
        old.replace_all_uses_with(cast)
        return new

    def replace_positions(self, old: ir.Value, rank: int, axis: int) -> None:
        """`old`, positions of one row with the tokens at `axis`, becomes those of every row."""
        new = self.positions
        if rank > 2:
            new = self.op("Unsqueeze", new, [i for i in range(1, rank) if i != axis])
        if old.dtype not in (None, INT64):
            new = self.op("Cast", new, to=old.dtype)
        old.replace_all_uses_with(new)

    def attention(self, i: int, core: Core, past: list[ir.Value], present: list[ir.Value]) -> None:
        """The attention of layer i in normal form, in the place of `core`."""
        sizes = [core.heads * core.dim, core.kv_heads * core.dim, core.kv_heads * core.dim]
        if core.key is None or core.value is None:
            parts = [ir.Value() for _ in sizes]
            self.node("Split", [core.query, sizes], parts, {"axis": -1})
        else:
            parts = [core.query, core.key, core.value]
        heads = (core.heads, core.kv_heads, core.kv_heads)
        inputs = []
        for kind, x, count, size in zip(("query", "key", "value"), parts, heads, sizes, strict=True):
            out = self.annotate(value(f"layers.{i}.{kind}", FLOAT, ["batch", "sequence", size]))
            rotary = core.rotary if kind != "value" else None
            if not core.flat:
                inputs.append(self.flatten(x, size, out))
            elif rotary is not None:
                inputs.append(self.rotate(x, rotary, count, out))
            else:
                inputs.append(self.op("Identity", x, output=out))
        mixed = self.annotate(value(f"layers.{i}.attention.output", FLOAT, ["batch", "sequence", sizes[0]]))
        attributes = {"is_causal": 1, "q_num_heads": core.heads, "kv_num_heads": core.kv_heads, "scale": float(core.scale)}
        if core.softcap:
            attributes["softcap"] = float(core.softcap)
        self.node("Attention", [*inputs, None, *past], [mixed, *present], attributes, name=f"layers.{i}.attention")
        self.put(core, mixed)

    def annotate(self, x: ir.Value) -> ir.Value:
        """Note that the shape of `x` is in the terms of the normal form."""
        self.annotated.add(x)
        return x

    def rotate(self, x: ir.Value, rotary: Rotary, heads: int, out: ir.Value) -> ir.Value:
        """RoPE of [batch, tokens, heads * dim] by tables."""
        tables = (rotary.cos, rotary.sin)
        if tables not in self.tables:
            cos, sin = (self.op("Gather", table, self.positions, axis=0) for table in tables)
            self.tables[tables] = cos, sin
        half = int(rotary.cos.shape[1])
        attributes = {"num_heads": heads, "rotary_embedding_dim": 2 * half, "interleaved": rotary.interleaved}
        return self.op("RotaryEmbedding", x, *self.tables[tables], output=out, **attributes)

    def flatten(self, x: ir.Value, size: int, out: ir.Value) -> ir.Value:
        """[batch, heads, tokens, dim] to [batch, tokens, heads * dim]; a transposition that was there is undone instead."""
        node = x.producer()
        if node is not None and node.op_type == "Transpose" and _perm(node) == HEADS_TO_TOKENS:
            by_token = node.inputs[0]
        else:
            by_token = self.op("Transpose", x, perm=HEADS_TO_TOKENS)
        return self.op("Reshape", by_token, [0, 0, size], output=out)

    def put(self, core: Core, mixed: ir.Value) -> None:
        """`mixed` [batch, tokens, heads * dim] takes the place of what the old attention gave."""
        if core.flat:
            core.output.replace_all_uses_with(mixed)
            return
        by_token = self.op("Reshape", mixed, [0, 0, core.heads, core.dim])
        for use in list(core.output.uses()):
            if use.node.op_type == "Transpose" and _perm(use.node) == HEADS_TO_TOKENS:
                use.node.outputs[0].replace_all_uses_with(by_token)
        if core.output.uses():
            core.output.replace_all_uses_with(self.op("Transpose", by_token, perm=HEADS_TO_TOKENS))

    def keep_last(self, logits: ir.Value) -> ir.Value:
        """Logits [batch, kept, vocab] of the last positions: cut before the product with the vocabulary, where it is found."""
        vocab = logits.shape[-1] if logits.shape is not None else None
        node = logits.producer()
        while node is not None and node.op_type in LOGIT_OPS:
            varying = [x for x in node.inputs if x is not None and ir.convenience.get_const_tensor(x) is None]
            if len(varying) != 1:
                break
            node = varying[0].producer()
        hidden = node.inputs[0] if node is not None and node.op_type in ("MatMul", "MatMulNBits") else None
        if node is not None and hidden is not None and hidden.const_value is None and len(logits.shape or ()) == 3:
            node.replace_input_with(0, self.last(hidden))
            out = logits
        else:
            out = self.last(logits)
        logits.name = "logits.all" if out is not logits else "logits"
        if out.dtype is not None and out.dtype != FLOAT:
            out = self.op("Cast", out, to=FLOAT)
        out.name, out.dtype, out.shape = "logits", FLOAT, ir.Shape(["batch", "kept", vocab or "vocab"])
        return out

    def last(self, x: ir.Value) -> ir.Value:
        """The last positions of [batch, tokens, features]."""
        return self.op("Slice", x, self.op("Neg", self.keep), [END], [1])


def _perm(node: ir.Node) -> tuple[int, ...]:
    perm = node.attributes.get("perm")
    return tuple(perm.as_ints()) if perm is not None else ()

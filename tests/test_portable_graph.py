"""The `portable` form of one layer on stock ONNX Runtime, against attention over the whole text in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from attnspan.export.graph import Recorder, value
from attnspan.export.ops import IR_VERSION, OPSET
from attnspan.export.rewrite.portable import rewrite_portable
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.portable import chunks, portable_parts
from attnspan.planner.rules import SINK, HeadRule

DIM, SCALE = 20, 0.3
NARROW, WIDE, ELASTIC, DENSE = (
    HeadRule("span", 128, 0.0),
    HeadRule("span", 320, 0.0),
    HeadRule("span", 30, 0.4),
    HeadRule("dense"),
)
Array = NDArray[Any]


def normal_form(plan: Plan, tables: list[Array], softcap: float = 0.0) -> ir.Model:
    """One attention whose query, key and value are rows of `tables`; its logits are its output and the tokens' positions."""
    record = Recorder("test")
    heads, kv_heads = plan.model.heads, plan.model.kv_heads
    ids, positions = (value(name, ir.DataType.INT64, ["batch", "sequence"]) for name in ("input_ids", "position_ids"))
    keep = value("logits_to_keep", ir.DataType.INT64, [1])
    qkv = [record.op("Gather", table, ids) for table in tables]
    for x, table in zip(qkv, tables, strict=True):
        x.dtype, x.shape = ir.DataType.FLOAT, ir.Shape(["batch", "sequence", table.shape[1]])
    caches = [
        [value(f"{w}_{kind}.0", ir.DataType.FLOAT, ["batch", kv_heads, w, DIM]) for kind in "kv"] for w in ("past", "total")
    ]
    mixed = value("mixed", ir.DataType.FLOAT, ["batch", "sequence", heads * DIM])
    attributes = {"is_causal": 1, "q_num_heads": heads, "kv_num_heads": kv_heads, "scale": SCALE}
    attributes |= {"softcap": softcap} if softcap else {}
    record.node("Attention", [*qkv, None, *caches[0]], [mixed, *caches[1]], attributes, name="layers.0.attention")
    at = record.op("Cast", record.op("Unsqueeze", positions, [-1]), to=ir.DataType.FLOAT)
    logits = value("logits", ir.DataType.FLOAT, ["batch", "sequence", heads * DIM + 1])
    record.op("Concat", mixed, at, axis=-1, output=logits)
    graph = ir.Graph(
        [ids, positions, keep, *caches[0]],
        [logits, *caches[1]],
        nodes=record.nodes,
        initializers=list(record.initializers.values()),
        opset_imports={"": OPSET},
        name="normal_form",
    )
    return ir.Model(graph, ir_version=IR_VERSION)


def whole_text(q: Array, k: Array, v: Array, spans: Array, sink: int, softcap: float) -> Array:
    """Attention of every token of one text, [tokens, heads * dim]; spans [tokens, kv_heads] of each query."""
    tokens, kv_heads = spans.shape
    q, k, v = (x.reshape(tokens, -1, DIM).astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // kv_heads
    at = np.arange(tokens)
    output = np.empty_like(q)
    for head in range(q.shape[1]):
        h = head // group
        distance = at[:, None] - at
        seen = (distance >= 0) & ((at < sink) | (distance < spans[:, h, None] - sink))
        score = SCALE * q[:, head] @ k[:, h].T
        score = np.where(seen, softcap * np.tanh(score / softcap) if softcap else score, -np.inf)
        weight = np.exp(score - score.max(1, keepdims=True))
        output[:, head] = weight / weight.sum(1, keepdims=True) @ v[:, h]
    return output.reshape(tokens, -1)


class Rows:
    """Rows of different lengths that one model runs, and what they should have computed."""

    def __init__(
        self,
        rules: list[HeadRule],
        n_max: int,
        chunk: int,
        group: int,
        rows: int,
        cache: ir.DataType = ir.DataType.FLOAT,
        window: int | None = None,
        softcap: float = 0.0,
    ) -> None:
        rng = np.random.default_rng(chunk)
        kv_heads = len(rules)
        shape = ModelShape("tiny", 1, group * kv_heads, kv_heads, DIM, None)
        self.plan = Plan(shape, n_max, [rules], windows=(window,))
        self.chunk, self.rows, self.softcap = chunk, rows, softcap
        widths = (group * kv_heads * DIM, kv_heads * DIM, kv_heads * DIM)
        # Keys so long that a token too many, or one that is missing, shows.
        sizes = ((1, widths[0]), (2, widths[1]), (1, widths[2]))
        self.tables = [rng.normal(0, size, (rows * n_max, width)).astype(np.float32) for size, width in sizes]
        model = normal_form(self.plan, self.tables, softcap)
        rewrite_portable(model, self.plan, cache, chunk)
        self.proto = ir.to_proto(model)
        onnx.checker.check_model(self.proto, full_check=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(self.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.caches = {
            f"past_{kind}.{part.name}": np.zeros((rows, *part.cache_shape(DIM)), cache.numpy())
            for part in portable_parts(self.plan, chunk)
            for kind in ("key", "value")
        }
        self.length = np.zeros(rows, np.int32)
        self.spans: list[list[Array]] = [[] for _ in range(rows)]
        self.got: list[list[Array]] = [[] for _ in range(rows)]

    def run(self, rows: slice, tokens: int, spans: Array) -> None:
        """Feed the next `tokens` tokens of some rows; spans [rows, kv_heads]."""
        first = self.length[rows]
        start = np.arange(self.rows)[rows, None] * self.plan.n_max
        feeds = {
            "input_ids": start + first[:, None].astype(np.int64) + np.arange(tokens),
            "length": first,
            "span": spans[None].astype(np.int32),
            "logits_to_keep": np.ones(1, np.int64),  # this graph gives all
        }
        logits, *presents = self.session.run(None, feeds | {name: cache[rows] for name, cache in self.caches.items()})
        names = [x.name for x in self.session.get_outputs()[1:]]
        for name, present in zip(names, presents, strict=True):
            self.caches[name.replace("present", "past")][rows] = present
        np.testing.assert_array_equal(logits[..., -1], first[:, None] + np.arange(tokens))
        for i, row in enumerate(range(self.rows)[rows]):
            self.got[row].append(logits[i, :, :-1])
            self.spans[row] += [spans[i]] * tokens
        self.length[rows] += tokens

    def prefill(self, row: int, total: int, most: int) -> None:
        """Append a prompt to a row, in chunks, with the spans of its whole length."""
        spans = self.plan.spans(int(self.length[row]) + total)
        for start, end in chunks(int(self.length[row]), total, most, self.chunk, SINK):
            self.run(slice(row, row + 1), end - start, spans)

    def decode(self, steps: int) -> None:
        """Append tokens to all rows, one at a time."""
        for _ in range(steps):
            spans = np.concatenate([self.plan.spans(int(n) + 1) for n in self.length])
            self.run(slice(0, self.rows), 1, spans)

    def check(self, atol: float, stored: Any = np.float32) -> None:
        """Compare everything so far."""
        for row in range(self.rows):
            text = slice(row * self.plan.n_max, row * self.plan.n_max + int(self.length[row]))
            q, k, v = (table[text] for table in self.tables)
            sink = self.plan.sinks[0]
            expected = whole_text(q, k.astype(stored), v.astype(stored), np.array(self.spans[row]), sink, self.softcap)
            np.testing.assert_allclose(np.concatenate(self.got[row]), expected, atol=atol)


@pytest.mark.parametrize(
    ("rules", "chunk", "group", "n_max"),
    [
        ([NARROW], 1, 1, 300),
        ([WIDE, NARROW, WIDE, DENSE, ELASTIC], 100, 2, 701),
        ([ELASTIC, ELASTIC], 37, 3, 640),
        ([NARROW, ELASTIC], 256, 1, 1024),
        ([DENSE, DENSE], 64, 2, 333),
    ],
)
def test_against_the_whole_text(rules: list[HeadRule], chunk: int, group: int, n_max: int) -> None:
    """Rows of unequal length, prompts after prompts, steps past the rings' ends, up to n_max."""
    rows = Rows(rules, n_max, chunk, group, 3)
    rows.prefill(0, n_max * 3 // 5, chunk)
    rows.prefill(1, 65, max(chunk // 2, 1))
    rows.prefill(2, 1, chunk)
    rows.decode(20)
    rows.prefill(1, n_max // 3, chunk)
    rows.decode(n_max - int(rows.length.max()))
    assert rows.length.max() == n_max
    rows.check(2e-5)


def test_a_narrower_cache_is_seen_as_it_is_stored() -> None:
    rows = Rows([NARROW, WIDE], 500, 64, 2, 1, ir.DataType.FLOAT16)
    rows.prefill(0, 450, 64)
    rows.decode(20)
    rows.check(2e-5, np.float16)


@pytest.mark.parametrize("window", [1, 50, 200, 1000])
def test_a_layer_that_slides(window: int) -> None:
    """It has no sinks, and may be capped."""
    rows = Rows([NARROW, DENSE, NARROW], 500, 48, 2, 2, window=window, softcap=3.0)
    rows.prefill(0, 400, 48)
    rows.prefill(1, 30, 48)
    rows.decode(60)
    rows.check(2e-5)


def test_a_span_is_cut_to_the_capacity() -> None:
    """More would see what the room for chunks still holds, which depends on how the text is cut."""
    outputs = []
    for wanted in (128, 500):
        rows = Rows([NARROW], 600, 64, 1, 1)
        for start, end in chunks(0, 500, 64, 64, SINK):
            rows.run(slice(0, 1), end - start, np.array([[wanted]]))
        outputs.append(np.concatenate(rows.got[0]))
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_only_standard_ops_are_left() -> None:
    proto = Rows([NARROW, WIDE], 500, 64, 2, 1).proto
    assert [(x.domain, x.version) for x in proto.opset_import] == [("", 24)]
    assert not proto.functions
    ops = [node.op_type for node in proto.graph.node]
    assert (ops.count("TensorScatter"), ops.count("Attention")) == (4, 2)
    assert all(len(node.output) == 1 for node in proto.graph.node)
    types = {x.name: x.type.tensor_type for x in [*proto.graph.input, *proto.graph.output]}
    for kind in ("past_key.0", "past_value.0.1", "present_key.0", "present_value.0.1"):
        slots = 64 + 128 if kind.endswith(".0") else 64 + 320
        assert [d.dim_value or d.dim_param for d in types[kind].shape.dim] == ["batch", 1, slots, DIM]


def test_a_graph_of_other_layers_is_refused() -> None:
    plan = Plan(ModelShape("tiny", 2, 1, 1, DIM, None), 300, [[NARROW], [NARROW]])
    model = normal_form(plan, [np.zeros((1, DIM), np.float32)] * 3)
    with pytest.raises(ValueError, match="1 attentions in the graph, 2 layers in the plan"):
        rewrite_portable(model, plan, ir.DataType.FLOAT, 64)

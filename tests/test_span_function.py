"""SpanAttention's function body on stock ONNX Runtime against the NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import span_op
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from reference import span_attention_reference

from attnspan.export.ops import DOMAIN, IR_VERSION, OPSET, SPAN_ATTENTION, VERSION, register_schemas
from attnspan.export.span_function import SpanAttention

DIM = 8


def session(heads: int, capacity: list[int], activation: Any, cache: Any, **attributes: Any) -> ort.InferenceSession:
    """One SpanAttention node and its body; no op library."""
    kv_heads, slots = len(capacity), sum(capacity)
    shapes = {
        "query": ["batch", "tokens", heads * DIM],
        "key": ["batch", "tokens", kv_heads * DIM],
        "value": ["batch", "tokens", kv_heads * DIM],
        "past_key": ["batch", slots, DIM],
        "past_value": ["batch", slots, DIM],
        "length": ["batch"],
        "span": ["batch", kv_heads],
        "output": ["batch", "tokens", heads * DIM],
        "present_key": ["batch", slots, DIM],
        "present_value": ["batch", slots, DIM],
        "lse": ["batch", heads, "tokens"],
    }
    types = [activation] * 3 + [cache] * 2 + [np.int32] * 2 + [activation] + [cache] * 2 + [np.float32]
    values = [
        helper.make_tensor_value_info(name, span_op.ONNX_TYPE[np.dtype(kind)], shape)
        for (name, shape), kind in zip(shapes.items(), types, strict=True)
    ]
    names = list(shapes)
    attributes |= {"num_heads": heads, "kv_num_heads": kv_heads, "capacity": capacity}
    node = helper.make_node(SPAN_ATTENTION.name, names[:7], names[7:], domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "one_node", values[:7], values[7:])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    body = SpanAttention.to_function_proto()
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=IR_VERSION)
    register_schemas()
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check(
    capacity: list[int],
    span: list[list[int]],
    length: list[int],
    chunks: list[int],
    group: int = 2,
    sink: int = 4,
    activation: Any = np.float32,
    cache: Any = np.float32,
    tolerance: float = 2e-6,
    **attributes: float,
) -> None:
    """Feed chunks one after another; outputs within tolerance of the reference, caches equal to the bit."""
    rng, batch, kv_heads = np.random.default_rng(0), len(length), len(capacity)
    heads = group * kv_heads
    runner = session(heads, capacity, activation, cache, sink=sink, **attributes)
    past = [rng.standard_normal((batch, sum(capacity), DIM)).astype(cache) for _ in range(2)]
    at = np.array(length, np.int32)
    for tokens in chunks:
        query = rng.standard_normal((batch, tokens, heads * DIM)).astype(activation)
        key, value = (rng.standard_normal((batch, tokens, kv_heads * DIM)).astype(activation) for _ in range(2))
        feeds = dict(zip(span_op.INPUTS, [query, key, value, *past, at, np.array(span, np.int32)], strict=False))
        want_output, *want_present, want_lse = span_attention_reference(**feeds, capacity=capacity, sink=sink, **attributes)
        got = span_op.run(runner, feeds, in_place=False)
        np.testing.assert_allclose(got["output"].astype(np.float64), want_output, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(got["lse"], want_lse, rtol=2e-6, atol=2e-6)
        for name, want in zip(("present_key", "present_value"), want_present, strict=True):
            np.testing.assert_array_equal(got[name].view(np.uint8), want.view(np.uint8))
        past, at = want_present, at + np.int32(tokens)


@pytest.mark.parametrize(
    ("cache", "activation", "tolerance"),
    [
        (np.float32, np.float32, 2e-6),
        (np.float16, np.float32, 2e-6),
        (span_op.bfloat16, np.float32, 2e-6),
        (np.float16, np.float16, 1e-3),
    ],
    ids=str,
)
def test_types(cache: Any, activation: Any, tolerance: float) -> None:
    """Ragged rows: empty, within the sinks, a ring about to wrap; a chunk longer than every ring."""
    span = [[9, 20, 5], [12, 5, 12], [12, 9, 11]]
    check([12, 20, 12], span, [0, 3, 11], [2, 1, 30, 1], activation=activation, cache=cache, tolerance=tolerance)


@pytest.mark.parametrize("attributes", [{"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.5, "softcap": 0.5}], ids=str)
def test_attributes(attributes: dict[str, float]) -> None:
    check([12, 16], [[9, 16]], [5], [3, 20, 1], **attributes)


def test_span_below_the_sinks_still_sees_the_query_itself() -> None:
    check([12, 16], [[0, 5]], [40], [3, 1])


def test_a_span_over_the_capacity_sees_everything_while_nothing_has_left_the_ring() -> None:
    for chunks in ([40], [1]):
        check([12, 16], [[100, 100], [13, 100]], [0, 12], chunks)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_shape(data: st.DataObject) -> None:
    sink = data.draw(st.integers(0, 6), "sink")
    capacity = data.draw(st.lists(st.integers(sink + 1, sink + 20), min_size=1, max_size=3), "capacity")
    batch = data.draw(st.integers(1, 3), "batch")
    span = [[data.draw(st.integers(sink + 1, c)) for c in capacity] for _ in range(batch)]
    length = data.draw(st.lists(st.integers(0, 60), min_size=batch, max_size=batch), "length")
    chunks = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3), "chunks")
    check(capacity, span, length, chunks, group=data.draw(st.integers(1, 3), "group"), sink=sink)

"""LshAttention's function body on stock ONNX Runtime: exact attention over everything, against the NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import span_op
from onnx import TensorProto, helper, numpy_helper
from reference import span_attention_reference

from attnspan.export.lsh_function import LshAttention
from attnspan.export.ops import DOMAIN, IR_VERSION, LSH_ATTENTION, OPSET, VERSION, register_schemas
from attnspan.planner.lsh import projection, signs

DIM, CAPACITY, BYTES = 8, 64, 192
INDEXES: dict[str, dict[str, Any]] = {
    "exact": {},
    "sketch": {"fraction": 0.1},
    "signature": {"signature_bits": 64, "max_hamming": [20, 30]},
    "tables": {"bits": 3, "tables": 10, "min_collisions": 2},
}


def session(index: str, cache: Any, with_lse: bool = True, **attributes: Any) -> ort.InferenceSession:
    """One LshAttention node, 4 query heads on 2 KV heads, and its body; no op library."""
    shapes = {
        "query": ["batch", "tokens", 4 * DIM],
        "key": ["batch", "tokens", 2 * DIM],
        "value": ["batch", "tokens", 2 * DIM],
        "past_kv": ["batch", 2 * CAPACITY, 2 * DIM],
        "past_state": ["batch", BYTES],
        "length": ["batch"],
        "output": ["batch", "tokens", 4 * DIM],
        "present_kv": ["batch", 2 * CAPACITY, 2 * DIM],
        "present_state": ["batch", BYTES],
        "lse": ["batch", 4, "tokens"],
    }
    kinds = [np.float32] * 3 + [cache, np.uint8, np.int32, np.float32, cache, np.uint8, np.float32]
    onnx_types = span_op.ONNX_TYPE | {np.dtype(np.uint8): TensorProto.UINT8}
    values = [
        helper.make_tensor_value_info(name, onnx_types[np.dtype(kind)], shape)
        for (name, shape), kind in zip(shapes.items(), kinds, strict=True)
    ]
    names = list(shapes)
    columns = {"signature": 64, "tables": 30}.get(index)
    constant = None if index == "exact" else signs(DIM, 0) if columns is None else projection(DIM, columns, 0)
    constants = [] if constant is None else [numpy_helper.from_array(constant, "projection")]
    outputs = slice(6, 10 if with_lse else 9)
    attributes |= INDEXES[index] | {"index": index, "num_heads": 4, "kv_num_heads": 2, "layer": 3, "identity": 2**62}
    inputs = [*names[:6], "projection"] if constants else names[:6]
    node = helper.make_node(LSH_ATTENTION.name, inputs, names[outputs], domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "one_node", values[:6], values[outputs], constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    body = LshAttention.to_function_proto()
    if not with_lse:
        body.output.pop()
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=IR_VERSION)
    register_schemas()
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check(runner: ort.InferenceSession, cache: Any, in_place: bool, chunks: list[int], **attributes: float) -> None:
    """Ragged rows, chunk after chunk: outputs within 2e-6 of the reference, caches to the bit; states as they were, but empty
    where a row starts."""
    rng, lengths = np.random.default_rng(0), np.array([0, 13], np.int32)
    past = [rng.standard_normal((2, 2 * CAPACITY, DIM)).astype(cache) for _ in range(2)]
    state = rng.integers(0, 256, (2, BYTES), np.uint8)
    before = np.where(lengths[:, None] == 0, np.uint8(0), state)
    for tokens in chunks:
        query = rng.standard_normal((2, tokens, 4 * DIM)).astype(np.float32)
        key, value = (rng.standard_normal((2, tokens, 2 * DIM)).astype(np.float32) for _ in range(2))
        everything = np.full((2, 2), CAPACITY)
        want, *want_past, want_lse = span_attention_reference(
            query, key, value, *past, lengths, everything, [CAPACITY] * 2, 0, **attributes
        )
        feeds = {"query": query, "key": key, "value": value, "length": lengths, "past_state": state}
        feeds["past_kv"] = np.concatenate(past, axis=-1)
        got = run(runner, feeds, in_place)
        np.testing.assert_allclose(got["output"], want, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(got["lse"], want_lse, rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(got["present_kv"].view(np.uint8), np.concatenate(want_past, axis=-1).view(np.uint8))
        np.testing.assert_array_equal(got["present_state"], before)
        past, state, lengths = want_past, got["present_state"], lengths + np.int32(tokens)


def run(runner: ort.InferenceSession, feeds: dict[str, np.ndarray], in_place: bool) -> dict[str, np.ndarray]:
    binding = runner.io_binding()
    types = span_op.ONNX_TYPE | {np.dtype(np.uint8): TensorProto.UINT8}
    for name, array in feeds.items():
        binding.bind_input(name, "cpu", 0, types[array.dtype], list(array.shape), array.ctypes.data)
    batch, tokens, width = feeds["query"].shape
    out = {"output": np.zeros((batch, tokens, width), np.float32), "lse": np.zeros((batch, 4, tokens), np.float32)}
    for name in ("kv", "state"):
        past = feeds[f"past_{name}"]
        out[f"present_{name}"] = past if in_place else np.zeros_like(past)
    for name, array in out.items():
        binding.bind_output(name, "cpu", 0, types[array.dtype], list(array.shape), array.ctypes.data)
    runner.run_with_iobinding(binding)
    return out


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("cache", [np.float32, np.float16, span_op.bfloat16], ids=str)
@pytest.mark.parametrize("index", INDEXES)
def test_it_is_exact(index: str, cache: Any, in_place: bool) -> None:
    """Up to the last slot, in place or not."""
    check(session(index, cache), cache, in_place, [5, 1, 30, 1, 13, 1])


@pytest.mark.parametrize("attributes", [{"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.5, "softcap": 0.5}], ids=str)
def test_attributes(attributes: dict[str, float]) -> None:
    check(session("signature", np.float32, **attributes), np.float32, False, [7, 1], **attributes)


def test_a_node_may_leave_lse_out() -> None:
    runner = session("tables", np.float32, with_lse=False)
    assert [x.name for x in runner.get_outputs()] == ["output", "present_kv", "present_state"]


def test_a_chunk_beyond_the_caches_is_an_error() -> None:
    with pytest.raises(Exception, match="TensorScatter"):
        check(session("exact", np.float32), np.float32, False, [60])


def test_attributes_are_those_of_the_schema() -> None:
    """What a node may have, its body must know; the op library reads the rest."""
    body = LshAttention.to_function_proto()
    assert {*body.attribute, *(x.name for x in body.attribute_proto)} == set(LSH_ATTENTION.attributes)
    defaults = {x.name: helper.get_attribute_value(x) for x in body.attribute_proto}
    for name, value in defaults.items():
        assert value == helper.get_attribute_value(LSH_ATTENTION.attributes[name].default_value)
    assert list(body.input) == [x.name for x in LSH_ATTENTION.inputs[:7]]
    assert list(body.output) == [x.name for x in LSH_ATTENTION.outputs]

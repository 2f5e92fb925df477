"""One table for the ONNX schemas, the plugin in Python and the plugin in C++: that they agree, and what the table refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.defs import OpSchema

from attnspan.export import ops
from attnspan.planner.rules import SIGNATURE_BITS as PLANNER_SIGNATURE_BITS
from attnspan.plugins.trt_sparse_attn import schema
from attnspan.plugins.trt_sparse_attn.kernels import checks, common
from attnspan.plugins.trt_sparse_attn.schema import LSH_HASH, MERGE_ATTENTION, OPS, SPAN_ATTENTION, Op, SchemaError
from attnspan.plugins.trt_sparse_attn.schema_header import header

HEADER = Path(__file__).parents[1] / "plugins/trt_sparse_attn/src/plugin_schema.h"
SPAN = {"num_heads": 4, "kv_num_heads": 2, "capacity": [128, 192]}
SHAPES = [[3, 5, 256], [3, 5, 128], [3, 5, 128], [3, 320, 64], [3, 320, 64], [3], [3, 2]]


def test_the_header_is_the_table() -> None:
    assert HEADER.read_text() == header(), "run: python -m attnspan.plugins.trt_sparse_attn.schema_header > " + str(HEADER)


def test_limits_are_the_kernels() -> None:
    assert schema.HEAD_DIMS == common.HEAD_DIMS
    assert schema.MARGIN == checks.MARGIN
    assert schema.SIGNATURE_BITS == PLANNER_SIGNATURE_BITS


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_onnx_schema_is_the_table(op: Op) -> None:
    known: OpSchema = {x.name: x for x in ops.SCHEMAS}[op.name]
    assert (known.domain, known.since_version) == (schema.NAMESPACE, int(schema.VERSION))
    assert [x.name for x in known.inputs] == [x.name for x in op.inputs]
    assert [x.name for x in known.outputs] == [x.name for x in op.outputs]
    for port, parameter in zip((*op.inputs, *op.outputs), (*known.inputs, *known.outputs), strict=True):
        assert (parameter.option == OpSchema.FormalParameterOption.Optional) == (port.optional or port.name == "mean")
        assert parameter.description.startswith(schema.shape_text(port))
    assert {name: x.required for name, x in known.attributes.items()} == {x.name: x.default is None for x in op.attributes}


def test_defaults_are_filled_in() -> None:
    values = SPAN_ATTENTION.attributes_of(SPAN)
    assert values == {"num_heads": 4, "kv_num_heads": 2, "capacity": (128, 192), "sink": 64, "scale": 0.0, "softcap": 0.0}
    assert LSH_HASH.attributes_of({"num_heads": 2, "signature_bits": 64})["tables"] == 0


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (SPAN_ATTENTION, {"num_heads": 0}, "num_heads is 0: must be 1 or more"),
        (SPAN_ATTENTION, {"kv_num_heads": 3}, "kv_num_heads is 3: must be a divisor of num_heads, 4"),
        (SPAN_ATTENTION, {"kv_num_heads": None}, "attribute kv_num_heads is missing"),
        (SPAN_ATTENTION, {"capacity": [128]}, r"capacity is \(128,\): must be 2 numbers \(kv_num_heads\), each 128 or more"),
        (SPAN_ATTENTION, {"capacity": [128, 127]}, r"each 128 or more \(sink \+ 64\)"),
        (SPAN_ATTENTION, {"capacity": 128}, "capacity is 128: must be of kind ints"),
        (SPAN_ATTENTION, {"sink": -1}, "sink is -1: must be 0 or more"),
        (SPAN_ATTENTION, {"scale": -0.5}, "scale is -0.5: must be 0 or more"),
        (SPAN_ATTENTION, {"softcap": float("inf")}, "softcap is inf"),
        (SPAN_ATTENTION, {"window": 3}, "attribute window is unknown: must be one of num_heads"),
        (LSH_HASH, {"signature_bits": 96}, "signature_bits is 96: must be 64, 128, 256"),
        (LSH_HASH, {"signature_bits": 64, "bits": 3}, "bits is 3: must be 0 where signature_bits is given"),
        (LSH_HASH, {"bits": 16, "tables": 4}, "bits is 16: must be 1 to 15"),
        (LSH_HASH, {"bits": 10, "tables": 5}, "tables is 5: must be an even number from 2 to 1024"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_attributes_are_refused(op: Op, change: dict[str, Any], message: str) -> None:
    given = (SPAN if op is SPAN_ATTENTION else {"num_heads": 4}) | change
    with pytest.raises(SchemaError, match=f"^{op.name}: .*{message}"):
        op.attributes_of({name: value for name, value in given.items() if value is not None})


def test_types() -> None:
    plain = ["bfloat16"] * 5 + ["int32"] * 2
    assert SPAN_ATTENTION.types_of(plain) == ["bfloat16", "bfloat16", "bfloat16", "float32"]
    small = ["float16"] * 3 + ["float8_e4m3fn"] * 2 + ["int32"] * 2 + ["float32"] * 2
    assert SPAN_ATTENTION.types_of(small) == ["float16", "float8_e4m3fn", "float8_e4m3fn", "float32"]
    assert MERGE_ATTENTION.types_of(["float16", "float32"] * 2) == ["float16", "float32"]


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["float32"] * 5 + ["int32"] * 2, "query is float32: must be float16 or bfloat16"),
        (["float16", "bfloat16"] + ["float16"] * 3 + ["int32"] * 2, "key is bfloat16: must be float16$"),
        (["float16"] * 3 + ["bfloat16"] * 2 + ["int32"] * 2, "past_key is bfloat16: must be float16$"),
        (["float16"] * 3 + ["float8_e4m3fn"] * 2 + ["int32"] * 2, "past_key is float8_e4m3fn: must be float16$"),
        (["float16"] * 5 + ["int32"] * 2 + ["float32"] * 2, "past_key is float16: must be float8_e4m3fn beside key_scale"),
        (["float16"] * 5 + ["int64", "int32"], "length is int64: must be int32"),
        (["float16"] * 5, "5 inputs are given: must be 7 or 9"),
        (["float16"] * 5 + ["int32"] * 2 + ["float32"], "8 inputs are given: must be 7 or 9"),
    ],
)
def test_types_are_refused(types: list[str], message: str) -> None:
    with pytest.raises(SchemaError, match=f"^SpanAttention: .*{message}"):
        SPAN_ATTENTION.types_of(types)


def test_sizes_that_are_not_known_yet_fit() -> None:
    values = SPAN_ATTENTION.attributes_of(SPAN)
    unknown = [[-1 if axis in ("batch", "tokens") else size for axis, size in zip(port.shape, shape, strict=True)]
               for port, shape in zip(SPAN_ATTENTION.inputs, SHAPES, strict=False)]  # fmt: skip
    assert SPAN_ATTENTION.sizes_of(values, unknown)["dim"] == 64
    sizes = SPAN_ATTENTION.sizes_of(values, SHAPES)
    assert (sizes["batch"], sizes["tokens"], sizes["slots"]) == (3, 5, 320)


@given(st.data())
def test_a_size_that_is_wrong_is_refused_and_named(data: st.DataObject) -> None:
    """Any one axis of any input changed: the message names the input that no longer fits those before it, or a later one."""
    values = SPAN_ATTENTION.attributes_of(SPAN)
    at = data.draw(st.integers(0, len(SHAPES) - 1))
    axis = data.draw(st.integers(0, len(SHAPES[at]) - 1))
    size = data.draw(st.integers(0, 600).filter(lambda size: size != SHAPES[at][axis]))
    shapes = [list(shape) for shape in SHAPES]
    shapes[at][axis] = size
    with pytest.raises(SchemaError) as error:
        SPAN_ATTENTION.sizes_of(values, shapes)
    names = [port.name for port in SPAN_ATTENTION.inputs[at:]]
    assert any(f"{name} has shape" in str(error.value) for name in names) or "a head has" in str(error.value)


def test_shapes_are_refused() -> None:
    values = SPAN_ATTENTION.attributes_of(SPAN)
    with pytest.raises(SchemaError, match=r"query has 2 dimensions: must be \[batch, tokens, num_heads \* dim\]"):
        SPAN_ATTENTION.sizes_of(values, [[3, 256]])
    with pytest.raises(SchemaError, match="a head has 32 elements: must be 64, 80, 96, 128, 256"):
        SPAN_ATTENTION.sizes_of(values, [[3, 5, 128]])
    message = r"past_key has shape \[\?, 300, 64\]: must be \[batch, slots, dim\], slots = 320, dim = 64"
    with pytest.raises(SchemaError, match=message):
        SPAN_ATTENTION.sizes_of(values, [[-1, -1, 256], [-1, -1, 128], [-1, -1, 128], [-1, 300, 64]])

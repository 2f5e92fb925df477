"""What the C++ plugin says about nodes against schema.py: attributes, types, shapes, in the same words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import trt_launch
from hypothesis import given, settings
from hypothesis import strategies as st
from trt_launch import Library, Node, Refused

from attnspan.plugins.trt_sparse_attn import schema

pytestmark = pytest.mark.skipif(trt_launch.cuda_include() is None, reason="no CUDA headers here (cuda_runtime_api.h)")


@pytest.fixture(scope="module")
def library() -> Library:
    return trt_launch.library()


def test_softcap_is_refused(library: Library) -> None:
    attributes = {"num_heads": 2, "kv_num_heads": 1, "capacity": [128], "softcap": 3.0}
    with pytest.raises(Refused, match=r"attribute softcap is 3\.0: must be 0, since kernels are compiled ahead of"):
        Node(library, schema.SPAN_ATTENTION, attributes, ["float16"] * 5 + ["int32"] * 2, [])


OK_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "SpanAttention": {"num_heads": 4, "kv_num_heads": 2, "capacity": [128, 192], "sink": 64, "scale": 0.5},
    "LshHash": {"num_heads": 3, "signature_bits": 128},
    "MergeAttention": {"num_heads": 3},
}
WRONG = st.sampled_from([-1, 0, 1, 2, 3, 5, 16, 63, 128, 2048, 0.5, -0.5, float("inf")])
WRONG_LISTS = st.sampled_from([[], [128], [128, 127], [128, 192], [128, 192, 256]])
TYPES = st.sampled_from(["float16", "bfloat16", "float32", "int32", "int64", "float8_e4m3fn", "int8"])


def said(make: Callable[[], object], error: type[Exception]) -> str:
    try:
        return f"fine: {make()}"
    except error as caught:
        return str(caught)


def in_cpp(library: Library, op: schema.Op, attributes: Any, types: Sequence[str], shapes: Any) -> str:
    return said(lambda: Node(library, op, attributes, types, shapes).text(), Refused)


def in_python(op: schema.Op, attributes: Any, types: Sequence[str], shapes: Any) -> str:
    def make() -> tuple[list[str], dict[str, int]]:
        values = op.attributes_of(attributes)
        return op.types_of(types), dict(sorted(op.sizes_of(values, shapes).items()))

    return said(make, schema.SchemaError)


def good(op: schema.Op) -> tuple[dict[str, Any], list[str], list[list[int]]]:
    """Attributes, types and shapes that fit."""
    sizes = {"batch": 2, "tokens": 5, "dim": 64, "kv_num_heads": 2, "slots": 320, "columns": 128, "words": 4}
    sizes["num_heads"] = OK_ATTRIBUTES[op.name]["num_heads"]
    ports = op.inputs[: op.required_inputs]
    types = [{"T": "float16", "C": "float16"}.get(port.type, port.type) for port in ports]
    shapes = [[int(np.prod([sizes[name] for name in axis.split("*")])) for axis in port.shape] for port in ports]
    return dict(OK_ATTRIBUTES[op.name]), types, shapes


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_nodes_are_refused_as_in_python(library: Library, data: st.DataObject) -> None:
    """One or two things changed in a good node: the same answer, in the same words."""
    op = data.draw(st.sampled_from(schema.OPS))
    attributes, types, shapes = good(op)
    assert in_cpp(library, op, attributes, types, shapes) == in_python(op, attributes, types, shapes)
    for _ in range(data.draw(st.integers(1, 2))):
        match data.draw(st.sampled_from(["attribute", "type", "size", "rank", "count", "unknown"])):
            case "attribute":
                attribute = data.draw(st.sampled_from(op.attributes))
                wrong = data.draw(WRONG_LISTS if attribute.kind == "ints" else WRONG)
                if attribute.name != "softcap" and (attribute.kind == "float" or not isinstance(wrong, float)):
                    attributes[attribute.name] = float(wrong) if attribute.kind == "float" else wrong
            case "type":
                types[data.draw(st.integers(0, len(types) - 1))] = data.draw(TYPES)
            case "size":
                shape = shapes[data.draw(st.integers(0, len(shapes) - 1))]
                if shape:
                    shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(st.sampled_from([-1, 0, 1, 2, 64, 80, 127, 256]))
            case "rank":
                shapes[data.draw(st.integers(0, len(shapes) - 1))].append(3)
            case "count":
                if data.draw(st.booleans()) and op.name == "SpanAttention":
                    types += ["float32", "float32"]
                    shapes += [[2], [2]]
                else:
                    types.pop()
            case "unknown":
                attributes["causal"] = 1
    assert in_cpp(library, op, attributes, types, shapes) == in_python(op, attributes, types, shapes)


def test_a_missing_attribute_is_named(library: Library) -> None:
    for op in schema.OPS:
        with pytest.raises(Refused, match=f"^{op.name}: attribute num_heads is missing: must be given$"):
            Node(library, op, {}, [], [])

"""LshHash and MergeAttention of the op library, by the references: the ops that split one attention over two devices."""

from __future__ import annotations

from typing import Any

import lsh_reference
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import span_op
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from span_op import bfloat16
from test_span_attention import ISAS, TOLERANCE

from attnspan.export.ops import IR_VERSION, OPSET, register_schemas
from attnspan.planner.lsh import projection

TYPES = [np.float32, np.float16, bfloat16]


def session(
    op: str, types: dict[str, Any], outputs: dict[str, Any], constants: dict[str, np.ndarray], isa: str = "", **attributes: Any
) -> ort.InferenceSession:
    """One node whose inputs are `types`, in order, with `constants` among them; all sizes are open."""

    def info(name: str, kind: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(
            name, span_op.ONNX_TYPE[np.dtype(kind)], [f"{name}_{i}" for i in range(4 if name == "codes" else 3)]
        )

    graph = helper.make_graph(
        [helper.make_node(op, list(types), list(outputs), domain="attnspan", **attributes)],
        "one_node",
        [info(name, kind) for name, kind in types.items() if name not in constants],
        [info(name, kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("attnspan", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    register_schemas()
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(span_op.library()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNSPAN_ISA", isa)
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


Shapes = dict[str, tuple[Any, tuple[int, ...]]]


def run(runner: ort.InferenceSession, feeds: dict[str, np.ndarray], outputs: Shapes) -> list[Any]:
    binding = runner.io_binding()
    for name, array in feeds.items():
        assert array.flags.c_contiguous
        binding.bind_input(name, "cpu", 0, span_op.ONNX_TYPE[array.dtype], list(array.shape), array.ctypes.data)
    got = {name: np.zeros(shape, kind) for name, (kind, shape) in outputs.items()}
    for name, array in got.items():
        binding.bind_output(name, "cpu", 0, span_op.ONNX_TYPE[array.dtype], list(array.shape), array.ctypes.data)
    runner.run_with_iobinding(binding)
    return list(got.values())


def hashed(x: np.ndarray, matrix: np.ndarray, mean: np.ndarray | None, isa: str = "", **kind: int) -> np.ndarray:
    """Codes of x [batch, tokens, heads, dim]."""
    types = {"x": x.dtype, "projection": np.float32} | ({} if mean is None else {"mean": np.float32})
    runner = session("LshHash", types, {"codes": np.int32}, {"projection": matrix}, isa, num_heads=x.shape[2], **kind)
    words = kind.get("signature_bits", 0) // 32 or kind["tables"] // 2
    feeds = {"x": x.reshape(*x.shape[:2], -1)} | ({} if mean is None else {"mean": mean})
    return run(runner, feeds, {"codes": (np.int32, (*x.shape[:3], words))})[0]


def bits_of(codes: np.ndarray, kind: dict[str, int]) -> np.ndarray:
    """Bits of codes as the table of ops has them: 32 of a word of a signature, `bits` of each 16-bit code."""
    parts, width = (codes.view(np.uint32), 32) if "signature_bits" in kind else (codes.view(np.uint16), kind["bits"])
    assert "signature_bits" in kind or parts.max() < 2 ** kind["bits"]
    return (parts[..., None].astype(np.int64) >> np.arange(width) & 1).reshape(*codes.shape[:-1], -1).astype(bool)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "kind", [{"signature_bits": 64}, {"signature_bits": 256}, {"bits": 1, "tables": 2}, {"bits": 11, "tables": 30}], ids=str
)
@pytest.mark.parametrize(("dim", "dtype"), [(16, np.float32), (80, np.float16), (100, bfloat16)])
def test_bits_are_the_signs_of_products(kind: dict[str, int], dim: int, dtype: Any, isa: str) -> None:
    """Several tasks of tokens, with and without a mean."""
    rng = np.random.default_rng(0)
    matrix = projection(dim, kind.get("signature_bits") or kind["bits"] * kind["tables"], 5)
    x = (rng.standard_normal((2, 37, 3, dim)) + 1).astype(dtype)
    mean = (rng.standard_normal((2, 3, dim)) / 4 + 1).astype(np.float32)
    for centre in (None, mean):
        vectors = x.astype(np.float32) - (0 if centre is None else centre[:, None])
        exact = vectors.astype(bfloat16).astype(np.float64) @ matrix.astype(np.float64)
        clear = np.abs(exact) > 1e-4
        assert clear.mean() > 0.99
        got = bits_of(hashed(x, matrix, centre, isa, **kind), kind)
        assert np.array_equal(got[clear], lsh_reference.signs(vectors, matrix)[clear])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"signature_bits": 96}, "signature_bits is 96; allowed are 64, 128 and 256"),
        ({"signature_bits": 64, "bits": 3}, "bits and tables must be 0"),
        ({"bits": 3, "tables": 5}, "tables is 5; it must be even"),
        ({"bits": 16, "tables": 4}, "bits is 16; allowed are 1 to 15"),
        ({"signature_bits": 128}, r"projection has shape \[8, 64\]; it must be \[head_dim, 128\]"),
        ({"signature_bits": 64, "num_heads": 4}, r"x has shape \[1, 1, 16\]; it must be \[batch, tokens, 32\]"),
    ],
)
def test_hashes_that_cannot_be_are_refused(change: dict[str, int], words: str) -> None:
    types = {"x": np.float32, "projection": np.float32}

    def attempt() -> None:
        constants = {"projection": projection(8, 64, 0)}
        runner = session("LshHash", types, {"codes": np.int32}, constants, **{"num_heads": 2, **change})
        runner.run(None, {"x": np.zeros((1, 1, 16), np.float32)})

    with pytest.raises(Exception, match=words):
        attempt()


Merged = tuple[np.ndarray, np.ndarray]


def merged(outputs: list[np.ndarray], lses: list[np.ndarray], isa: str = "", with_lse: bool = True) -> list[np.ndarray]:
    """Outputs [batch, tokens, heads * dim] and lses [batch, heads, tokens] of two parts, merged."""
    kind, lse = outputs[0].dtype, lses[0]
    types = {"output_a": kind, "lse_a": np.float32, "output_b": kind, "lse_b": np.float32}
    out = {"output": (kind, outputs[0].shape)} | ({"lse": (np.float32, lse.shape)} if with_lse else {})
    runner = session("MergeAttention", types, {n: k for n, (k, _) in out.items()}, {}, isa, num_heads=lse.shape[1])
    feeds = dict(zip(types, (outputs[0], lses[0], outputs[1], lses[1]), strict=True))
    return run(runner, feeds, out)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@settings(max_examples=8)
@given(counts=st.tuples(st.integers(0, 20), st.integers(0, 20)), seed=st.integers(0, 99), spread=st.sampled_from([1, 10, 100]))
def test_parts_give_the_whole(dtype: Any, isa: str, counts: tuple[int, int], seed: int, spread: int) -> None:
    """Against one softmax; a part without keys may hold anything."""
    rng = np.random.default_rng(seed)
    batch, tokens, heads, dim = 2, 3, 3, 20
    score = rng.standard_normal((batch, heads, tokens, sum(counts))) * spread
    value = rng.standard_normal((sum(counts), dim))
    outputs, lses = np.full((2, batch, tokens, heads, dim), np.nan), np.full((2, batch, heads, tokens), -np.inf)
    want, want_lse = np.zeros((batch, tokens, heads, dim)), np.full((batch, heads, tokens), -np.inf)
    for at in np.ndindex(batch, heads, tokens):
        b, h, t = at
        for i, part in enumerate((slice(0, counts[0]), slice(counts[0], None))):
            if counts[i]:
                outputs[i][b, t, h], lses[i][at] = lsh_reference.attend(score[at][part], value[part])
        want[b, t, h], want_lse[at] = lsh_reference.attend(score[at], value)
    rounded = [x.reshape(batch, tokens, -1).astype(dtype) for x in outputs]
    output, lse = merged(rounded, [x.astype(np.float32) for x in lses], isa)
    limit = TOLERANCE[np.dtype(dtype)] * max(np.abs(want).max(), 1)
    assert np.abs(output.astype(np.float64).reshape(want.shape) - want).max() <= limit
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged(rounded, [x.astype(np.float32) for x in lses], isa, with_lse=False)[0], output)


def test_far_apart_parts_do_not_overflow() -> None:
    outputs = [np.full((1, 1, 4), x, np.float32) for x in (1, 2)]
    lses = [np.full((1, 1, 1), x, np.float32) for x in (500, -500)]
    output, lse = merged(outputs, lses)
    assert (output.tolist(), lse.item()) == ([[[1, 1, 1, 1]]], 500)


@pytest.mark.parametrize(
    ("which", "shape", "words"),
    [
        ("output_a", (1, 2, 5), r"output_a has shape \[1, 2, 5\]; it must be \[batch, tokens, num_heads \* head_dim\]"),
        ("lse_a", (1, 2, 3), r"lse_a has shape \[1, 2, 3\]; it must be \[1, 2, 2\]"),
        ("output_b", (1, 3, 4), r"output_b has shape \[1, 3, 4\]; it must be \[1, 2, 4\]"),
        ("lse_b", (2, 2, 2), r"lse_b has shape \[2, 2, 2\]; it must be \[1, 2, 2\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(which: str, shape: tuple[int, ...], words: str) -> None:
    shapes = {"output_a": (1, 2, 4), "lse_a": (1, 2, 2), "output_b": (1, 2, 4), "lse_b": (1, 2, 2)} | {which: shape}
    runner = session("MergeAttention", dict.fromkeys(shapes, np.float32), {"output": np.float32}, {}, num_heads=2)
    with pytest.raises(Exception, match=words):
        runner.run(None, {name: np.zeros(of, np.float32) for name, of in shapes.items()})


def test_heads_must_be_positive() -> None:
    types = dict.fromkeys(("output_a", "lse_a", "output_b", "lse_b"), np.float32)
    with pytest.raises(Exception, match="num_heads is 0; it must be positive"):
        session("MergeAttention", types, {"output": np.float32}, {}, num_heads=0)

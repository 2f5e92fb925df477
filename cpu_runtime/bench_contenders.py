"""What `attnspan bench attention` compares: each contender computes one attention layer on the CPU.

A contender owns its caches. Decode cycles through several copies of them, so that a step reads its keys and values from memory as
a real model does between whose layers the caches are evicted, and not from the last-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from attnspan.cpu_runtime.library import library_path
from attnspan.planner.errors import UserError

__all__ = ["BASELINES", "DTYPES", "Case", "Contender", "attnspan_contender", "baseline"]

# Name -> (ONNX element type, bytes). bf16 arrays are NumPy uint16: ONNX Runtime takes them by pointer.
DTYPES = {"fp32": (1, 4), "fp16": (10, 2), "bf16": (16, 2), "int8": (3, 1)}
_NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int8": np.int8}
_ROTATE_BYTES = 1 << 30  # cycle through this much cache memory, several times a large last-level cache
_SINK = 64


@dataclass(frozen=True)
class Case:
    """One measurement: `context` tokens; decode adds one query to them, prefill computes them all from an empty cache."""

    phase: str
    context: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    threads: int

    @property
    def tokens(self) -> int:
        return 1 if self.phase == "decode" else self.context

    def kv_bytes(self, slots: int, dtype: str) -> int:
        """Bytes of K and V in `slots` slots of every row and KV head."""
        return 2 * self.batch * self.kv_heads * slots * self.head_dim * DTYPES[dtype][1]


@dataclass
class Contender:
    """`step()` computes the layer once, with the next of `copies` caches; each head attends to `kept` tokens at the end."""

    kernel: str
    dtype: str
    density: float
    kept: int
    copies: int
    step: Callable[[], None]


def _copies(case: Case, bytes_each: int) -> int:
    return 1 if case.phase == "prefill" else max(1, min(64, _ROTATE_BYTES // bytes_each))


def _random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Values like those of real keys: standard normal. One block of random numbers is repeated, which attention cannot tell."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    if dtype == "int8":
        block = rng.integers(-127, 128, min(size, 1 << 20)).astype(np.int8)
    else:
        wide = rng.standard_normal(min(size, 1 << 20), np.float32)
        block = (wide.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else wide.astype(_NUMPY[dtype])
    return np.resize(block, shape)


def _session(node: Any, inputs: dict[str, tuple[str, Any]], outputs: dict[str, tuple[str, Any]], case: Case, custom: bool) -> Any:
    import onnxruntime as ort
    from onnx import TensorProto, helper

    def info(name: str, dtype: str, shape: Any) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.INT32 if dtype == "int32" else DTYPES[dtype][0], shape)

    graph = helper.make_graph(
        [node], "attention", [info(n, *v) for n, v in inputs.items()], [info(n, *v) for n, v in outputs.items()]
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(node.domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    if custom:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bind(session: Any, arrays: dict[str, tuple[str, np.ndarray]], outputs: dict[str, tuple[str, np.ndarray]]) -> Any:
    binding = session.io_binding()
    for bind, values in ((binding.bind_input, arrays), (binding.bind_output, outputs)):
        for name, (dtype, a) in values.items():
            element = 6 if dtype == "int32" else DTYPES[dtype][0]
            bind(name, "cpu", 0, element, list(a.shape), a.ctypes.data)
    return binding


def _runner(session: Any, bindings: list[Any], keep: Any) -> Callable[[], None]:
    turn = cycle(bindings)

    def step(_keep: Any = keep) -> None:
        session.run_with_iobinding(next(turn))

    return step


def _span(density: float, context: int) -> int:
    from attnspan.planner.rules import span_tokens

    return int(span_tokens(0.0, density, context))


def attnspan_contender(case: Case, density: float, dtype: str) -> Contender:
    """SpanAttention with every KV head at `density` of the context, which fills its ring exactly."""
    from onnx import helper

    b, s, hq, hkv, d = case.batch, case.tokens, case.heads, case.kv_heads, case.head_dim
    capacity = _span(density, case.context)
    activation = "fp32" if dtype == "int8" else dtype
    inputs: dict[str, tuple[str, Any]] = {
        "query": (activation, (b, s, hq * d)),
        "key": (activation, (b, s, hkv * d)),
        "value": (activation, (b, s, hkv * d)),
        "past_key": (dtype, (b, hkv * capacity, d)),
        "past_value": (dtype, (b, hkv * capacity, d)),
        "length": ("int32", (b,)),
        "span": ("int32", (b, hkv)),
    }
    if dtype == "int8":
        inputs |= {"key_scale": ("fp32", (hkv,)), "value_scale": ("fp32", (hkv,))}
    outputs = {"output": inputs["query"], "present_key": inputs["past_key"], "present_value": inputs["past_value"]}
    node = helper.make_node(
        "SpanAttention", list(inputs), list(outputs), domain="attnspan",
        num_heads=hq, kv_num_heads=hkv, capacity=[capacity] * hkv, sink=_SINK,
    )  # fmt: skip
    session = _session(node, inputs, outputs, case, custom=True)
    arrays = {n: (t, _random(shape, t, i)) for i, (n, (t, shape)) in enumerate(inputs.items()) if t in DTYPES}
    if dtype == "int8":
        arrays |= {n: ("fp32", np.full(hkv, 1 / 40, np.float32)) for n in ("key_scale", "value_scale")}
    length = 0 if case.phase == "prefill" else case.context - 1
    arrays["length"] = ("int32", np.full(b, length, np.int32))
    arrays["span"] = ("int32", np.full((b, hkv), capacity, np.int32))
    output = ("output", (activation, np.empty((b, s, hq * d), _NUMPY[activation])))
    copies = _copies(case, case.kv_bytes(capacity, dtype))
    pairs = [(arrays["past_key"][1].copy(), arrays["past_value"][1].copy()) for _ in range(copies)]
    bindings = [
        _bind(
            session,
            arrays | {"past_key": (dtype, k), "past_value": (dtype, v)},
            dict([output]) | {"present_key": (dtype, k), "present_value": (dtype, v)},
        )
        for k, v in pairs
    ]
    return Contender(
        "attnspan", dtype, density, min(capacity, case.context), len(pairs), _runner(session, bindings, (arrays, pairs, output))
    )


def _ort_gqa(case: Case, dtype: str) -> Contender:
    """ONNX Runtime's GroupQueryAttention over a shared cache, fp32 or int8 keys and values."""
    from onnx import helper

    b, s, hq, hkv, d = case.batch, case.tokens, case.heads, case.kv_heads, case.head_dim
    inputs: dict[str, tuple[str, Any]] = {
        "query": ("fp32", (b, s, hq * d)),
        "key": ("fp32", (b, s, hkv * d)),
        "value": ("fp32", (b, s, hkv * d)),
        "past_key": (dtype, (b, hkv, case.context, d)),
        "past_value": (dtype, (b, hkv, case.context, d)),
        "seqlens_k": ("int32", (b,)),
        "total_sequence_length": ("int32", ()),
    }
    outputs = {"output": inputs["query"], "present_key": inputs["past_key"], "present_value": inputs["past_value"]}
    attributes: dict[str, Any] = {"num_heads": hq, "kv_num_heads": hkv}
    names = list(inputs)
    if dtype == "int8":
        inputs |= {"k_scale": ("fp32", (1,)), "v_scale": ("fp32", (1,))}
        names += ["", "", "", "", "", "k_scale", "v_scale"]
        attributes |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}
    node = helper.make_node("GroupQueryAttention", names, list(outputs), domain="com.microsoft", **attributes)
    session = _session(node, inputs, outputs, case, custom=False)
    arrays = {n: (t, _random(shape, t, i)) for i, (n, (t, shape)) in enumerate(inputs.items()) if t in DTYPES}
    if dtype == "int8":
        arrays |= {n: ("fp32", np.full(1, 1 / 40, np.float32)) for n in ("k_scale", "v_scale")}
    arrays["seqlens_k"] = ("int32", np.full(b, case.context - 1, np.int32))
    arrays["total_sequence_length"] = ("int32", np.array(case.context, np.int32))
    output = ("fp32", np.empty((b, s, hq * d), np.float32))
    pairs = [
        (arrays["past_key"][1].copy(), arrays["past_value"][1].copy())
        for _ in range(_copies(case, case.kv_bytes(case.context, dtype)))
    ]
    bindings = [
        _bind(
            session,
            arrays | {"past_key": (dtype, k), "past_value": (dtype, v)},
            {"output": output, "present_key": (dtype, k), "present_value": (dtype, v)},
        )
        for k, v in pairs
    ]
    return Contender(
        f"ort-gqa-{dtype}", dtype, 1.0, case.context, len(pairs), _runner(session, bindings, (arrays, pairs, output))
    )


def _torch_sdpa(case: Case, dtype: str) -> Contender:
    """PyTorch's scaled_dot_product_attention.

    Decode views the query heads of a group as rows of one head ("grouped"), which reads every key once and is the fastest
    form on a CPU; prefill is causal, with keys and values repeated beforehand, outside the timing.
    """
    try:
        import torch
    except ImportError:
        raise UserError("baseline torch-sdpa needs PyTorch, which is not installed; leave it out of --baselines") from None
    torch.set_num_threads(case.threads)
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    b, hq, hkv, d = case.batch, case.heads, case.kv_heads, case.head_dim
    attend = torch.nn.functional.scaled_dot_product_attention
    if case.phase == "prefill":
        q, k, v = (torch.randn(b, hq, case.context, d).to(kind) for _ in range(3))

        def prefill() -> None:
            with torch.inference_mode():
                attend(q, k, v, is_causal=True)

        return Contender(f"torch-sdpa-{dtype}", dtype, 1.0, case.context, 1, prefill)
    grouped = torch.randn(b, hkv, hq // hkv, d).to(kind)
    first = tuple(torch.randn(b, hkv, case.context, d).to(kind) for _ in range(2))
    copies = [tuple(t.clone() for t in first) for _ in range(_copies(case, case.kv_bytes(case.context, dtype)))]
    turn = cycle(copies)

    def decode() -> None:
        with torch.inference_mode():
            attend(grouped, *next(turn))

    return Contender(f"torch-sdpa-{dtype}", dtype, 1.0, case.context, len(copies), decode)


BASELINES = ("ort-gqa", "ort-gqa-int8", "torch-sdpa")


def baseline(name: str, case: Case, dtype: str) -> Contender:
    """The baseline `name` of `BASELINES`; torch-sdpa runs in `dtype` (bf16 beside an int8 cache)."""
    if name == "torch-sdpa":
        return _torch_sdpa(case, "bf16" if dtype == "int8" else dtype)
    return _ort_gqa(case, "int8" if name == "ort-gqa-int8" else "fp32")

"""Runs one LshAttention node on ONNX Runtime with the op library; shared by the tests of the op."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import span_op
from lsh_reference import Hashing, LshReference, Step
from onnx import TensorProto, helper, numpy_helper

ONNX_TYPE = span_op.ONNX_TYPE | {np.dtype(np.uint8): TensorProto.UINT8}
INPUTS = (
    "query", "key", "value", "past_kv", "past_state", "length", "projection", "key_scale", "value_scale", "span", "query_codes"
)  # fmt: skip
OUTPUTS = ("output", "present_kv", "present_state", "lse")
SEGMENT = 65536  # tokens whose ids are sorted together


def isas() -> list[str]:
    """The instruction sets this processor runs, asked of the library itself."""
    try:
        session(1, 1, None, isa="none")
    except Exception as e:
        return str(e).split("this processor runs: ")[1].split()
    raise AssertionError("an unknown ATTNSPAN_ISA was accepted")


def round_up(n: int, step: int = 64) -> int:
    return -(-n // step) * step


def state_bytes(hashing: Hashing | None, kv_heads: int, dim: int, capacity: int) -> int:
    """Bytes of one row's state: header, 16 means and a sum for each KV head, and the index."""
    positions, index = round_up(capacity), 0
    if hashing is not None and hashing.index == "signature":
        index = positions * hashing.projection.shape[1] // 8
    elif hashing is not None and hashing.index == "sketch":
        index = positions * (-(-dim // 4) + 2)
    elif hashing is not None:
        lists = -(-positions // SEGMENT) * hashing.tables
        index = round_up(lists * 4) + round_up(lists * (2**hashing.bits + 1) * 2) + round_up(positions * hashing.tables * 2)
    return 256 + round_up(16 * kv_heads * dim * 4) + round_up(kv_heads * dim * 8) + kv_heads * index


def attributes_of(hashing: Hashing | None) -> dict[str, Any]:
    """The node's attributes that say how it hashes."""
    if hashing is None:
        return {"index": "exact"}
    if hashing.index == "tables":
        return {"index": "tables", "bits": hashing.bits, "tables": hashing.tables, "min_collisions": hashing.min_collisions}
    if hashing.index == "sketch":
        return {"index": "sketch", "fraction": hashing.fraction}
    return {"index": "signature", "signature_bits": hashing.projection.shape[1], "max_hamming": list(hashing.max_hamming)}


def session(
    heads: int,
    kv_heads: int,
    hashing: Hashing | None,
    *,
    activation: Any = np.float32,
    cache: Any = np.float32,
    threads: int = 2,
    isa: str = "",
    shapes: bool = True,
    far: bool = False,
    codes: bool = False,
    **attributes: Any,
) -> ort.InferenceSession:
    """A session over one node with all outputs; without `shapes` the graph declares none. `dense_below` is 0 unless given.

    far, codes: the node has the inputs span, query_codes.
    """
    activation, cache = np.dtype(activation), np.dtype(cache)
    int8 = cache == np.int8
    types = dict(zip(INPUTS[:6], [activation] * 3 + [cache] + [np.dtype(np.uint8), np.dtype(np.int32)], strict=True))
    types |= dict.fromkeys(("key_scale", "value_scale"), np.dtype(np.float32)) if int8 else {}
    types |= {name: np.dtype(np.int32) for name, given in (("span", far), ("query_codes", codes)) if given}
    rank = {"length": 1, "past_state": 2, "key_scale": 1, "value_scale": 1, "span": 2, "query_codes": 4}

    def info(name: str, dtype: np.dtype, dims: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, ONNX_TYPE[dtype], [f"{name}_{i}" for i in range(dims)] if shapes else None)

    names = [name if name in types or (name == "projection" and hashing is not None) else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    out_types = [activation, cache, np.dtype(np.uint8), np.dtype(np.float32)]
    given = {"num_heads": heads, "kv_num_heads": kv_heads, "dense_below": 0, **attributes_of(hashing), **attributes}
    graph = helper.make_graph(
        [helper.make_node("LshAttention", names, list(OUTPUTS), domain="attnspan", **given)],
        "one_node",
        [info(name, dtype, rank.get(name, 3)) for name, dtype in types.items()],
        [info(name, t, rank.get("past" + name.removeprefix("present"), 3)) for name, t in zip(OUTPUTS, out_types, strict=True)],
        [] if hashing is None else [numpy_helper.from_array(hashing.projection.astype(np.float32), "projection")],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("attnspan", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(span_op.library()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNSPAN_ISA", isa)
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(sess: ort.InferenceSession, feeds: dict[str, np.ndarray], in_place: bool = True) -> dict[str, np.ndarray]:
    """Runs the node. With `in_place` the arrays past_* are bound as the presents too, and are changed."""
    binding = sess.io_binding()
    kept = []
    for name, array in feeds.items():
        assert not in_place or array.flags.c_contiguous or not name.startswith("past_")
        array = np.ascontiguousarray(array)
        kept.append(array)
        binding.bind_input(name, "cpu", 0, ONNX_TYPE[array.dtype], list(array.shape), array.ctypes.data)
    batch, tokens, width = feeds["query"].shape
    out = {"output": np.zeros_like(feeds["query"], order="C")}
    out["lse"] = np.zeros((batch, width // (feeds["past_kv"].shape[-1] // 2), tokens), np.float32)
    for name in ("kv", "state"):
        past = feeds[f"past_{name}"]
        out[f"present_{name}"] = past if in_place else np.zeros_like(past)
    for name, array in out.items():
        binding.bind_output(name, "cpu", 0, ONNX_TYPE[array.dtype], list(array.shape), array.ctypes.data)
    sess.run_with_iobinding(binding)
    return out


@dataclass
class Case:
    """A node and what it is fed: `rows` sequences that grow in one set of buffers, each with its reference."""

    hashing: Hashing | None
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    capacity: int = 1024
    rows: int = 1
    activation: Any = np.float32
    cache: Any = np.float32
    sink: int = 4
    window: int = 16
    threads: int = 2
    isa: str = ""
    seed: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)
    spans: list[list[int]] | None = None  # [rows][kv_heads]: what another op attends to
    coded: bool = False  # queries come hashed

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        fixed = {"sink": self.sink, "window": self.window, **self.attributes}
        self.session = session(
            self.heads, self.kv_heads, self.hashing, activation=self.activation, cache=self.cache, threads=self.threads,
            isa=self.isa, far=self.spans is not None, codes=self.coded, **fixed,
        )  # fmt: skip
        self.scales: dict[str, np.ndarray] = {}
        if np.dtype(self.cache) == np.int8:
            for name in ("key_scale", "value_scale"):
                self.scales[name] = self.rng.uniform(0.02, 0.04, self.kv_heads).astype(np.float32)
        slots = self.kv_heads * self.capacity
        self.past = {"past_kv": np.zeros((self.rows, slots, 2 * self.dim), self.cache)}
        size = state_bytes(self.hashing, self.kv_heads, self.dim, self.capacity)
        self.past["past_state"] = np.zeros((self.rows, size), np.uint8)
        known = {k: v for k, v in fixed.items() if k in ("sink", "window", "scale", "softcap", "dense_below")}
        self.reference = [
            LshReference(
                self.hashing, self.heads, self.kv_heads, self.dim, self.capacity, cache=self.cache, **known, **self.scales
            )
            for _ in range(self.rows)
        ]  # fmt: skip
        self.offset = 0.7 * self.rng.standard_normal((self.kv_heads, self.dim))  # what centring takes away

    def tokens(self, count: int) -> dict[str, np.ndarray]:
        """Random tokens of all rows: keys with a common offset."""
        q = 1.5 * self.rng.standard_normal((self.rows, count, self.heads * self.dim))
        k, v = (self.rng.standard_normal((self.rows, count, self.kv_heads, self.dim)) + self.offset for _ in range(2))
        flat = (self.rows, count, self.kv_heads * self.dim)
        return {
            n: x.astype(self.activation) for n, x in (("query", q), ("key", k.reshape(flat)), ("value", v.reshape(flat)))
        }  # fmt: skip

    def feeds(self, tokens: dict[str, np.ndarray], length: list[int] | None = None) -> dict[str, np.ndarray]:
        """All inputs; `length` is the references' unless given."""
        lengths = np.array([r.length for r in self.reference] if length is None else length, np.int32)
        found = {**tokens, **self.past, "length": lengths, **self.scales}
        if self.spans is not None:
            found["span"] = np.array(self.spans, np.int32)
        return found | ({"query_codes": self.codes(tokens["query"][:, -1])} if self.coded else {})

    def codes(self, query: np.ndarray) -> np.ndarray:
        """What the queries of one token are hashed to, as LshHash packs it: [rows, 1, heads, words]."""
        assert self.hashing is not None
        marks = self.hashing.marks(query.reshape(self.rows, 1, self.heads, self.dim).astype(np.float32))
        if self.hashing.index == "tables":
            return np.ascontiguousarray(marks).view(np.int32)
        return np.packbits(marks, axis=-1, bitorder="little").view(np.int32)

    def step(
        self, tokens: dict[str, np.ndarray], in_place: bool = True, compared: bool = True
    ) -> tuple[dict[str, np.ndarray], list[Step | None]]:
        """One call of the node and of the references; unless `compared`, the references do not attend."""
        got = run(self.session, self.feeds(tokens), in_place)
        if not in_place:
            self.past = {f"past_{n}": got[f"present_{n}"] for n in ("kv", "state")}
        spans = self.spans or [None] * self.rows
        want = [
            reference.step(*(tokens[n][b] for n in ("query", "key", "value")), attended=compared, spans=spans[b])
            for b, reference in enumerate(self.reference)
        ]
        return got, want

    def preload(self, count: int, zero: int | None = None) -> None:
        """Puts `count` random tokens into the caches of all rows as if an earlier run had left them, with nothing indexed.

        zero: a dimension in which all keys are 0.
        """
        assert not self.scales, "preload knows no int8 caches"
        tokens = self.tokens(count)
        if zero is not None:
            tokens["key"].reshape(self.rows, count, self.kv_heads, self.dim)[..., zero] = 0
        for b, reference in enumerate(self.reference):
            reference.append(tokens["key"][b], tokens["value"][b])
            cache = self.past["past_kv"].reshape(self.rows, self.kv_heads, self.capacity, 2, self.dim)
            for i, name in enumerate(("key", "value")):
                by_head = tokens[name][b].reshape(count, self.kv_heads, self.dim).swapaxes(0, 1)
                cache[b, :, reference.length - count : reference.length, i] = by_head

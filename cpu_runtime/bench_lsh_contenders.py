"""What `attnspan bench lsh` compares: each contender computes one decode step of one attention layer on the CPU.

Contenders of one cache type share its copies of the keys and values. All of them run in fp32 on caches of their own type, as
exported models do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime.bench_lsh_caches import ELEMENT, NUMPY, Caches, Feed, huge
from attnspan.cpu_runtime.library import library_path
from attnspan.cpu_runtime.lsh_keys import Floats, to_bf16
from attnspan.planner.errors import UserError

if TYPE_CHECKING:
    from attnspan.planner.rules import LshParams

__all__ = ["SINK", "Contender", "Lsh", "dense", "ort_gqa", "sampled", "torch_sdpa"]

SINK = 64


@dataclass
class Contender:
    """`attend(copy, query, back)` computes a step on a copy of the caches (see `Feed`); its output is then in `output` [batch,
    heads, head_dim]. `step()` is the next of a rotation; with `moves`, every step on a copy is one token further on."""

    kernel: str
    label: str
    caches: Caches
    feed: Feed
    attend: Callable[[int, int, int], None]
    output: Floats
    moves: bool = False
    lsh: Lsh | None = None
    build_seconds: list[float] = field(default_factory=list)
    steps: int = 0

    def step(self) -> None:
        """One step; those that move stay at the last token when there is no more room."""
        turn, copy = divmod(self.steps, self.caches.copies)
        back = max(-turn, self.feed.last) if self.moves else 0
        self.attend(copy, self.steps % len(self.feed.query), back)
        self.steps += 1

    def answers(self) -> Floats:
        """Outputs to all queries in the order of their positions, [queries, batch, heads, head_dim], on the first copy. To be
        called before the first step. The first step on each copy builds its index: `build_seconds` has the times."""
        out = []
        for j in range(len(self.feed.query)):
            self.build_seconds.append(_seconds(lambda j=j: self.attend(0, j, self.feed.back_of(j))))  # type: ignore[misc]
            out.append(self.output.copy())
        del self.build_seconds[1:]
        for copy in range(1, self.caches.copies):
            self.build_seconds.append(_seconds(lambda copy=copy: self.attend(copy, 0, self.feed.spread)))  # type: ignore[misc]
        return np.stack(out)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Lsh:
    """An index: its parameters, the projection or signs [head_dim, columns], the threshold of each KV head (signatures), what to
    call it."""

    params: LshParams
    projection: Floats
    max_hamming: list[int]

    @property
    def label(self) -> str:
        """Kind and parameters."""
        p = self.params
        if p.index == "sketch":
            return f"sketch {f'{p.fraction:g}'.removeprefix('0')}"
        if p.index == "tables":
            collisions = "" if p.min_collisions == 2 else f" c{p.min_collisions}"
            return f"tables {p.bits},{p.tables}{collisions}"
        least, most = min(self.max_hamming), max(self.max_hamming)
        return f"signature {p.signature_bits} h{least}" + (f"-{most}" if most > least else "")


def _session(
    node: Any, infos: list[Any], outputs: list[Any], constants: dict[str, Floats], threads: int, custom: Path | None
) -> Any:
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "attention", infos, outputs, weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(node.domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if custom is not None:
        options.register_custom_ops_library(str(custom))
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # pybind11 classes without a common base
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"ONNX Runtime {ort.__version__} cannot run {node.op_type}: {reason}") from None


class _Onnx:
    """One node over copies of the caches: arrays that a step writes, and a binding of each copy."""

    def __init__(self, caches: Caches, feed: Feed, threads: int, op: str, domain: str, **attributes: Any) -> None:
        self._caches, self._feed, self._threads, self._op, self._domain = caches, feed, threads, op, domain
        batch, self.kv_heads, self._capacity, self._dim = caches.key[0].shape
        self._heads = feed.query.shape[1] // self._dim
        self._attributes = attributes | {"num_heads": self._heads, "kv_num_heads": self.kv_heads}
        self.arrays: dict[str, tuple[str, npt.NDArray[Any]]] = {
            "query": ("fp32", np.empty((batch, 1, feed.query.shape[1]), np.float32)),
            "key": ("fp32", np.empty((batch, 1, feed.key.shape[3]), np.float32)),
            "value": ("fp32", np.empty((batch, 1, feed.key.shape[3]), np.float32)),
        }
        self.output = np.empty((batch, 1, feed.query.shape[1]), np.float32)
        rank3 = (batch, self.kv_heads * self._capacity, self._dim)
        self.cache_shape = rank3 if domain == "attnspan" else caches.key[0].shape
        self.in_place = {"key": caches.key, "value": caches.value}
        self.library = library_path()

    def open(self, names: list[str], constants: dict[str, Floats]) -> Callable[[int], None]:
        """A session whose inputs have these names in order, "" for none; the function that runs it on a copy."""
        from onnx import helper

        past = {f"past_{name}": copies for name, copies in self.in_place.items()}
        types = {name: kind for name, (kind, _) in self.arrays.items()}
        shapes: dict[str, Any] = {name: array.shape for name, (_, array) in self.arrays.items()}
        for name, copies in past.items():
            types[name] = "uint8" if name == "past_state" else self._caches.dtype
            shapes[name] = copies[0].shape if name in ("past_state", "past_kv") else self.cache_shape
        outputs = ["output", *("present" + name.removeprefix("past") for name in past)]
        node = helper.make_node(self._op, names, outputs, domain=self._domain, **self._attributes)
        infos = [helper.make_tensor_value_info(n, ELEMENT[types[n]], shapes[n]) for n in names if n in types]
        results = [helper.make_tensor_value_info("output", ELEMENT["fp32"], self.output.shape)] + [
            helper.make_tensor_value_info("present" + n.removeprefix("past"), ELEMENT[types[n]], shapes[n]) for n in past
        ]
        session = _session(node, infos, results, constants, self._threads, self.library if self._domain == "attnspan" else None)
        bindings = []
        for copy in range(self._caches.copies):
            binding = session.io_binding()
            for name, (kind, array) in self.arrays.items():
                binding.bind_input(name, "cpu", 0, ELEMENT[kind], array.shape, array.ctypes.data)
            binding.bind_output("output", "cpu", 0, ELEMENT["fp32"], self.output.shape, self.output.ctypes.data)
            for name, copies in past.items():
                at = (ELEMENT[types[name]], shapes[name], copies[copy].ctypes.data)
                binding.bind_input(name, "cpu", 0, *at)
                binding.bind_output("present" + name.removeprefix("past"), "cpu", 0, *at)
            bindings.append(binding)

        def run(copy: int, _keep: _Onnx = self) -> None:  # bindings hold addresses of its arrays
            session.run_with_iobinding(bindings[copy])

        return run

    def attend(self, run: Callable[[int], None], lengths: Callable[[int], None]) -> Callable[[int, int, int], None]:
        """A step by `run`, after `lengths(back)` wrote the lengths."""
        feed = self._feed
        query, key, value = (self.arrays[name][1] for name in ("query", "key", "value"))

        def step(copy: int, asked: int, back: int) -> None:
            query[:] = feed.query[asked]
            key[:] = feed.key[feed.spread - back]
            value[:] = feed.value[feed.spread - back]
            lengths(back)
            run(copy)

        return step

    def contender(self, kernel: str, label: str, step: Callable[[int, int, int], None], **more: Any) -> Contender:
        shown = self.output.reshape(len(self.output), self._heads, self._dim)
        return Contender(kernel, label, self._caches, self._feed, step, shown, **more)


def _lengths(node: _Onnx, feed: Feed) -> Callable[[int], None]:
    """Adds the input `length`; the function that writes it."""
    length = np.empty(len(feed.contexts), np.int32)
    node.arrays["length"] = ("int32", length)

    def write(back: int) -> None:
        np.subtract(feed.contexts, 1 + back, out=length)

    return write


def _scales(node: _Onnx, caches: Caches) -> list[str]:
    if caches.dtype != "int8":
        return []
    node.arrays |= {"key_scale": ("fp32", caches.key_scale), "value_scale": ("fp32", caches.value_scale)}
    return ["key_scale", "value_scale"]


def dense(caches: Caches, feed: Feed, threads: int, library: Path | None = None) -> Contender:
    """SpanAttention whose heads keep everything, of this library or another build of it."""
    batch, kv_heads, capacity, _ = caches.key[0].shape
    node = _Onnx(caches, feed, threads, "SpanAttention", "attnspan", capacity=[capacity] * kv_heads, sink=SINK, scale=feed.scale)
    write = _lengths(node, feed)
    node.arrays["span"] = ("int32", np.full((batch, kv_heads), capacity, np.int32))
    names = ["query", "key", "value", "past_key", "past_value", "length", "span", *_scales(node, caches)]
    name = "attnspan-dense" if library is None else "other-dense"
    node.library = library or node.library
    return node.contender(name, name, node.attend(node.open(names, {}), write))


def sampled(caches: Caches, feed: Feed, threads: int, lsh: Lsh, state_bytes: int) -> Contender:
    """LshAttention with an index, whose states [batch, state_bytes] are empty."""
    params = lsh.params
    chosen = {name: getattr(params, name) for name in ("fraction", "bits", "tables", "min_collisions", "signature_bits")}
    attributes = {name: value for name, value in chosen.items() if value is not None}
    if params.index == "signature":
        attributes["max_hamming"] = lsh.max_hamming
    node = _Onnx(caches, feed, threads, "LshAttention", "attnspan", sink=SINK, window=params.window, scale=feed.scale,
                 index=params.index, dense_below=0, min_inclusion=params.min_inclusion, **attributes)  # fmt: skip
    write = _lengths(node, feed)
    node.in_place = {"kv": caches.pairs}
    node.in_place["state"] = [huge((len(feed.contexts), state_bytes), NUMPY["uint8"]) for _ in range(caches.copies)]
    names = ["query", "key", "value", "past_kv", "past_state", "length", "projection", *_scales(node, caches)]
    run = node.open(names, {"projection": lsh.projection})
    return node.contender(params.index, lsh.label, node.attend(run, write), moves=True, lsh=lsh)


def ort_gqa(caches: Caches, feed: Feed, threads: int) -> Contender:
    """ONNX Runtime's GroupQueryAttention; int8 caches have one scale."""
    name = f"ort-gqa-{caches.dtype}"
    quantised = caches.dtype == "int8"
    kinds = {"kv_cache_bit_width": 8, "k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"} if quantised else {}
    node = _Onnx(caches, feed, threads, "GroupQueryAttention", "com.microsoft", scale=feed.scale, **kinds)
    seqlens, total = np.empty(len(feed.contexts), np.int32), np.empty((), np.int32)
    node.arrays |= {"seqlens_k": ("int32", seqlens), "total_sequence_length": ("int32", total)}
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"]
    if quantised:
        node.arrays |= {"k_scale": ("fp32", caches.key_scale[:1]), "v_scale": ("fp32", caches.value_scale[:1])}
        names += [""] * 5 + ["k_scale", "v_scale"]
    longest = int(feed.contexts.max())

    def write(back: int) -> None:
        np.subtract(feed.contexts, 1 + back, out=seqlens)
        total[()] = longest - back

    return node.contender(name, name, node.attend(node.open(names, {}), write))


def torch_sdpa(caches: Caches, feed: Feed, threads: int) -> Contender:
    """PyTorch's scaled_dot_product_attention with the query heads of a group as rows of one head, its fastest form on a CPU; rows
    of unequal lengths one after another."""
    try:
        import torch
    except ImportError:
        raise UserError("baseline torch-sdpa needs PyTorch, which is not installed; leave it out of --baselines") from None
    torch.set_num_threads(threads)
    batch, kv_heads, _, dim = caches.key[0].shape
    heads = feed.query.shape[1] // dim

    def tensor(x: npt.NDArray[Any]) -> Any:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == np.uint16 else torch.from_numpy(x)

    key, value = ([tensor(x) for x in copies] for copies in (caches.key, caches.value))
    wide = feed.query.reshape(-1, 1, kv_heads, heads // kv_heads, dim)
    query = tensor(to_bf16(wide) if caches.dtype == "bf16" else wide.astype(NUMPY[caches.dtype]))
    output = np.empty((batch, heads, dim), np.float32)
    result = torch.from_numpy(output)
    contexts = feed.contexts.tolist()
    parts = [slice(0, batch)] if len(set(contexts)) == 1 else [slice(b, b + 1) for b in range(batch)]

    def step(copy: int, asked: int, back: int) -> None:
        with torch.inference_mode():
            for part in parts:
                end = contexts[part.start] - back
                q = query[asked].expand(part.stop - part.start, -1, -1, -1)
                k, v = key[copy][part, :, :end], value[copy][part, :, :end]
                got = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=feed.scale)
                result[part] = got.reshape(-1, heads, dim)

    name = f"torch-sdpa-{caches.dtype}"
    return Contender(name, name, caches, feed, step, output)

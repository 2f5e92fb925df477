"""Launches of the C++ plugin against those of the Python host functions: kernels, order, grids, every argument.

Without a GPU and without TensorRT: the table of kernels has stand-ins for their code, and a stand-in for the CUDA runtime writes
down what would run.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trt_launch
from hypothesis import given, settings
from hypothesis import strategies as st
from trt_host import NAMES, SUFFIX, Host, compare, compare_span, run_span, span_inputs, span_node
from trt_launch import Library, Node, Refused

from attnspan.plugins.trt_sparse_attn import kernels, schema
from attnspan.plugins.trt_sparse_attn.kernels.common import HEAD_DIMS, SHARED_BYTES
from attnspan.plugins.trt_sparse_attn.plugin import Plugin

pytestmark = pytest.mark.skipif(trt_launch.cuda_include() is None, reason="no CUDA headers here (cuda_runtime_api.h)")


@pytest.fixture(scope="module")
def library() -> Library:
    return trt_launch.library()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_every_architecture_head_size_and_type(host: Host, library: Library, arch: int, tokens: int) -> None:
    for dim in HEAD_DIMS:
        for dtype in (torch.float16, torch.bfloat16):
            for fp8 in (False, True) if arch >= 89 else (False,):
                compare_span(host, library, arch, 2, tokens, 3, dim, (128, 192, 130), dtype, fp8)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(library: Library, data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from([1, 1, 2, 31, 32, 33, 127, 128, 129, 700]))
    sink = data.draw(st.sampled_from([0, 4, 64]))
    capacity = data.draw(st.lists(st.integers(sink + 64, 400), min_size=1, max_size=9))
    with pytest.MonkeyPatch.context() as monkeypatch:
        compare_span(
            Host(monkeypatch), library, data.draw(st.sampled_from(list(SHARED_BYTES))), data.draw(st.integers(1, 9)), tokens,
            data.draw(st.sampled_from([1, 2, 4, 7, 8, 16, 17, 40])), 64, capacity, torch.float16, sink=sink,
            scale=data.draw(st.sampled_from([0.0, 0.3, 1.0])), multiprocessors=data.draw(st.integers(1, 188)),
        )  # fmt: skip


def test_workers_of_a_larger_gpu_are_as_many_as_the_workspace_holds(library: Library) -> None:
    library.device(100, 400)
    inputs = span_inputs(2, 1, 2, 64, (128, 128), torch.bfloat16, False)
    node = span_node(library, inputs, 4, (128, 128))
    run_span(node, inputs)
    decode = library.log()[-2]
    assert decode["kernel"] == "span_decode_bf16_d64"
    assert decode["grid"] == [576, 1, 1]


def test_other_memory_for_the_present_is_filled_from_the_past_first(library: Library) -> None:
    inputs = span_inputs(3, 5, 2, 96, (128, 200), torch.float16, False)
    run_span(span_node(library, inputs, 4, (128, 200)), inputs, present_value=1 << 22)
    copy, prefill, update = [entry for entry in library.log() if "load" not in entry]
    size = inputs["value_cache"].numel() * 2
    assert copy == {"copy": size, "to": 1 << 22, "from": inputs["value_cache"].data_ptr(), "stream": 0}
    for launch in (prefill, update):
        assert launch["arguments"]["key_cache"] == inputs["key_cache"].data_ptr()
        assert launch["arguments"]["value_cache"] == 1 << 22


def test_words_that_begin_anywhere_are_copied_to_the_workspace(library: Library) -> None:
    inputs = span_inputs(3, 1, 2, 64, (128, 200, 130), torch.bfloat16, True)
    shifted = {name: inputs[name].data_ptr() + 4 for name in ("length", "span", "key_scale", "value_scale")}
    node = span_node(library, inputs, 6, (128, 200, 130))
    at = run_span(node, inputs, **shifted)
    log = [entry for entry in library.log() if "load" not in entry]
    assert [(entry["from"], entry["copy"]) for entry in log[:4]] == [
        (shifted["length"], 12), (shifted["span"], 36), (shifted["key_scale"], 12), (shifted["value_scale"], 12)
    ]  # fmt: skip
    ends = [entry["to"] + entry["copy"] for entry in log[:4]]
    part_lse = log[4]["arguments"]["part_lse"]
    assert part_lse < log[0]["to"]
    assert max(ends) <= at["workspace"] + node.workspace(3)
    assert len({entry["to"] for entry in log[:4]}) == 4
    for launch in log[4:]:
        names = ("length", "span", "key_scale", "value_scale")
        assert [launch["arguments"][name] for name in names] == [entry["to"] for entry in log[:4]]


def test_a_builder_reads_zeros_for_lengths(library: Library) -> None:
    inputs = span_inputs(3, 1, 2, 64, (128, 200), torch.bfloat16, False)
    run_span(span_node(library, inputs, 4, (128, 200), building=True), inputs)
    zeros, decode, merge = [entry for entry in library.log() if "load" not in entry]
    assert (zeros["set"], zeros["value"]) == (12, 0)
    assert decode["arguments"]["length"] == merge["arguments"]["length"] == zeros["to"] != inputs["length"].data_ptr()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 1), (0, 7), (2, 0)])
def test_nothing_to_do_launches_nothing(library: Library, batch: int, tokens: int) -> None:
    inputs = span_inputs(batch, tokens, 2, 64, (128, 200), torch.bfloat16, False)
    run_span(span_node(library, inputs, 4, (128, 200)), inputs)
    assert [entry for entry in library.log() if "load" not in entry] == []


@pytest.mark.parametrize(
    ("capability", "arch", "image"),
    [(80, 80, "cubin"), (86, 86, "cubin"), (87, 86, "cubin"), (89, 89, "cubin"), (90, 90, "cubin"), (103, 80, "ptx"),
     (120, 120, "cubin"), (121, 86, "ptx")],
)  # fmt: skip
def test_what_loads_where_and_once(library: Library, capability: int, arch: int, image: str) -> None:
    """An ordinal of its own: what was loaded stays. PTX for 12.1 is the oldest whose prefill fits 99 KiB."""
    library.device(capability, 10, ordinal=capability)
    library.log()
    for tokens in (1, 9, 1):
        inputs = span_inputs(1, tokens, 1, 80, (128,), torch.float16, False)
        run_span(span_node(library, inputs, 1, (128,)), inputs)
    log = library.log()
    loads = [entry for entry in log if "load" in entry]
    assert sorted(entry["load"] for entry in loads) == [
        f"{name}_fp16_d80" for name in ("merge_chunks", "ring_update", "span_decode", "span_prefill")
    ]
    prefill = next(entry for entry in loads if entry["load"].startswith("span_prefill"))
    assert (prefill["arch"], prefill["image"]) == (arch, image)
    each = 3 if capability in (80, 87, 90, 103) else 2
    assert next(entry for entry in log if "kernel" in entry)["grid"] == [each * 10, 1, 1]


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (
            75,
            "no kernel span_decode_bf16_d64 runs on this GPU of compute capability 7.5: the library has it for sm_80, sm_86, "
            "sm_89, sm_90, sm_100, sm_120; build the library with more of ATTNSPAN_CUDA_ARCHS",
        ),
        (0, "cudaGetDevice: no device"),
    ],
)
def test_devices_without_kernels(library: Library, capability: int, message: str) -> None:
    library.device(capability, 10, ordinal=capability)
    inputs = span_inputs(1, 1, 1, 64, (128,), torch.bfloat16, False)
    with pytest.raises(Refused) as caught:
        run_span(span_node(library, inputs, 1, (128,)), inputs)
    assert str(caught.value) == message


def test_addresses_and_sizes_that_kernels_do_not_take(library: Library) -> None:
    library.device(90)
    inputs = span_inputs(1, 3, 1, 64, (128,), torch.bfloat16, False)
    node = span_node(library, inputs, 1, (128,))
    for instead, message in (
        ({"key": 24}, "SpanAttention: key is at address 24: must be a multiple of 16, and not 0"),
        ({"lse": 0}, "SpanAttention: lse is at address 0: must be a multiple of 16, and not 0"),
    ):
        with pytest.raises(Refused, match=message):
            run_span(node, inputs, **instead)
    at = run_span(node, inputs)
    ins, outs = [at[name] for name in inputs], [4096, at["key_cache"], at["value_cache"], 4096]
    library.log()
    for batch, tokens, message in (
        (1, 1 << 25, "SpanAttention: a row of query is 2147483648: must be below 2147483648"),
        (1 << 31, 1, "batch . kv_num_heads is 2147483648"),
    ):
        with pytest.raises(Refused, match=message):
            node.run(ins, outs, batch, tokens, at["workspace"])
    assert library.log() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bits", "signature_bits"])
def test_lsh_hash(host: Host, library: Library, kind: str, dtype: torch.dtype) -> None:
    for dim in HEAD_DIMS:
        for batch, tokens, heads, size in ((2, 7, 3, 64), (1, 65, 5, 128), (3, 1, 1, 256)):
            options = {"signature_bits": size} if kind == "signature_bits" else {"bits": size // 32 + 1, "tables": size // 2}
            columns = options.get("signature_bits") or options["bits"] * options["tables"]
            x = torch.empty(batch, tokens, heads * dim, dtype=dtype)
            projection, mean = torch.empty(dim, columns), torch.empty(batch, heads, dim)
            kernels.lsh_hash(x, projection, num_heads=heads, mean=mean, **options)
            library.device(host.arch)
            node = Node(library, schema.LSH_HASH, {"num_heads": heads} | options, [NAMES[dtype], "float32", "float32"],
                        [tuple(t.shape) for t in (x, projection, mean)])  # fmt: skip
            assert node.text()[0] == ["int32"]
            node.run([t.data_ptr() for t in (x, projection, mean)], [4096], batch, tokens, 0)
            assert node.workspace(batch) == 0
            compare(host, library, "", {"codes": 4096}, stream=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_attention(host: Host, library: Library, dtype: torch.dtype) -> None:
    for dim in HEAD_DIMS:
        for batch, tokens, heads in ((2, 7, 3), (1, 65, 5), (3, 1, 32)):
            outputs = [torch.empty(batch, tokens, heads * dim, dtype=dtype) for _ in range(2)]
            lses = [torch.empty(batch, heads, tokens) for _ in range(2)]
            kernels.merge(outputs, lses)
            library.device(host.arch)
            tensors = [outputs[0], lses[0], outputs[1], lses[1]]
            node = Node(library, schema.MERGE_ATTENTION, {"num_heads": heads}, [NAMES[t.dtype] for t in tensors],
                        [tuple(t.shape) for t in tensors])  # fmt: skip
            node.run([t.data_ptr() for t in tensors], [4096, 8192], batch, tokens, 0)
            compare(host, library, f"{SUFFIX[dtype]}_d{dim}", {"output": 4096, "lse": 8192}, stream=0)


def test_workspace_equals_that_of_the_plugin_in_python(library: Library) -> None:
    """An engine fixes it when it is built, and either plugin runs the engine."""
    for batch, group, dim, capacity in ((1, 1, 64, (128,)), (7, 3, 80, (128, 200, 130)), (32, 8, 256, (128,) * 8)):
        inputs = span_inputs(1, 1, group, dim, capacity, torch.float16, False)
        node = span_node(library, inputs, group * len(capacity), capacity)
        values = schema.SPAN_ATTENTION.attributes_of(
            {"num_heads": group * len(capacity), "kv_num_heads": len(capacity), "capacity": list(capacity)}
        )
        python = SimpleNamespace(op=schema.SPAN_ATTENTION, values=values)
        most = [SimpleNamespace(max=(batch, *x.shape[1:])) for x in inputs.values()]
        assert node.workspace(batch) == Plugin.get_workspace_size(python, most, [])  # type: ignore[arg-type]


def test_under_the_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "launch_test"
    trt_launch.compile_cpp(program, "launch_test.cc", *trt_launch.SANITIZED)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" checks passed\n")

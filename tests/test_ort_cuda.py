"""The ops for ONNX Runtime's CUDA provider: what they launch, against the Python host functions, and what they refuse.

Without a GPU: ONNX Runtime's CPU wheel runs them as ops of the CPU provider, over the stand-in for the CUDA runtime.
"""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import ort_cuda
import pytest
import torch
import trt_launch
from ort_cuda import OrtLibrary, run
from torch import Tensor
from trt_host import SUFFIX, Host, compare, span_inputs

from attnspan.plugins.trt_sparse_attn import kernels, schema
from attnspan.plugins.trt_sparse_attn.kernels.common import HEAD_DIMS

pytestmark = pytest.mark.skipif(
    trt_launch.cuda_include() is None or ort_cuda.ort_include() is None,
    reason="no CUDA headers (cuda_runtime_api.h) or none of ONNX Runtime (ONNXRUNTIME_INCLUDE_DIR)",
)
CAPACITY = (128, 200)


@pytest.fixture(scope="module")
def library() -> OrtLibrary:
    return ort_cuda.library()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def span(inputs: dict[str, Tensor], lse: bool = True) -> tuple[dict[str, Any], list[Tensor]]:
    """Attributes of a SpanAttention node, and its outputs with caches in place."""
    batch, tokens, width = inputs["query"].shape
    heads = width // inputs["key_cache"].shape[-1]
    attributes = {"num_heads": heads, "kv_num_heads": len(CAPACITY), "capacity": list(CAPACITY)}
    outputs = [torch.empty_like(inputs["query"]), inputs["key_cache"], inputs["value_cache"]]
    return attributes, outputs + ([empty(batch, heads, tokens)] if lse else [])


def aligned(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """As on a GPU, where every tensor begins at a multiple of 256 bytes."""
    made = {}
    for name, tensor in inputs.items():
        room = torch.zeros(tensor.numel() + 256 // tensor.itemsize, dtype=tensor.dtype)
        first = -room.data_ptr() % 256 // tensor.itemsize
        made[name] = room[first : first + tensor.numel()].view(tensor.shape)
    return made


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_span_attention(host: Host, library: OrtLibrary, dtype: torch.dtype, fp8: bool, tokens: int) -> None:
    library.device(host.arch)
    for dim in HEAD_DIMS if dtype == torch.float16 else (64,):
        inputs = aligned(span_inputs(3, tokens, 2, dim, CAPACITY, dtype, fp8))
        attributes, outputs = span(inputs)
        numbers = {"capacity": torch.tensor(CAPACITY, dtype=torch.int32), "offset": torch.tensor([0, 128], dtype=torch.int32)}
        kernels.span_attention(**inputs, **numbers, num_heads=attributes["num_heads"], return_lse=True)
        library.log()
        run(library, schema.SPAN_ATTENTION, attributes, list(inputs.values()), outputs)
        own = {"output": outputs[0].data_ptr(), "lse": outputs[3].data_ptr()}
        found = compare(host, library, f"{SUFFIX[dtype]}{'_fp8' if fp8 else ''}_d{dim}", own, stream=0)
        assert set(found) == ({"span_decode", "merge_chunks"} if tokens == 1 else {"span_prefill", "ring_update"})
        if tokens == 1:
            assert found["merge_chunks"]["part"] == found["span_decode"]["part"] != 0


def launches(library: OrtLibrary) -> list[dict[str, Any]]:
    return [entry for entry in library.log() if "load" not in entry]


def test_a_node_without_lse_writes_it_to_scratch_memory(library: OrtLibrary) -> None:
    inputs = aligned(span_inputs(2, 5, 2, 64, CAPACITY, torch.bfloat16, False))
    attributes, outputs = span(inputs, lse=False)
    library.log()
    run(library, schema.SPAN_ATTENTION, attributes, list(inputs.values()), outputs)
    prefill, _ = launches(library)
    assert prefill["arguments"]["lse"] not in (0, *(t.data_ptr() for t in (*inputs.values(), *outputs)))
    assert prefill["arguments"]["lse"] % 16 == 0


def test_caches_elsewhere_are_copied_and_shapes_may_change_from_call_to_call(library: OrtLibrary) -> None:
    session = None
    for batch, tokens in ((1, 1), (3, 4), (1, 1)):
        inputs = aligned(span_inputs(batch, tokens, 1, 64, CAPACITY, torch.float16, False))
        attributes, outputs = span(inputs)
        outputs[2] = torch.empty_like(inputs["value_cache"])
        library.log()
        session = run(library, schema.SPAN_ATTENTION, attributes, list(inputs.values()), outputs, session)
        copy, *others = launches(library)
        assert (copy["from"], copy["to"]) == (inputs["value_cache"].data_ptr(), outputs[2].data_ptr())
        assert copy["copy"] == inputs["value_cache"].nbytes
        assert {entry["arguments"]["pairs"] for entry in others} == {2 * batch}
        assert others[-1]["arguments"]["value_cache"] == outputs[2].data_ptr()


def test_caches_of_four_axes(library: OrtLibrary) -> None:
    """As onnxruntime-genai binds them."""
    inputs = aligned(span_inputs(2, 1, 1, 64, CAPACITY, torch.float16, False))
    for name in ("key_cache", "value_cache"):
        inputs[name] = inputs[name][:, :, None]
    attributes, outputs = span(inputs)
    library.log()
    run(library, schema.SPAN_ATTENTION, attributes, list(inputs.values()), outputs)
    assert [entry["kernel"] for entry in launches(library)] == ["span_decode_fp16_d64", "merge_chunks_fp16_d64"]


def test_scratch_parts_lie_apart(library: OrtLibrary) -> None:
    """Parts of a decode step, copies of words that begin anywhere, lse: all in one piece of scratch memory."""
    inputs = aligned(span_inputs(3, 1, 2, 64, CAPACITY, torch.bfloat16, True))
    words = {name: torch.zeros(inputs[name].numel() + 64, dtype=inputs[name].dtype) for name in ("length", "span", "key_scale")}
    for name, room in words.items():
        first = -room.data_ptr() % 16 // 4 + 1
        inputs[name] = room[first : first + inputs[name].numel()].view(inputs[name].shape)
    attributes, outputs = span(inputs, lse=False)
    library.log()
    run(library, schema.SPAN_ATTENTION, attributes, list(inputs.values()), outputs)
    *copies, decode, merge = launches(library)
    assert len(copies) == 3
    given = decode["arguments"]
    rows = (merge["arguments"]["workers"] + 6) * 2
    parts = [(given["part"], rows * 64 * 4), (given["part_lse"], rows * 4), (merge["arguments"]["lse"], 3 * 4 * 4)]
    parts += [(copy["to"], copy["copy"]) for copy in copies]
    parts.sort()
    assert all(at + size <= following for (at, size), (following, _) in pairwise(parts))


class Replayed:
    """A log that was read already."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries

    def log(self) -> list[dict[str, Any]]:
        return self.entries


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("options", [{"signature_bits": 128}, {"bits": 5, "tables": 6}])
def test_lsh_hash(host: Host, library: OrtLibrary, options: dict[str, int], with_mean: bool) -> None:
    columns = options.get("signature_bits") or options["bits"] * options["tables"]
    x, projection = aligned({"x": empty(2, 7, 3 * 80, dtype=torch.bfloat16), "projection": empty(80, columns)}).values()
    (mean,) = aligned({"mean": empty(2, 3, 80)}).values()
    codes = empty(2, 7, 3, 4 if "signature_bits" in options else 3, dtype=torch.int32)
    kernels.lsh_hash(x, projection, num_heads=3, mean=mean, **options)
    library.device(host.arch)
    library.log()
    given = [x, projection, mean] if with_mean else [x, projection]
    run(library, schema.LSH_HASH, {"num_heads": 3} | options, given, [codes])
    done = library.log()
    zeros = [entry for entry in done if "set" in entry]
    assert [(entry["set"], entry["value"]) for entry in zeros] == ([] if with_mean else [(2 * 3 * 80 * 4, 0)])
    own = {"codes": codes.data_ptr()} | ({"mean": zeros[0]["to"]} if zeros else {})
    compare(host, Replayed(done), "", own, stream=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("with_lse", [False, True])
def test_merge_attention(host: Host, library: OrtLibrary, with_lse: bool) -> None:
    shapes = {"output_a": (2, 5, 3 * 64), "lse_a": (2, 3, 5), "output_b": (2, 5, 3 * 64), "lse_b": (2, 3, 5)}
    inputs = aligned({name: empty(*shape, dtype=torch.float16 if "output" in name else torch.float32)
                      for name, shape in shapes.items()})  # fmt: skip
    kernels.merge((inputs["output_a"], inputs["output_b"]), (inputs["lse_a"], inputs["lse_b"]))
    library.device(host.arch)
    outputs = [empty(2, 5, 3 * 64, dtype=torch.float16), empty(2, 3, 5)]
    library.log()
    run(library, schema.MERGE_ATTENTION, {"num_heads": 3}, list(inputs.values()), outputs[: 1 + with_lse])
    done = library.log()
    lse = next(entry for entry in done if "kernel" in entry)["arguments"]["lse"]
    assert lse == outputs[1].data_ptr() if with_lse else lse not in (0, outputs[1].data_ptr())
    copies = [entry for entry in done if "copy" in entry]  # of part b, which the CPU has computed
    assert [(entry["from"], entry["copy"]) for entry in copies] == [
        (inputs[name].data_ptr(), inputs[name].nbytes) for name in ("output_b", "lse_b")
    ]
    own = {"output": outputs[0].data_ptr(), "lse": lse, "b": copies[0]["to"], "b_lse": copies[1]["to"]}
    compare(host, Replayed(done), "fp16_d64", own, stream=0)  # type: ignore[arg-type]


def test_what_a_call_refuses(library: OrtLibrary) -> None:
    inputs = aligned(span_inputs(2, 3, 1, 64, CAPACITY, torch.float16, False))
    attributes, outputs = span(inputs)
    session = run(library, schema.SPAN_ATTENTION, attributes, list(inputs.values()), outputs)
    library.log()
    wrong = inputs | {"span": torch.zeros(2, 3, dtype=torch.int32)}
    with pytest.raises(Exception, match=r"attnspan\.SpanAttention: span has shape \[2, 3\]: must be \[batch, kv_num_heads\]"):
        run(library, schema.SPAN_ATTENTION, attributes, list(wrong.values()), outputs, session)
    assert library.log() == []
    run(library, schema.SPAN_ATTENTION, attributes, list(inputs.values()), outputs, session)  # the node goes on
    library.device(75, ordinal=75)
    with pytest.raises(Exception, match=r"no kernel span_decode_fp16_d64 runs on this GPU of compute capability 7\.5"):
        run(library, schema.SPAN_ATTENTION, attributes, list(inputs.values()), outputs)
    library.device(90)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity": [128, 100]}, r"attribute capacity is \(128, 100\): must be 2 numbers"),
        ({"softcap": 3.0}, r"attribute softcap is 3\.0: must be 0"),
        ({"kv_num_heads": 3}, r"attribute kv_num_heads is 3: must be a divisor of num_heads, 4"),
    ],
)
def test_what_a_session_refuses(library: OrtLibrary, change: dict[str, Any], message: str) -> None:
    kinds = [torch.float16] * 5 + [torch.int32] * 2
    attributes = {"num_heads": 4, "kv_num_heads": 2, "capacity": [128, 200]} | change
    with pytest.raises(Exception, match=r"attnspan\.SpanAttention: " + message):
        library.session(ort_cuda.model(schema.SPAN_ATTENTION, attributes, kinds, [torch.float16] * 3))


# ---- the whole library, with the ops for CPUs in the same domain ----

CORE = sorted(trt_launch.ROOT.glob("build/py3-*/cpu_runtime/libattnspan_core.a"))  # of make install
CPU = trt_launch.ROOT / "cpu_runtime/src"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As CMake builds it, but for the kernels' code and the CUDA runtime."""
    out = tmp_path_factory.mktemp("whole") / "libattnspan_ort_cuda.so"
    trt_launch.compile_cpp(out, None, "-O0", "-shared", "-Wl,-Bsymbolic", f"-isystem{ort_cuda.ort_include()}",
                           f"-I{CPU}", "-DATTNSPAN_ORT_CUDA", more=("ort_ops.cc",), end=[CPU / "ops.cc", CORE[-1]])  # fmt: skip
    return out


@pytest.mark.skipif(not CORE, reason="no build/py3-*/cpu_runtime/libattnspan_core.a: make install has not built it here")
class TestWholeLibrary:
    def test_without_a_cuda_provider_its_nodes_run_on_the_cpu(self, whole: Path) -> None:
        """In a process of its own. The same bits as from libattnspan_ort.so, and nothing is asked of a GPU."""
        done = subprocess.run([sys.executable, __file__, str(whole)], capture_output=True, text=True, timeout=120,
                              cwd=Path(__file__).parent)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "equal"

    def test_it_says_what_it_is(self, whole: Path) -> None:
        import ctypes

        version = ctypes.CDLL(str(whole)).attnspan_ort_cuda_version
        version.restype = ctypes.c_char_p
        pattern = rf"attnspan 1; schema {schema.digest()[:12]}; kernels [0-9a-f]{{16}}; ONNX Runtime headers 1\.\d+"
        assert re.fullmatch(pattern, version().decode())


def main(path: str) -> None:
    """SpanAttention of both libraries on the CPU provider, fp32 and fp16."""
    from attnspan.cpu_runtime.library import library_path

    for dtype in (np.float32, np.float16):
        kind = torch.float16 if dtype == np.float16 else torch.float32
        random = np.random.default_rng(0)
        feed = {name: random.standard_normal(shape).astype(dtype) for name, shape in (
            ("query", (2, 3, 256)), ("key", (2, 3, 128)), ("value", (2, 3, 128)), ("past_key", (2, 328, 64)),
            ("past_value", (2, 328, 64)))}  # fmt: skip
        feed |= {"length": np.array([0, 90], np.int32), "span": np.full((2, 2), 128, np.int32)}
        attributes = {"num_heads": 4, "kv_num_heads": 2, "capacity": list(CAPACITY)}
        kinds = [*[kind] * 5, torch.int32, torch.int32]
        node = ort_cuda.model(schema.SPAN_ATTENTION, attributes, kinds, [kind] * 3 + [torch.float32])
        results = []
        for library in (path, str(library_path())):
            options = ort.SessionOptions()
            options.register_custom_ops_library(library)
            session = ort.InferenceSession(node.SerializeToString(), options, providers=["CPUExecutionProvider"])
            results.append(session.run(None, feed))
        assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
        assert np.isfinite(results[0][3]).all()
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1])


def test_the_library_exports_what_the_package_asks_of_it() -> None:
    """The same names as the library without a GPU: Python reads figures from whichever is loaded."""
    names = re.findall(r'visibility\("default"\)\)\) [\w* ]*?(\w+)\(', (CPU / "ops.cc").read_text())
    exported = re.search(r"global: (.*);", (trt_launch.ROOT / "plugins/trt_sparse_attn/src/ort_exports.map").read_text())
    assert exported is not None
    assert {"RegisterCustomOps", "attnspan_lsh_profile", "attnspan_lsh_guarded"} <= set(names)
    for name in names:
        assert any(fnmatch(name, pattern) for pattern in exported[1].split("; "))

"""The plugin in Python: TensorRT-RTX parses it and builds with it, it refuses in its own words, and it runs the kernels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, Case, array, check
from trt_nodes import PROFILES, SPAN, save_node, types_of

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn import builder, plugin, plugin_launch, tensorrt_api
from attnspan.plugins.trt_sparse_attn.kernels import lsh_hash, merge
from attnspan.plugins.trt_sparse_attn.schema import LSH_HASH, MERGE_ATTENTION, NAMESPACE, OPS, SPAN_ATTENTION, Op, SchemaError
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Api

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

FP8 = "float8_e4m3fn"
HASH = {"num_heads": 4, "signature_bits": 128}
MERGE = {"num_heads": 4}


@pytest.fixture(scope="module")
def api() -> Api:
    api = tensorrt_api.load(rtx=True)
    plugin.register(api)
    return api


def build(api: Api, path: Path, arch: str = "80") -> memoryview:
    return builder.serialize(api, path, PROFILES, layers=1, arch=arch).engine


@pytest.mark.parametrize(
    ("op", "attributes", "kinds", "arch", "shapes"),
    [
        (SPAN_ATTENTION, SPAN, ("float16",), "80", {}),
        (SPAN_ATTENTION, SPAN | {"scale": 0.25, "softcap": 30.0, "sink": 4}, ("bfloat16",), "120", {}),
        (SPAN_ATTENTION, SPAN, ("bfloat16", FP8), "89", {}),
        (LSH_HASH, HASH, ("float16",), "80", {}),
        (LSH_HASH, {"num_heads": 4, "bits": 10, "tables": 8}, ("bfloat16",), "80", {"projection": [64, 80]}),
        (MERGE_ATTENTION, MERGE, ("bfloat16",), "80", {}),
    ],
    ids=lambda x: x.name if isinstance(x, Op) else "-".join(x) if isinstance(x, tuple) else "",
)
def test_tensorrt_builds(
    api: Api, tmp_path: Path, op: Op, attributes: dict[str, Any], kinds: tuple[str, ...], arch: str, shapes: dict[str, Any]
) -> None:
    """With dynamic batch and tokens, and caches that are inputs and outputs at once."""
    path = save_node(tmp_path / "node.onnx", op, attributes, types_of(op, *kinds), shapes)
    assert len(build(api, path, arch)) > 1000


def test_the_network_has_one_plugin_whose_outputs_follow_its_inputs(api: Api, tmp_path: Path) -> None:
    path = save_node(tmp_path / "node.onnx", SPAN_ATTENTION, SPAN, types_of(SPAN_ATTENTION, "bfloat16"))
    trt, logger = api.trt, api.logger(lambda *_: None)
    tensorrt = trt.Builder(logger)
    network = tensorrt.create_network(api.network_flags())
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    assert [layer.type for layer in layers] == [trt.LayerType.PLUGIN_V3]
    outputs = [layers[0].get_output(i) for i in range(layers[0].num_outputs)]
    assert [tuple(x.shape) for x in outputs] == [(-1, -1, 256), (-1, 320, 64), (-1, 320, 64), (-1, 4, -1)]
    assert [x.dtype for x in outputs] == [trt.bfloat16] * 3 + [trt.float32]


@pytest.mark.parametrize(
    ("op", "attributes", "kinds", "shapes", "message"),
    [
        (SPAN_ATTENTION, SPAN, ("float32",), {}, "SpanAttention: query is float32: must be float16 or bfloat16"),
        (SPAN_ATTENTION, SPAN, ("float16", "bfloat16"), {}, "SpanAttention: past_key is bfloat16: must be float16"),
        (SPAN_ATTENTION, SPAN | {"capacity": [128]}, ("float16",), {}, "attribute capacity is .* must be 2 numbers"),
        (SPAN_ATTENTION, {"num_heads": 4, "capacity": [128]}, ("float16",), {}, "attribute kv_num_heads is missing"),
        (SPAN_ATTENTION, SPAN, ("float16",), {"past_key": ["batch", 300, 64]}, r"past_key has shape \[\?, 300, 64\]"),
        (SPAN_ATTENTION, SPAN, ("float16",), {"query": ["batch", "sequence", 128]}, "a head has 32 elements: must be 64, 80"),
        (SPAN_ATTENTION, SPAN, ("float16",), {"length": ["batch", 1]}, r"length has 2 dimensions: must be \[batch\]"),
        (SPAN_ATTENTION, SPAN, ("float16",), {"length": [3]}, r"length has shape \[3\]: must be \[batch\], batch = [14]"),
        (LSH_HASH, HASH | {"bits": 3}, ("float16",), {}, "LshHash: attribute bits is 3: must be 0"),
        (MERGE_ATTENTION, MERGE, ("float16",), {"lse_b": ["batch", 3, "sequence"]}, "lse_b has shape .* num_heads = 4"),
    ],
    ids=lambda x: x[:30] if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused_in_the_plugins_words(
    api: Api, tmp_path: Path, capfd: pytest.CaptureFixture[str], op: Op, attributes: dict[str, Any], kinds: tuple[str, ...],
    shapes: dict[str, Any], message: str,
) -> None:  # fmt: skip
    path = save_node(tmp_path / "node.onnx", op, attributes, types_of(op, *kinds), shapes)
    with pytest.raises(UserError, match=message):
        build(api, path)
    assert capfd.readouterr() == ("", "")


def test_what_tensorrt_refuses_is_told(api: Api, tmp_path: Path) -> None:
    path = save_node(tmp_path / "node.onnx", SPAN_ATTENTION, SPAN, types_of(SPAN_ATTENTION), domain="elsewhere")
    with pytest.raises(UserError, match=r"node\.onnx cannot be parsed: node node: .*Plugin not found.*\(TensorRT-RTX 1\."):
        build(api, path)


def test_without_a_builder_of_ours_a_refusal_raises(api: Api) -> None:
    one = plugin.new_plugin(api, MERGE_ATTENTION, MERGE_ATTENTION.attributes_of(MERGE), True)
    with pytest.raises(SchemaError, match="output_a is int32"):
        one.get_output_data_types([api.trt.int32] * 4)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_what_is_serialised_makes_the_same_plugin(api: Api, op: Op) -> None:
    given = {SPAN_ATTENTION: SPAN | {"scale": 0.125, "softcap": 50.0, "sink": 7}, LSH_HASH: HASH, MERGE_ATTENTION: MERGE}[op]
    first = plugin.new_plugin(api, op, op.attributes_of(given), True)
    creator = next(x for x in api.registry().all_creators if (x.name, x.plugin_namespace) == (op.name, NAMESPACE))
    second = creator.create_plugin("", first.get_fields_to_serialize(), api.trt.TensorRTPhase.RUNTIME)
    assert (second.values, second.building) == (first.values, False)
    assert (second.plugin_name, second.plugin_namespace, second.plugin_version) == (op.name, "attnspan", "1")
    assert second.clone().values == first.values
    aliases = [second.get_aliased_input(i) for i in range(second.num_outputs)]
    assert aliases == ([-1, 3, 4, -1] if op is SPAN_ATTENTION else [-1] * len(op.outputs))


def descriptions(api: Api, tensors: list[torch.Tensor]) -> list[Any]:
    kinds = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float8_e4m3fn: FP8, torch.int32: "int32",
             torch.float32: "float32"}  # fmt: skip
    return [SimpleNamespace(dims=tuple(x.shape), max=tuple(x.shape), type=api.as_data_type(kinds[x.dtype])) for x in tensors]


def run(api: Api, op: Op, attributes: dict[str, Any], inputs: list[torch.Tensor], outputs: list[torch.Tensor],
        building: bool = False) -> None:  # fmt: skip
    """As TensorRT runs a plugin: shapes, then addresses."""
    one = plugin.new_plugin(api, op, op.attributes_of(attributes), building).attach_to_context(None)
    given, results = descriptions(api, inputs), descriptions(api, outputs)
    one.on_shape_change(given, results)
    size = one.get_workspace_size(given, results)
    workspace = torch.full((size // 4 + 4,), torch.nan, device=DEVICE)
    stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
    one.enqueue(given, results, [x.data_ptr() for x in inputs], [x.data_ptr() for x in outputs], workspace.data_ptr(), stream)
    assert workspace[size // 4 :].isnan().all()


def run_span(api: Api, case: Case, presents: list[torch.Tensor] | None = None, building: bool = False) -> list[torch.Tensor]:
    x = case.inputs
    names = ["query", "key", "value", "key_cache", "value_cache", "length", "span", *(["key_scale", "value_scale"] * case.fp8)]
    kv_heads = len(case.capacity)
    output = torch.full_like(x["query"], torch.nan)
    lse = torch.full((len(case.length), kv_heads * case.group, case.tokens), torch.nan, device=DEVICE)
    attributes = {"num_heads": kv_heads * case.group, "kv_num_heads": kv_heads, "capacity": case.capacity, "sink": case.sink,
                  "scale": case.scale or 0.0, "softcap": case.softcap}  # fmt: skip
    results = [output, *(presents or [x["key_cache"], x["value_cache"]]), lse]
    run(api, SPAN_ATTENTION, attributes, [x[name] for name in names], results, building)
    return results


CASES = {
    "step": Case([70, 3, 260], [[192, 130], [192, 130], [128, 130]], [192, 130]),
    "chunk": Case([70, 190], [[192, 130]] * 2, [192, 130], tokens=9, dtype=torch.bfloat16, group=3),
    "e4m3": Case([200, 64], [[192, 160]] * 2, [192, 160], fp8=True, dim=128),
    "softcap": Case([150], [[130, 192]], [130, 192], tokens=3, softcap=20.0, scale=0.3, sink=8),
}


@pytest.mark.parametrize("name", CASES)
def test_span_attention_is_the_reference(api: Api, name: str) -> None:
    case = CASES[name]
    want = case.reference()
    output, key_cache, value_cache, lse = run_span(api, case)
    check(case, want, output, lse)
    np.testing.assert_array_equal(array(key_cache), want["key_cache"])
    np.testing.assert_array_equal(array(value_cache), want["value_cache"])


def test_caches_that_are_not_in_place_are_copied(api: Api) -> None:
    case = Case([70, 190], [[192, 130]] * 2, [192, 130], tokens=2)
    before, want = {name: x.clone() for name, x in case.inputs.items()}, case.reference()
    presents = [torch.zeros_like(case.inputs["key_cache"]) for _ in range(2)]
    output, *_ = run_span(api, case, presents)
    check(case, want, output)
    for name, present in zip(("key_cache", "value_cache"), presents, strict=True):
        np.testing.assert_array_equal(array(present), want[name])
        np.testing.assert_array_equal(array(case.inputs[name]), array(before[name]))


def test_a_builder_may_time_the_plugin_on_any_length(api: Api) -> None:
    """Lengths that nobody set: read as 0, so that no address depends on them."""
    case = Case([0, 0], [[192, 130]] * 2, [192, 130], tokens=2)
    want = case.reference()
    case.inputs["length"].fill_(-2_000_000_000)
    output, *_ = run_span(api, case, building=True)
    check(case, want, output)


@pytest.mark.parametrize("kind", [{"signature_bits": 64}, {"bits": 5, "tables": 6}], ids=["signatures", "tables"])
def test_lsh_hash_is_the_kernel(api: Api, kind: dict[str, int]) -> None:
    columns = kind.get("signature_bits") or kind["bits"] * kind["tables"]
    x = torch.randn(2, 5, 3 * 64, device=DEVICE).half()
    projection, mean = torch.randn(64, columns, device=DEVICE), torch.randn(2, 3, 64, device=DEVICE)
    codes = torch.zeros(2, 5, 3, columns // 32 if "bits" not in kind else 3, dtype=torch.int32, device=DEVICE)
    run(api, LSH_HASH, {"num_heads": 3, **kind}, [x, projection, mean], [codes])
    want = lsh_hash(x, projection, num_heads=3, mean=mean, **kind)
    assert torch.equal(codes.view(want.dtype), want)
    assert codes.any()


def test_merge_attention_is_the_kernel(api: Api) -> None:
    outputs = [torch.randn(2, 3, 2 * 64, device=DEVICE).bfloat16() for _ in range(2)]
    lses = [torch.randn(2, 2, 3, device=DEVICE) for _ in range(2)]
    output, lse = torch.zeros_like(outputs[0]), torch.zeros_like(lses[0])
    run(api, MERGE_ATTENTION, {"num_heads": 2}, [outputs[0], lses[0], outputs[1], lses[1]], [output, lse])
    want, want_lse = merge(outputs, lses)
    assert torch.equal(output, want)
    assert torch.equal(lse, want_lse)
    assert output.any()


def test_memory_of_others_is_not_copied() -> None:
    x = torch.arange(6, dtype=torch.int32, device=DEVICE)
    view = plugin_launch.tensor(x.data_ptr(), (2, 3), "int32")
    view[1, 2] = 99
    assert x[5] == 99
    assert plugin_launch.tensor(0, (0, 3), "bfloat16").shape == (0, 3)

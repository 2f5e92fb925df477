"""Target `tensorrt`: a strongly typed graph whose weights stay beside it, computing what the model computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from safetensors.numpy import load_file
from tiny_models import export_rules, export_tiny, save_tiny_model

from attnspan.export import artefact as artefact_module
from attnspan.export import verify_worker
from attnspan.export.frontends.build import build
from attnspan.export.ops import register_schemas
from attnspan.export.pipeline import Exported, Options, export_model
from attnspan.export.rewrite.surgery import compute_norms_in_fp32
from attnspan.export.rewrite.tensorrt import rewrite_tensorrt
from attnspan.export.source import open_source
from attnspan.export.verify import TOLERANCE, VerificationError, check, text
from attnspan.export.verify_stand_in import stand_in
from attnspan.planner.errors import UserError
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.planner.uniform import uniform
from attnspan.plugins.trt_sparse_attn.schema import SPAN_ATTENTION
from attnspan.runtime.artefact import Artefact

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
CACHES = [f"{kind}.{i}" for i in range(2) for kind in ("key", "value")]


def export(folder: Path, family: str, dtype: str | None = None, **options: object) -> Exported:
    return export_tiny(folder, family, target="tensorrt", dtype=dtype, cache_dtype=None, **options)


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A qwen3 of 2 layers, spans 0.25 and 0.75; it has norms of queries and keys, too."""
    return export(tmp_path_factory.mktemp(request.param), "qwen3", request.param)


def values(model: onnx.ModelProto) -> dict[str, tuple[int, list[int | str]]]:
    """Type and shape of every value of a model, by strict inference from its inputs and weights alone."""
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    found = {x.name: (x.data_type, list(x.dims)) for x in inferred.initializer}
    for x in (*inferred.input, *inferred.output, *inferred.value_info):
        shape = x.type.tensor_type.shape
        found[x.name] = (x.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in shape.dim])
    return found


def test_inputs_and_outputs(exported: Exported) -> None:
    model = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    kind = TYPES[exported.form.dtype]
    cache = (kind, ["batch", 128 + 384, 32])
    found = values(model)
    assert {x.name: found[x.name] for x in model.graph.input} == {
        "input_ids": (TensorProto.INT64, ["batch", "sequence"]),
        "length": (TensorProto.INT32, ["batch"]),
        "span": (TensorProto.INT32, [2, "batch", 2]),
        "logits_to_keep": (TensorProto.INT64, [1]),
    } | {f"past_{name}": cache for name in CACHES}
    assert {x.name: found[x.name] for x in model.graph.output} == {"logits": (TensorProto.FLOAT, ["batch", "kept", 300])} | {
        f"present_{name}": cache for name in CACHES
    }
    assert [x.name for x in model.graph.input][4:] == [f"past_{name}" for name in CACHES]
    assert [x.name for x in model.graph.output][1:] == [f"present_{name}" for name in CACHES]


def test_every_value_has_its_type(exported: Exported) -> None:
    """Norms, angles and logits in fp32, all other arithmetic in the model's type: TensorRT computes what the file says."""
    register_schemas()
    onnx.checker.check_model(exported.folder / "model.onnx", full_check=True)
    model = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    kind, found = TYPES[exported.form.dtype], values(model)
    nodes = model.graph.node
    assert {x for node in nodes for x in (*node.input, *node.output)} <= set(found)
    wide: Counter[str] = Counter()
    for node in nodes:
        types = {found[x][0] for x in (*node.input, *node.output)} - {TensorProto.INT64, TensorProto.INT32}
        if node.op_type == "SpanAttention":
            types.remove(TensorProto.FLOAT)  # its unused lse
        if node.op_type != "Cast" and types and types != {kind}:
            assert types == {TensorProto.FLOAT}, node.name
            wide[node.op_type] += 1
    assert wide == {"RMSNormalization": 2 * 4 + 1, "Unsqueeze": 1, "Mul": 3, "Cos": 1, "Sin": 1}  # the latter: angles
    assert {x.data_type for x in model.graph.initializer} == {kind, TensorProto.FLOAT, TensorProto.INT64}
    wide_weights = [x.name for x in model.graph.initializer if x.data_type == TensorProto.FLOAT]
    assert all("constant" in name for name in wide_weights)


def test_attention_is_a_plugin_node(exported: Exported) -> None:
    """Domain and name as the plugin's, no body that a parser might inline, caches and lengths straight from the inputs."""
    model = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    assert {(x.domain, x.version) for x in model.opset_import} == {("", 24), ("attnspan", 1)}
    assert model.ir_version <= 13
    assert not model.functions
    ours = [x for x in model.graph.node if x.domain]
    assert [(x.domain, x.op_type, x.name) for x in ours] == [
        ("attnspan", "SpanAttention", f"layers.{i}.attention") for i in range(2)
    ]
    for i, node in enumerate(ours):
        assert list(node.input[:6]) == [
            *(f"layers.{i}.{kind}" for kind in ("query", "key", "value")),
            f"past_key.{i}",
            f"past_value.{i}",
            "length",
        ]
        assert list(node.output[1:]) == [f"present_key.{i}", f"present_value.{i}", f"layers.{i}.attention.lse"]
        attributes = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        assert attributes["capacity"] == [128, 384]
        assert (attributes["num_heads"], attributes["kv_num_heads"], attributes["sink"]) == (4, 2, 64)


def test_weights_load_again(exported: Exported) -> None:
    """The file went through graphsurgeon without its weights: they are still there, and those of the checkpoint, rounded."""
    model = exported.folder / "model.onnx"
    assert model.stat().st_size < 100_000
    stored = onnx.load(model)
    assert {x.name for x in stored.graph.initializer if x.name.startswith(("model.", "lm_head."))} == {
        *load_file(exported.folder.parent / "model" / "model.safetensors")
    }
    weights = {x.name: x.const_value for x in ir.load(model).graph.initializers.values()}
    for name, tensor in load_file(exported.folder.parent / "model" / "model.safetensors").items():
        rounded = tensor.astype(weights[name].dtype.numpy())
        np.testing.assert_array_equal(weights[name].numpy().view(np.uint16), rounded.view(np.uint16), err_msg=name)


def test_surgery_reads_no_weights(tmp_path: Path) -> None:
    """It works where the file of the weights is missing, and refers to every weight as before."""
    source = open_source(str(save_tiny_model(tmp_path / "model")))
    model = build(source.config, source.weights, 512, ir.DataType.BFLOAT16)
    rewrite_tensorrt(model, uniform(source.shape, 0.5, 512), ir.DataType.BFLOAT16)
    artefact_module.write_model(model, tmp_path)
    (tmp_path / "model.onnx.data").unlink()

    def references() -> dict[str, list[tuple[str, str]]]:
        stored = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
        return {x.name: [(e.key, e.value) for e in x.external_data] for x in stored}

    before = references()
    compute_norms_in_fp32(tmp_path / "model.onnx", ir.DataType.BFLOAT16)
    assert references() == before
    assert before["lm_head.weight"]


def test_description(exported: Exported) -> None:
    artefact = Artefact.load(exported.folder)
    artefact.check_hashes()
    name = {"fp16": "float16", "bf16": "bfloat16"}[exported.form.dtype]
    reshape = next(x for x in ir.load(exported.folder / "model.onnx").graph if "logits" in x.outputs[0].name)
    assert (reshape.op_type, reshape.attributes["allowzero"].as_int()) == ("Reshape", 1)
    assert (artefact.target, artefact.dtype, artefact.cache_dtype, artefact.library) == ("tensorrt", name, name, None)
    assert artefact.kv_bytes() == exported.form.cache_bytes(exported.plan, 32) == 2 * 2 * (128 + 384) * 32 * 2


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "fp16"), ("qwen3", "fp16"), ("qwen2", "bf16"), ("llama-biased", "bf16"), ("qwen3", "bf16")]
)
def test_right_graphs_pass(family: str, dtype: str, tmp_path: Path) -> None:
    """fp16 as it is, bf16 in fp32 arithmetic, against PyTorch with rounded weights: rings wrap, rows are ragged."""
    done = export(tmp_path, family, dtype)
    with stand_in(done.folder) as folder:
        artefact = Artefact.load(folder)
        assert artefact.cache_dtype == {"fp16": "float16", "bf16": "float32"}[dtype]
        rows = verify_worker.compare(artefact, tmp_path / "model", 400)
    for row in rows:
        check(row, TOLERANCE[artefact.cache_dtype])
    assert [row.prompt for row in rows] == [400, 133, 7]
    assert rows[0].wrapped == 4
    assert {x.name for x in tmp_path.iterdir()} == {"model", "artefact", "tiny-plan.json"}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_portable_graphs_for_tensorrt_pass(dtype: str, tmp_path: Path) -> None:
    """Target portable in 16 bits is verified likewise."""
    done = export_tiny(tmp_path, "qwen3", target="portable", dtype=dtype, cache_dtype=None, chunk=64)
    with stand_in(done.folder) as folder:
        artefact = Artefact.load(folder)
        assert (artefact.target, artefact.cache_dtype) == ("portable", {"fp16": "float16", "bf16": "float32"}[dtype])
        for row in verify_worker.compare(artefact, tmp_path / "model", 400, 4):
            check(row, TOLERANCE[artefact.cache_dtype])


@pytest.mark.model
def test_demo_model(tmp_path: Path) -> None:
    """Two layers of real weights."""
    from demo_model import gguf

    options = Options(str(gguf()), tmp_path / "out", target="tensorrt", dtype="fp16", density=0.25, n_max=1024, num_layers=2)
    done = export_model(options)
    onnx.checker.check_model(done.folder / "model.onnx", full_check=True)
    with stand_in(done.folder) as folder:
        artefact = Artefact.load(folder)
        rows = verify_worker.compare(artefact, gguf(), 300, 8)
    for row in rows:
        check(row, TOLERANCE[artefact.cache_dtype])
    assert rows[0].wrapped == 2 * 3


def test_without_the_op_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bodies of the ops are as good."""

    def missing() -> Path:
        raise UserError("not installed")

    monkeypatch.setattr("attnspan.export.verify_stand_in.library_path", missing)
    done = export(tmp_path, "llama", "fp16")
    with stand_in(done.folder) as folder:
        artefact = Artefact.load(folder)
        assert artefact.library is None
        for row in verify_worker.compare(artefact, tmp_path / "model", 100, 4):
            check(row, TOLERANCE["float16"])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_wrong_graph_is_noticed(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = artefact_module.write_model

    def wrong(model: ir.Model, folder: Path) -> dict[str, object]:
        """Attention of layer 1 that forgets its sinks."""
        node = next(x for x in model.graph if x.name == "layers.1.attention")
        node.attributes["sink"] = ir.AttrInt64("sink", 1)
        return write(model, folder)

    monkeypatch.setattr(artefact_module, "write_model", wrong)
    done = export(tmp_path, "llama", dtype)
    with stand_in(done.folder) as folder:
        artefact = Artefact.load(folder)
        rows = verify_worker.compare(artefact, tmp_path / "model", 400)
    with pytest.raises(VerificationError, match="99th percentile"):
        check(rows[0], TOLERANCE[artefact.cache_dtype])


def test_export_verifies_and_says_what_ran(tmp_path: Path) -> None:
    done = export(tmp_path, "llama", verify_tokens=200)
    assert done.form.dtype == done.form.cache_dtype == "bf16"
    report = Artefact.load(done.folder).info["verify"]
    assert "ONNX Runtime on the CPU: the graph and its bfloat16 weights, computed in fp32 with an fp32 cache" in text(report)
    assert {x.name for x in tmp_path.iterdir()} == {"model", "artefact", "tiny-plan.json"}


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_heads_that_sample_are_refused(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact_module, "write_model", lambda *_: pytest.fail("weights were written"))
    dense, sampled = HeadRule("dense"), HeadRule("lsh", lsh=LshParams("exact", 64))
    rules = [[dense, dense], [dense, sampled]]
    with pytest.raises(
        UserError, match=f"KV head 1 of layer 1 has mode 'lsh': target '{target}' takes 'span' and 'dense'.*change"
    ):
        export_rules(tmp_path, rules, target=target, cache_dtype=None)


def test_every_attribute_is_written(exported: Exported) -> None:
    """Those at their defaults too: TensorRT warns of each that a plugin node lacks."""
    nodes = [x for x in onnx.load(exported.folder / "model.onnx", load_external_data=False).graph.node if x.domain]
    assert len(nodes) == 2
    for node in nodes:
        assert {x.name for x in node.attribute} == {x.name for x in SPAN_ATTENTION.attributes}

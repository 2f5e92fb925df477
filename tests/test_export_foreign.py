"""Foreign ONNX files: lifted, they compute what they did; under a plan, what `build` makes of the model; or are refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from foreign_graphs import Form, write_foreign
from tiny_models import save_tiny_model

from attnspan.cpu_runtime.session import Session
from attnspan.export.frontends.build import build
from attnspan.export.frontends.foreign.open import Lifted, is_onnx, open_onnx
from attnspan.export.frontends.foreign.verify import FileSession, kept_whole
from attnspan.export.pipeline import Options, export_model
from attnspan.export.rewrite.cpu import rewrite_cpu
from attnspan.export.source import open_source
from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.uniform import uniform

TOLERANCE = 2e-5  # fp32 against fp32
N_MAX = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with two query heads for each KV head."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def some_ids(batch: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, tokens))


def run_file(file: Path, ids: np.ndarray, shape: ModelShape) -> np.ndarray:
    """The file as it is, row by row, in chunks of 20, 1 and the rest."""
    session, rows = FileSession(file), []
    for row in ids.tolist():
        session.start(shape.kv_heads, shape.head_dim or 0)
        rows.append(np.concatenate([session(row[:20]), session(row[20:21]), session(row[21:])]))
    return np.stack(rows)


def run_normal(lifted: Lifted, ids: np.ndarray, folder: Path) -> np.ndarray:
    """The normal form, all rows at once, in the same chunks; the last with logits of few rows only."""
    file = folder / "normal.onnx"
    ir.save(lifted.model, file, external_data="normal.onnx.data")
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    shape = (len(ids), lifted.shape.kv_heads, 0, lifted.shape.head_dim)
    past = {x.name: np.zeros(shape, np.float32) for x in session.get_inputs() if x.name.startswith("past_")}
    parts = []
    for first, end in ((0, 20), (20, 21), (21, ids.shape[1])):
        at = np.tile(np.arange(first, end), (len(ids), 1))
        feeds = past | {"input_ids": ids[:, first:end], "position_ids": at, "logits_to_keep": np.array([end - first])}
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        parts.append(outputs.pop("logits"))
        past = {name.replace("present", "past"): x for name, x in outputs.items()}
    feeds["logits_to_keep"] = np.array([2])
    (last,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(last, parts[-1][:, -2:], atol=TOLERANCE)
    return np.concatenate(parts, axis=1)


FORMS = {
    "genai": Form("genai"),
    "genai-capped": Form("genai", softcap=5.0),
    "parts": Form("parts", opset=18),
    "parts-counting": Form("parts", opset=18, positions=False),
    "parts-capped": Form("parts", opset=20, softcap=5.0),
    "attention": Form("attention", opset=23),
    "attention-counting": Form("attention", opset=24, positions=False),
    "fused": Form("fused", opset=23, softcap=5.0),
    "plain": Form("plain", opset=18),
}


@pytest.mark.parametrize("name", FORMS)
def test_lifted_computes_the_same(name: str, model: Path, tmp_path: Path) -> None:
    """A batch against its rows alone, prompt, one token, several tokens."""
    file = write_foreign(tmp_path / "foreign", model, FORMS[name])
    source, lifted = open_onnx(str(file))
    assert source.shape == dataclasses.replace(open_source(str(model)).shape, id="foreign")
    assert lifted.windows == (None, None)
    assert {node.domain for node in lifted.model.graph} == {""}
    assert [x.name for x in lifted.model.graph if x.op_type == "Attention"] == ["layers.0.attention", "layers.1.attention"]
    ids = some_ids(3, 29)
    np.testing.assert_allclose(run_normal(lifted, ids, tmp_path), run_file(file, ids, source.shape), atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["genai", "parts", "attention"])
def test_windows_are_found(kind: str, model: Path, tmp_path: Path) -> None:
    """Of masks in parts, and of those inside an op; a plan then never keeps more."""
    file = write_foreign(tmp_path / "foreign", model, Form(kind, opset=23, window=100))
    _, lifted = open_onnx(str(file))
    assert lifted.windows == (100, 100)


@pytest.mark.parametrize("kind", ["genai", "parts"])
def test_under_a_plan_as_built(kind: str, model: Path, tmp_path: Path) -> None:
    """Graphs that were lifted and built give the same logits, far beyond the spans of the plan."""
    source = open_source(str(model))
    plan = uniform(source.shape, 0.3, N_MAX, 0.1)
    foreign, lifted = open_onnx(str(write_foreign(tmp_path / "foreign", model, Form(kind, opset=20))))
    plan.check_model(foreign.shape)
    ids = some_ids(2, 400)
    got = [run_planned(x, plan, ids, tmp_path) for x in (lifted.model, build(source.config, source.weights, N_MAX))]
    np.testing.assert_allclose(got[0], got[1], atol=5 * TOLERANCE)
    np.testing.assert_array_equal(got[0].argmax(-1), got[1].argmax(-1))


def run_planned(normal: ir.Model, plan: Plan, ids: np.ndarray, folder: Path) -> np.ndarray:
    """Logits of a text in chunks of 300 and 99 tokens and one token, by the ops' bodies in the `cpu` form."""
    rewrite_cpu(normal, plan, ir.DataType.FLOAT)
    file = folder / "planned.onnx"
    ir.save(normal, file, external_data="planned.onnx.data")
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    caches = {x.name: np.zeros((len(ids), *x.shape[1:]), np.float32) for x in session.get_inputs() if x.name.startswith("past_")}
    parts = []
    for first, end in ((0, 300), (300, 399), (399, 400)):
        span = np.broadcast_to(plan.spans(end)[:, None], (plan.model.layers, len(ids), plan.model.kv_heads))
        feeds = caches | {"input_ids": ids[:, first:end], "logits_to_keep": np.array([0]), "span": np.ascontiguousarray(span)}
        feeds["length"] = np.full(len(ids), first, np.int32)
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        parts.append(outputs.pop("logits"))
        caches = {name.replace("present", "past"): x for name, x in outputs.items()}
    return np.concatenate(parts, axis=1)


def test_halves_are_widened(model: Path, tmp_path: Path) -> None:
    """A file in fp16 with an fp16 cache becomes a normal form in fp32; its weights are still read one by one."""
    file = write_foreign(tmp_path / "foreign", model, FORMS["parts"])
    halved = ir.load(file)
    for x in halved.graph.initializers.values():
        if x.dtype == ir.DataType.FLOAT:
            x.const_value = ir.tensor(x.const_value.numpy().clip(-6e4, 6e4).astype(np.float16))
            x.dtype = ir.DataType.FLOAT16
    for x in (*halved.graph.inputs, *halved.graph.outputs):
        x.dtype = ir.DataType.FLOAT16 if x.dtype == ir.DataType.FLOAT else x.dtype
    for node in halved.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((model / "config.json").read_bytes())
    ir.save(halved, tmp_path / "half" / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=256)
    ids, (_, lifted) = some_ids(1, 29), open_onnx(str(tmp_path / "half" / "model.onnx"))
    kinds = {x.dtype for node in lifted.model.graph for x in node.outputs}
    assert ir.DataType.FLOAT16 not in kinds
    wanted = run_file(file, ids, lifted.shape)
    np.testing.assert_allclose(run_normal(lifted, ids, tmp_path), wanted, atol=0.05)  # weights of 11 bits


def test_export_runs_and_is_verified(model: Path, tmp_path: Path) -> None:
    """The whole command: an artefact that the session runs and that was compared with the file; the plan is the model's."""
    file = write_foreign(tmp_path / "foreign", model, FORMS["genai"])
    plan = tmp_path / "plan.json"
    uniform(open_source(str(model)).shape, 0.5, N_MAX, 0.25).save(plan)
    common: dict[str, Any] = {"plan": plan, "cache_dtype": "fp32", "verify_tokens": 64}
    done = export_model(Options(model=str(file.parent), out=tmp_path / "artefact", **common))
    rows = done.description["verify"]["rows"]
    assert [row["same_tokens"] for row in rows] == [row["generated"] for row in rows]
    assert max(row["prompt"] for row in rows) == 64
    built = export_model(Options(model=str(model), out=tmp_path / "built", **(common | {"verify_tokens": None})))
    ids = some_ids(1, 450)[0].tolist()
    chosen = []
    for folder in (done.folder, built.folder):
        session = Session(folder, use_library=False)
        token = int(session.prefill(0, ids).argmax())
        chosen.append([token])
        for _ in range(20):
            token = int(session.decode([token])[0].argmax())
            chosen[-1].append(token)
    assert chosen[0] == chosen[1]


def test_texts_that_a_plan_keeps_whole() -> None:
    shape = ModelShape("some", 2, 4, 2, 16)
    assert kept_whole(uniform(shape, 1.0, N_MAX)) == N_MAX
    assert kept_whole(uniform(shape, 0.25, N_MAX)) == 128


def edited(file: Path, change: Any) -> Path:
    """The file with its graph changed, as protobuf."""
    proto = onnx.load(file, load_external_data=False)
    change(proto)
    onnx.save(proto, file)
    return file


def node_of(proto: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == op_type)


def set_input(op_type: str, index: int, name: str) -> Any:
    def change(proto: onnx.ModelProto) -> None:
        node = node_of(proto, op_type)
        node.input.extend([""] * (index + 1 - len(node.input)))
        node.input[index] = name

    return change


def set_opset(version: int) -> Any:
    def change(proto: onnx.ModelProto) -> None:
        next(x for x in proto.opset_import if x.domain == "").version = version

    return change


def rename(old: str, new: str) -> Any:
    def change(proto: onnx.ModelProto) -> None:
        for values in (proto.graph.input, proto.graph.output):
            for x in values:
                x.name = new if x.name == old else x.name
        for node in proto.graph.node:
            node.input[:] = [new if x == old else x for x in node.input]
            node.output[:] = [new if x == old else x for x in node.output]

    return change


def pruned(proto: onnx.ModelProto) -> None:
    next(x for x in proto.graph.output if x.name == "logits").type.tensor_type.shape.dim[1].dim_value = 1


def moving_tables(proto: onnx.ModelProto) -> None:
    computed = proto.graph.node.add(op_type="Identity", input=["cos_cache"], output=["chosen"], name="choose")
    node_of(proto, "GroupQueryAttention").input[7] = computed.output[0]


REFUSED: dict[str, tuple[Form, Any, str]] = {
    "opset too new": (FORMS["parts"], set_opset(27), "the file is of opset 27; allowed are 13 to 24"),
    "opset too old": (FORMS["parts"], set_opset(11), "the file is of opset 11"),
    "biased attention": (
        FORMS["genai"],
        set_input("GroupQueryAttention", 10, "cos_cache"),
        "its input attention_bias ('cos_cache')",
    ),
    "named node": (
        FORMS["genai"],
        set_input("GroupQueryAttention", 11, "cos_cache"),
        "node '/model.layers.0.self_attn/GroupQuery",
    ),
    "moving tables": (FORMS["genai"], moving_tables, "RoPE tables are chosen at run time"),
    "other op": (
        FORMS["genai"],
        lambda p: setattr(node_of(p, "GroupQueryAttention"), "op_type", "PagedAttention"),
        "cannot be lifted",
    ),
    "alibi": (Form("parts", opset=18, bias=0.1), None, "positions by ALiBi"),
    "no ids": (FORMS["parts"], rename("input_ids", "inputs_embeds"), "the graph has no input 'input_ids' (but inputs_embeds"),
    "no logits": (FORMS["parts"], rename("logits", "hidden"), "the graph has no output 'logits'"),
    "pruned head": (FORMS["genai"], pruned, "export without pruning the head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, model: Path, tmp_path: Path) -> None:
    form, change, message = REFUSED[name]
    file = write_foreign(tmp_path / "foreign", model, form)
    if change is not None:
        edited(file, change)
    before = file.read_bytes()
    with pytest.raises(UserError) as error:
        export_model(Options(model=str(file), out=tmp_path / "out"))
    assert message in str(error.value)
    assert file.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_broken_files(model: Path, tmp_path: Path) -> None:
    """Weights missing or cut short, something else under the name, a config of another model."""
    file = write_foreign(tmp_path / "foreign", model, FORMS["genai"])
    data = tmp_path / "foreign" / "model.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"has \d+ bytes, weight '.*' ends at \d+"):
        open_onnx(str(file))
    data.unlink()
    with pytest.raises(UserError, match=r"lies in .*model\.onnx\.data, which does not exist"):
        open_onnx(str(file))
    data.write_bytes(content)
    config = tmp_path / "foreign" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(UserError, match=r"2 attentions, config\.json says num_hidden_layers 3"):
        open_onnx(str(file))
    file.write_bytes(b"no protobuf at all")
    with pytest.raises(UserError, match="is no ONNX model"):
        open_onnx(str(file))
    with pytest.raises(UserError, match="does not exist"):
        open_onnx(str(tmp_path / "none.onnx"))


def test_which_models_are_onnx(model: Path, tmp_path: Path) -> None:
    file = write_foreign(tmp_path / "foreign", model, FORMS["genai"])
    assert is_onnx(str(file))
    assert is_onnx(str(file.parent))
    assert not is_onnx(str(model))
    assert not is_onnx("some/hub-id")


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed")
def test_file_of_the_genai_builder(model: Path, tmp_path: Path) -> None:
    """A real one in int4: same logits, its shape from genai_config.json, its 4-bit weights as they are."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", tmp_path / "genai", "-p", "int4"]
    command += ["-e", "cpu", "-c", tmp_path / "cache", "--extra_options", "accuracy_level=1"]
    # Accuracy level 1: products in fp32, which do not depend on how the text is cut.
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    source, lifted = open_onnx(str(tmp_path / "genai"))
    assert source.shape.config_hash is None
    assert sum(node.op_type == "MatMulNBits" for node in lifted.model.graph) == 11
    ids = some_ids(2, 29)
    wanted = run_file(tmp_path / "genai" / "model.onnx", ids, source.shape)
    np.testing.assert_allclose(run_normal(lifted, ids, tmp_path), wanted, atol=TOLERANCE)

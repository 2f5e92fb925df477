"""The artefact folder: what it holds, that it runs on stock ONNX Runtime, and that it is written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from tiny_models import export_tiny, save_tiny_model
from transformers import AutoModelForCausalLM

from attnspan.export import artefact
from attnspan.export.ops import register_schemas
from attnspan.export.pipeline import Options, export_model
from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.uniform import uniform
from attnspan.runtime.artefact import Artefact

N_MAX = 512


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3 of 2 layers, spans 0.25 and 0.75, in fp32."""
    return export_tiny(tmp_path_factory.mktemp("exported"), "qwen3", n_max=N_MAX).folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def options(model: Path, out: Path, **changed: Any) -> Options:
    return Options(**({"model": str(model), "out": out, "n_max": N_MAX} | changed))


def left(folder: Path) -> list[str]:
    """Everything in a folder but the model that tests export."""
    return sorted(x.name for x in folder.iterdir() if x.name != "model")


def test_files(exported: Path) -> None:
    assert {x.name for x in exported.iterdir()} >= {
        "attnspan.json",
        "config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx.data",
        "plan.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    info = json.loads((exported / "attnspan.json").read_text())
    assert set(info["files"]) == {x.name for x in exported.iterdir()} - {"attnspan.json"}
    for name, entry in info["files"].items():
        content = (exported / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert info["capacity"] == [[128, 384]] * 2
    assert (info["target"], info["dtype"], info["cache_dtype"], info["n_max"]) == ("cpu", "float32", "float32", N_MAX)
    config = json.loads((exported / "config.json").read_text())
    assert config["sparse_attention_config"]["config_groups"]["group_0"] == {"algorithm": "moa", "plan": "plan.json"}
    Artefact.load(exported).check_hashes()


def test_graph(exported: Path) -> None:
    """Versions that every ONNX Runtime from 1.25 takes, one SpanAttention a layer and its body, caches as the plan says."""
    register_schemas()
    onnx.checker.check_model(exported / "model.onnx", full_check=True)
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    assert model.ir_version <= 13
    assert {(x.domain, x.version) for x in model.opset_import} == {("", 24), ("attnspan", 1)}
    nodes = [x for x in model.graph.node if x.domain]
    assert [(x.domain, x.op_type, x.name) for x in nodes] == [
        ("attnspan", "SpanAttention", f"layers.{i}.attention") for i in range(2)
    ]
    assert [(x.domain, x.name) for x in model.functions] == [("attnspan", "SpanAttention")]
    names = [x.name for x in model.graph.input]
    assert names[:4] == ["input_ids", "length", "span", "logits_to_keep"]
    assert names[4:] == ["past_key.0", "past_value.0", "past_key.1", "past_value.1"]
    shape = [d.dim_param or d.dim_value for d in model.graph.input[4].type.tensor_type.shape.dim]
    assert shape == ["batch", 128 + 384, 32]
    locations = {e.value for x in model.graph.initializer for e in x.external_data if e.key == "location"}
    assert locations == {"model.onnx.data"}


def test_stock_onnx_runtime(exported: Path) -> None:
    """No attnspan at run time: two rows of unequal length, prefilled apart and decoded together, against transformers.

    Both fit the smallest span (128 tokens), so that attention is dense and transformers needs no mask of ours.
    """
    session = ort.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    caches = [x for x in session.get_inputs() if x.name.startswith("past_")]
    names = [x.name for x in session.get_outputs()]
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, n) for n in (60, 9)]
    span = np.full((2, 1, 2), 128, np.int32)

    def run(ids: np.ndarray, length: list[int], spans: np.ndarray, keep: int, past: dict[str, np.ndarray]) -> dict[str, Any]:
        feeds = {"input_ids": ids, "length": np.array(length, np.int32), "span": spans, "logits_to_keep": np.array([keep])}
        return dict(zip(names, session.run(names, feeds | past), strict=True))

    def past(outputs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        return {x.name: np.concatenate([row[x.name.replace("past", "present")] for row in outputs]) for x in caches}

    empty = {x.name: np.zeros((1, *x.shape[1:]), np.float32) for x in caches}
    prefilled = [run(ids[None, :-1], [0], span, 3, empty) for ids in rows]
    last = np.array([[ids[-1]] for ids in rows])
    decoded = run(last, [len(ids) - 1 for ids in rows], np.tile(span, (1, 2, 1)), 1, past(prefilled))

    reference = AutoModelForCausalLM.from_pretrained(exported.parent / "model", dtype=torch.float32).eval()
    for i, ids in enumerate(rows):
        with torch.no_grad():
            want = reference(torch.from_numpy(ids)[None]).logits[0].numpy()
        np.testing.assert_allclose(prefilled[i]["logits"][0], want[-4:-1], atol=2e-5)
        np.testing.assert_allclose(decoded["logits"][i, 0], want[-1], atol=2e-5)


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp16"])
def test_cache_types(cache_dtype: str, tmp_path: Path) -> None:
    done = export_tiny(tmp_path, cache_dtype=cache_dtype)
    graph = ir.load(done.folder / "model.onnx").graph
    wanted = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}[cache_dtype]
    caches = [x for x in (*graph.inputs, *graph.outputs) if x.name and x.name.startswith(("past", "present"))]
    assert len(caches) == 8
    assert {x.dtype for x in caches} == {wanted}
    assert Artefact.load(done.folder).cache_dtype == wanted.numpy().name


def test_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    tied, untied = (export_tiny(tmp_path / family, family).description["files"] for family in ("qwen2", "llama"))
    embedding = 300 * 64 * 4
    biases = 2 * (64 + 2 * 32) * 4
    difference = untied["model.onnx.data"]["bytes"] - tied["model.onnx.data"]["bytes"]
    assert abs(difference - embedding + biases) <= 8192  # padding


def test_first_layers(model: Path, tmp_path: Path) -> None:
    done = export_model(options(model, tmp_path / "out", num_layers=1))
    assert len([x for x in ir.load(done.folder / "model.onnx").graph if x.domain == "attnspan"]) == 1
    assert Artefact.load(done.folder).layers == 1
    with pytest.raises(UserError, match="--num-layers is 3; MODEL allows 1 to 2"):
        export_model(options(model, tmp_path / "out2", num_layers=3))


def test_existing_folder(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(options(model, out))
    with pytest.raises(UserError, match="add --overwrite"):
        export_model(options(model, out))
    export_model(options(model, out, n_max=1024, overwrite=True))
    assert Artefact.load(out).n_max == 1024
    assert left(tmp_path) == ["out"]


def test_overwrite_spares_other_folders(model: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(UserError, match="is not an artefact"):
        export_model(options(model, tmp_path / "precious", overwrite=True))
    with pytest.raises(UserError, match="does not exist; make it or change OUT"):
        export_model(options(model, tmp_path / "no" / "out"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), ValueError("bug")])
@pytest.mark.parametrize("old", [False, True])
def test_nothing_is_left_of_a_failure(
    error: BaseException, old: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the weights; an artefact that was there stays as it was."""
    out = tmp_path / "out"
    if old:
        export_model(options(model, out))
    before = {x: (out / x).read_bytes() for x in ("attnspan.json", "model.onnx.data")} if old else {}
    written = []

    class Bar:
        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...
        def update(self, size: int) -> None:
            written.append(size)
            if len(written) == 5:
                raise error

    monkeypatch.setattr("tqdm.tqdm", Bar)
    with pytest.raises(type(error)):
        export_model(options(model, out, overwrite=True))
    assert len(written) == 5
    assert left(tmp_path) == (["out"] if old else [])
    assert before == {x: (out / x).read_bytes() for x in before}


def test_disk_too_small(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before a weight is read."""

    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    monkeypatch.setattr(artefact, "write_model", lambda *_: pytest.fail("weights were written"))
    with pytest.raises(UserError, match=r"needs \d+ MB, .* has 0 MB free; change OUT"):
        export_model(options(model, tmp_path / "out"))


def test_plan_and_length(model: Path, tmp_path: Path) -> None:
    shape = Plan.load(export_model(options(model, tmp_path / "out")).folder).model
    uniform(shape, 0.25, 2048).save(tmp_path / "plan.json")
    done = export_model(options(model, tmp_path / "a", plan=tmp_path / "plan.json", n_max=None))
    assert (done.plan.n_max, done.plan.capacities().max()) == (2048, 512)
    done = export_model(options(model, tmp_path / "b", plan=tmp_path / "plan.json", n_max=4096))
    assert (done.plan.n_max, done.plan.capacities().max()) == (4096, 1024)
    assert export_model(options(model, tmp_path / "c", n_max=None)).plan.n_max == 4096

    other = save_tiny_model(tmp_path / "other", "llama-mha")
    cases: list[tuple[Options, str]] = [
        (options(other, tmp_path / "x", plan=tmp_path / "plan.json"), "kv_heads 2 against 4"),
        (options(model, tmp_path / "x", plan=tmp_path / "plan.json", density=0.5), "exclude each other"),
        (options(model, tmp_path / "x", n_max=4097), "MODEL allows up to 4096"),
        (options(model, tmp_path / "x", density=1.5), "density is 1.5"),
        (options(model, tmp_path / "x", cache_dtype="int4"), "must be one of bf16, fp16, fp32"),
        (options(model, tmp_path / "x", verify_tokens=0), "--verify-tokens is 0"),
    ]
    for asked, message in cases:
        with pytest.raises(UserError, match=message):
            export_model(asked)
    assert not (tmp_path / "x").exists()

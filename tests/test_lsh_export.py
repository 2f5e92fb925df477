"""Plans with sampled heads: the graph, mixed layers against PyTorch with a mask, and what export and loading refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from tiny_models import export_rules, save_tiny_model

from attnspan.cpu_runtime.library import library_path
from attnspan.export import verify_worker
from attnspan.export.ops import register_schemas
from attnspan.export.pipeline import Options, export_model
from attnspan.export.verify import TOLERANCE, Row, check, text
from attnspan.planner.errors import UserError
from attnspan.planner.lsh import projection, signs
from attnspan.planner.plan import ModelShape
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.planner.uniform import sampled
from attnspan.runtime.artefact import Artefact

SIGNATURE = LshParams("signature", 64, signature_bits=64, max_hamming=24)
TABLES = LshParams("tables", 32, bits=4, tables=20, min_collisions=2)
EXACT = LshParams("exact", 64)
SKETCH = LshParams("sketch", 64, fraction=0.05)
FOUR_BITS = LshParams("tables", 64, bits=2, tables=2, min_collisions=1)  # as many columns as a sketch has signs
WIDE = dataclasses.replace(SIGNATURE, max_hamming=30)
FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


def head(params: LshParams) -> HeadRule:
    return HeadRule("lsh", lsh=params)


MIXED = [
    [head(SIGNATURE), HeadRule("span", 0, 0.25), head(WIDE), head(TABLES)],
    [HeadRule("dense"), head(EXACT), HeadRule("span", 0, 0.5), head(EXACT)],
    [head(SIGNATURE)] * 4,
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of one, two and three attention ops; fp32; no op library."""
    return export_rules(tmp_path_factory.mktemp("mixed"), MIXED, config=FOUR | {"num_hidden_layers": 3}).folder


def test_sketches(tmp_path: Path) -> None:
    """Signs shared by layers, apart from projections of the same shape; a fraction is an op's own; prompts equal the model's."""
    register_schemas()
    more = dataclasses.replace(SKETCH, fraction=0.2)
    rules = [[head(SKETCH), head(more), head(SKETCH), head(FOUR_BITS)], [HeadRule("dense"), *[head(SKETCH)] * 3]]
    folder = export_rules(tmp_path, rules, config=FOUR).folder
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    model = onnx.load(folder / "model.onnx")
    nodes = {x.name: x for x in model.graph.node if x.op_type == "LshAttention"}
    assert list(nodes) == [f"layers.{x}.attention" for x in ("0", "0.lsh2", "0.lsh3", "1.lsh")]
    one, other, tables, later = map(attributes, nodes.values())
    for node, share, heads in ((one, 0.05, 2), (other, 0.2, 1), (later, 0.05, 3)):
        assert node["index"] == b"sketch"
        assert node["fraction"] == pytest.approx(share, rel=1e-6)
        assert (node["kv_num_heads"], node["window"]) == (heads, 64)
        assert not {"min_inclusion", "bits", "tables", "signature_bits", "max_hamming"} & set(node)
    assert "fraction" not in tables
    assert len({x["identity"] for x in (one, other, tables, later)}) == 4
    names = [x.input[6] for x in nodes.values()]
    assert names[0] == names[1] == names[3] != names[2]
    constants = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
    np.testing.assert_array_equal(constants[names[0]], signs(16, 0))
    np.testing.assert_array_equal(constants[names[2]], projection(16, 4, 0))
    compare(folder, 300)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {x.name: helper.get_attribute_value(x) for x in node.attribute}


def test_graph(mixed: Path) -> None:
    register_schemas()
    onnx.checker.check_model(mixed / "model.onnx", full_check=True)
    model = onnx.load(mixed / "model.onnx")
    nodes = {x.name: x for x in model.graph.node if x.domain}
    assert [(x.name, x.op_type) for x in nodes.values()] == [
        ("layers.0.attention", "SpanAttention"),
        ("layers.0.lsh.attention", "LshAttention"),
        ("layers.0.lsh2.attention", "LshAttention"),
        ("layers.1.attention", "SpanAttention"),
        ("layers.1.lsh.attention", "LshAttention"),
        ("layers.2.attention", "LshAttention"),
    ]
    assert [x.name for x in model.functions] == ["SpanAttention", "LshAttention"]
    signature, tables, exact = (attributes(nodes[f"layers.{x}.attention"]) for x in ("0.lsh", "0.lsh2", "1.lsh"))
    assert (signature["num_heads"], signature["kv_num_heads"], signature["window"], signature["layer"]) == (4, 2, 64, 0)
    assert (signature["index"], signature["signature_bits"], signature["max_hamming"]) == (b"signature", 64, [24, 30])
    assert (tables["index"], tables["bits"], tables["tables"], tables["min_collisions"]) == (b"tables", 4, 20, 2)
    assert (tables["window"], exact["layer"], exact["index"]) == (32, 1, b"exact")
    assert "bits" not in signature
    assert "max_hamming" not in tables
    assert len({attributes(x)["identity"] for x in nodes.values() if x.op_type == "LshAttention"}) == 4
    # One projection of each shape, shared by layers; index exact has none.
    constants = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer if "projection" in x.name}
    names = {x: list(nodes[f"layers.{x}.attention"].input)[6:] for x in ("0.lsh", "0.lsh2", "1.lsh", "2")}
    assert names["0.lsh"] == names["2"]
    assert names["1.lsh"] == []
    assert set(constants) == {*names["0.lsh"], *names["0.lsh2"]}
    np.testing.assert_array_equal(constants[names["0.lsh"][0]], projection(16, 64, 0))
    np.testing.assert_array_equal(constants[names["0.lsh2"][0]], projection(16, 80, 0))


def test_inputs_are_those_that_attnspan_json_names(mixed: Path) -> None:
    model = onnx.load(mixed / "model.onnx", load_external_data=False)
    values = {x.name: x.type.tensor_type for x in (*model.graph.input, *model.graph.output)}
    parts = json.loads((mixed / "attnspan.json").read_text())["attention"]
    assert [(x["layer"], x["op"], x["kv_heads"]) for x in parts] == [
        (0, "SpanAttention", [1]),
        (0, "LshAttention", [0, 2]),
        (0, "LshAttention", [3]),
        (1, "SpanAttention", [0, 2]),
        (1, "LshAttention", [1, 3]),
        (2, "LshAttention", [0, 1, 2, 3]),
    ]
    wanted = {}
    for part in parts:
        for when in ("past", "present"):
            kinds = [kind for kind in ("key", "value", "kv") if kind in part]
            wanted |= {f"{when}_{part[kind]}": (onnx.TensorProto.FLOAT, sum(part["capacity"])) for kind in kinds}
            if "state" in part:
                wanted[f"{when}_{part['state']}"] = (onnx.TensorProto.UINT8, part["state_bytes"])
    got = {name: (x.elem_type, x.shape.dim[1].dim_value) for name, x in values.items() if name.startswith(("past_", "present_"))}
    assert got == wanted
    assert {"past_key.0", "past_kv.0.lsh", "past_state.0.lsh2", "past_state.2"} <= set(got)


def compare(folder: Path, tokens: int = 400) -> list[Row]:
    artefact = Artefact.load(folder)
    rows = verify_worker.compare(artefact, folder.parent / "model", tokens)
    for row in rows:
        check(row, TOLERANCE[artefact.cache_dtype])
    return rows


def test_mixed_layers_equal_the_model(mixed: Path) -> None:
    """Against PyTorch with the spans as a mask: every head sees what its rule says, and lands in its place."""
    rows = compare(mixed)
    assert [(row.compared, row.sampled, row.same_tokens) for row in rows] == [(432, 0, 32), (165, 0, 32), (39, 0, 32)]


def test_heads_in_the_wrong_place_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: with the heads of mixed layers joined in another order."""
    from attnspan.export.rewrite import attention

    right = attention.join

    def wrong(record: Any, parts: Any, *args: Any) -> Any:
        return right(record, [(x, sorted(heads)[::-1]) for x, heads in parts], *args)

    monkeypatch.setattr(attention, "join", wrong)
    done = export_rules(tmp_path, MIXED[:2], config=FOUR)
    with pytest.raises(Exception, match="differ"):
        compare(done.folder, 100)


@pytest.mark.parametrize("cache", ["bf16", "fp16"])
def test_cache_types(cache: str, tmp_path: Path) -> None:
    done = export_rules(tmp_path, MIXED[:2], config=FOUR, cache_dtype=cache)
    compare(done.folder, 100)
    kinds = {x.name: x.dtype for x in ir.load(done.folder / "model.onnx").graph.inputs}
    assert kinds["past_state.0.lsh"] == ir.DataType.UINT8
    assert kinds["past_kv.0.lsh"] == {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}[cache]


def test_memory_is_told(mixed: Path) -> None:
    artefact = Artefact.load(mixed)
    info = json.loads((mixed / "attnspan.json").read_text())
    each = [part.get("state_bytes", 0) for part in info["attention"]]
    assert artefact.state_bytes(3) == 3 * sum(each) == 3 * sum(part.state_bytes(16) for part in artefact.parts)
    assert artefact.kv_bytes() == 2 * 4 * 16 * sum(part.slots for part in artefact.parts)
    plan = json.loads((mixed / "plan.json").read_text())
    assert plan["state_bytes"] == sum(each)
    assert [(x["index"], x["kv_heads"]) for x in plan["indexes"]] == [("signature", 6), ("tables", 1), ("exact", 2)]


def test_a_description_that_disagrees_is_refused(mixed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(mixed, broken)
    file = broken / "attnspan.json"
    info = json.loads(file.read_text())
    info["attention"][1]["state_bytes"] += 64
    file.write_text(json.dumps(info))
    with pytest.raises(UserError, match="disagree about attention"):
        Artefact.load(broken)
    del info["attention"]
    file.write_text(json.dumps(info))
    with pytest.raises(UserError, match="disagree about attention"):
        Artefact.load(broken)


def test_when_a_step_may_sample(mixed: Path) -> None:
    artefact = Artefact.load(mixed)  # the least window is 32
    assert not artefact.may_sample(64 + 32 + 255)
    assert artefact.may_sample(64 + 32 + 256)


def test_indexes_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model")
    monkeypatch.setattr("attnspan.runtime.memory.available_bytes", lambda: 30_000_000)
    tables = LshParams("tables", 64, bits=15, tables=1024, min_collisions=2)
    sampled(ModelShape.from_config(model), tables, 512, [0]).save(tmp_path / "plan.json")
    asked = Options(str(model), tmp_path / "out", plan=tmp_path / "plan.json", verify_tokens=50)
    words = r"indexes of 0\.14 GB and caches of 0\.00 GB \(one row of 512 tokens\): 0\.03 GB are available; add --no-verify"
    with pytest.raises(UserError, match=words):
        export_model(asked)
    assert not (tmp_path / "out").exists()
    export_model(dataclasses.replace(asked, verify_tokens=None))


def test_export_verifies_with_the_op_library(tmp_path: Path) -> None:
    """Prompts are exact and bound; steps after long ones may sample, which the report says."""
    try:
        library = library_path()
    except UserError as error:
        pytest.skip(str(error))
    done = export_rules(tmp_path, MIXED[:2], config=FOUR, verify_tokens=450, library=library)
    report = done.description["verify"]
    assert [(row["compared"], row["sampled"]) for row in report["rows"]] == [(450, 32), (182, 0), (39, 0)]
    assert "32 steps after 450 tokens may have sampled their context" in text(report)

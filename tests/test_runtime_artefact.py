"""Reading an artefact folder, and every way in which it can be damaged."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.uniform import uniform
from attnspan.runtime import artefact as module
from attnspan.runtime.artefact import Artefact


def describe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write attnspan.json for the files of a folder."""
    plan = Plan.load(folder / "plan.json")
    info: dict[str, Any] = {
        "schema": 1,
        "target": "cpu",
        "model_id": "tiny",
        "n_max": plan.n_max,
        "dtype": "float32",
        "cache_dtype": "bfloat16",
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
        "sink": 64,
        "capacity": plan.capacities().tolist(),
        "op_library": "libattnspan_ort.so",
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            for file in folder.iterdir()
            if file.name != "attnspan.json"
        },
    }
    info |= changes
    (folder / "attnspan.json").write_text(json.dumps(info))
    return info


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    uniform(ModelShape("tiny", 2, 4, 2, 16, None), 0.5, 512, spread=0.25).save(tmp_path / "plan.json")
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "model.onnx.data").write_bytes(b"weights" * 100)
    (tmp_path / "libattnspan_ort.so").write_bytes(b"library")
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    describe(tmp_path)
    return tmp_path


def test_load(folder: Path) -> None:
    artefact = Artefact.load(folder)
    assert (artefact.layers, artefact.heads, artefact.kv_heads, artefact.head_dim) == (2, 4, 2, 16)
    assert artefact.capacity == ((128, 384), (128, 384))
    assert artefact.slots == (512, 512)
    assert artefact.kv_bytes(batch=3) == 3 * 2 * 1024 * 16 * 2
    assert artefact.dense_kv_bytes() == 2 * 2 * 2 * 512 * 16 * 2
    assert artefact.kv_bytes_in_force(100) == 2 * 2 * (100 + 100) * 16 * 2  # spans of 128 hold 100 tokens
    assert artefact.library == folder / "libattnspan_ort.so"
    artefact.check_hashes()


def test_stop_tokens(folder: Path) -> None:
    assert Artefact.load(folder).stop_tokens == {7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert Artefact.load(folder).stop_tokens == {3, 4}
    (folder / "generation_config.json").write_text("{}")
    assert Artefact.load(folder).stop_tokens == {7}


def test_a_missing_op_library_is_no_error(folder: Path) -> None:
    (folder / "libattnspan_ort.so").unlink()
    assert Artefact.load(folder).library is None


def test_not_an_artefact(folder: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Artefact.load(folder / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        Artefact.load(folder / "plan.json")
    (folder / "attnspan.json").unlink()
    with pytest.raises(UserError, match=r"no attnspan\.json"):
        Artefact.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema is 2.*reads 1"),
        ({"schema": True}, "schema is True"),
        ({"n_max": 1024}, "disagree"),
        ({"capacity": [[128, 384], [128, 320]]}, "disagree"),
        ({"layers": 3}, "disagree"),
        ({"heads": 0}, "heads is 0"),
        ({"vocab_size": "100"}, "vocab_size"),
        ({"cache_dtype": "float8"}, "must be one of float32"),
        ({"target": None}, "target is None"),
        ({"files": {}}, "does not list"),
        ({"files": []}, "does not list"),
        ({"files": {"model.onnx": {}, "plan.json": {}}}, "damaged"),
    ],
)
def test_damaged_description(folder: Path, changes: dict[str, Any], message: str) -> None:
    describe(folder, **changes)
    with pytest.raises(UserError, match=message):
        Artefact.load(folder)


def test_files_outside_the_folder_are_refused(folder: Path) -> None:
    info = describe(folder)
    for name in ("../x", "/etc/passwd"):
        describe(folder, files=info["files"] | {name: info["files"]["plan.json"]})
        with pytest.raises(UserError, match="damaged"):
            Artefact.load(folder)


def test_cut_short_missing_or_changed_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = folder / "model.onnx.data"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"model\.onnx\.data has 699 bytes.*says 700"):
        Artefact.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"lacks model\.onnx\.data"):
        Artefact.load(folder)
    weights.write_bytes(content[:-1] + b"?")
    with pytest.raises(UserError, match="changed or damaged"):
        Artefact.load(folder)
    # Large files are hashed only when asked.
    monkeypatch.setattr(module, "HASH_AT_LOAD", 500)
    artefact = Artefact.load(folder)
    with pytest.raises(UserError, match=r"model\.onnx\.data was changed"):
        artefact.check_hashes()


def test_attnspan_json_that_is_no_json(folder: Path) -> None:
    (folder / "attnspan.json").write_text('{"schema": 1,')
    with pytest.raises(UserError, match="not JSON"):
        Artefact.load(folder)

"""The description beside an engine: what is compared before TensorRT reads the engine, and what is said of each difference."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn import sidecar
from attnspan.plugins.trt_sparse_attn.schema import digest
from attnspan.plugins.trt_sparse_attn.sidecar import Sidecar
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Api

CONTENT = b"engine" * 1000
HERE = {"flavour": "tensorrt", "version": "11.4.0.106", "sm": "90"}
API = Api(None, "tensorrt", "11.4.0.106")


@pytest.fixture
def artefact(tmp_path: Path) -> Any:
    return SimpleNamespace(folder=tmp_path, fingerprint="abc", dtype="bfloat16", cache_dtype="bfloat16")


@pytest.fixture
def engine(artefact: Any) -> Path:
    """An engine for HERE, described."""
    path = Path(artefact.folder / "engine" / sidecar.name_of(API, "90"))
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    Sidecar(
        engine=path.name, bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest(), **HERE, gpu="NVIDIA H200", cuda="13.0",
        plugin="python", plugin_schema=digest(), model="abc", dtype="bfloat16", cache_dtype="bfloat16", profiles=[],
        weight_streaming=False,
    ).save(path)  # fmt: skip
    return path


def test_names_tell_flavour_version_and_architecture(engine: Path) -> None:
    assert engine.name == "trt11.4-sm90.engine"
    assert sidecar.name_of(Api(None, "tensorrt_rtx", "1.7.1.116"), "89") == "rtx1.7-sm89.engine"


def test_a_good_engine(engine: Path, artefact: Any) -> None:
    found = sidecar.find(artefact.folder, API, "90")
    assert found == engine
    read = sidecar.check(found, artefact, **HERE)
    assert (read.gpu, read.product) == ("NVIDIA H200", "TensorRT 11.4.0.106")
    assert read == Sidecar.load(engine)


@pytest.mark.parametrize(
    ("here", "changes", "message"),
    [
        ({"version": "11.3.0.99"}, {}, "it was built by TensorRT 11.4.0.106, here is TensorRT 11.3.0.99; make it again with"),
        ({"flavour": "tensorrt_rtx"}, {}, "built by TensorRT 11.4.0.106, here is TensorRT-RTX"),
        ({"sm": "80"}, {}, r"built for sm_90 \(NVIDIA H200\), this GPU is sm_80"),
        ({}, {"plugin_schema": "0" * 64}, "its plugins are of another version of attnspan"),
        ({}, {"model": "xyz"}, "it was built of another model or plan"),
        ({}, {"dtype": "float16"}, "computes in float16 with a bfloat16 cache, the artefact in bfloat16 with bfloat16"),
        ({"sm": "80"}, {"model": "xyz"}, "this GPU is sm_80; it was built of another model"),
        ({}, {"sha256": "0" * 64}, r"was changed or damaged: SHA-256 is [0-9a-f]{12}\.\.\., must be 000000000000"),
        ({}, {"bytes": 7}, "has 6000 bytes, its description says 7: cut short or replaced"),
        ({}, {"schema": 2}, "schema is 2, this version of attnspan reads 1"),
        ({}, {"sm": 90}, "sm is 90: must be str"),
    ],
)
def test_each_difference_is_named(
    engine: Path, artefact: Any, here: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    dataclasses.replace(Sidecar.load(engine), **changes).save(engine)
    with pytest.raises(UserError, match=message) as error:
        sidecar.check(engine, artefact, **(HERE | here))
    assert f"attnspan build {artefact.folder}" in str(error.value)


def test_a_truncated_engine(engine: Path, artefact: Any) -> None:
    engine.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="has 5999 bytes, its description says 6000: cut short or replaced"):
        sidecar.check(engine, artefact, **HERE)


def test_an_engine_without_its_description(engine: Path, artefact: Any) -> None:
    engine.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"has no trt11\.4-sm90\.json beside it: its TensorRT and GPU are unknown"):
        sidecar.check(engine, artefact, **HERE)
    engine.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        sidecar.check(engine, artefact, **HERE)
    engine.with_suffix(".json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(UserError, match="engine is None: must be str"):
        sidecar.check(engine, artefact, **HERE)


def test_large_engines_are_hashed_on_request(engine: Path, artefact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "HASH_AT_LOAD", 10)
    engine.write_bytes(b"other!" * 1000)
    sidecar.check(engine, artefact, **HERE)
    with pytest.raises(UserError, match="was changed or damaged"):
        sidecar.check(engine, artefact, **HERE, hashes=True)


def test_engines_of_others_are_listed(engine: Path, artefact: Any) -> None:
    with pytest.raises(UserError, match=r"has engines trt11\.4-sm90\.engine: TensorRT .* on sm_80 needs trt11\.4-sm80"):
        sidecar.find(artefact.folder, API, "80")
    engine.unlink()
    with pytest.raises(UserError, match=r"has no engine: TensorRT .* on sm_90 needs .*; build it with"):
        sidecar.find(artefact.folder, API, "90")

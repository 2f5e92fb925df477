"""Opening engines: with a TensorRT that is imitated, what is asked of it in which order; every refusal; `attnspan run`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_models import export_tiny

from attnspan.cpu_runtime import Session as CpuSession
from attnspan.export.cli import main
from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn import Session, loading, sidecar
from attnspan.plugins.trt_sparse_attn.execution import Profile, Tensor
from attnspan.plugins.trt_sparse_attn.loading import TensorRtEngine, open_engine, plugin_library
from attnspan.plugins.trt_sparse_attn.schema import digest
from attnspan.plugins.trt_sparse_attn.sidecar import Sidecar
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Api, Gpu
from attnspan.runtime.artefact import Artefact

GPU = Gpu("NVIDIA H200", "90", 10**9, 2 * 10**9, "13.0")
HOST, DEVICE = object(), object()


class FakeTensorRt:
    """The part of the module `tensorrt` that runs engines; one engine with two profiles."""

    def __init__(self) -> None:
        self.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
        self.TensorLocation = SimpleNamespace(HOST=HOST, DEVICE=DEVICE)
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
        self.DataType = SimpleNamespace(FLOAT=0, HALF=1, BF16=2, FP8=3, INT32=4, INT64=5, INT8=6, BOOL=7)
        self.ILogger = type("ILogger", (), {"Severity": SimpleNamespace(WARNING=2), "__init__": lambda self: None})
        self.registry = Mock()
        self.get_plugin_registry = lambda: self.registry
        self.tell: Any = None
        self.context = Mock(**{"set_optimization_profile_async.return_value": True})
        names = ["input_ids", "logits_to_keep", "logits"]
        shapes = {"input_ids": [[1, 1], [1, 64], [4, 512]], "other": [[2, 1], [2, 1], [8, 1]]}
        self.engine = Mock(
            num_io_tensors=3, num_optimization_profiles=2, device_memory_size_v2=1000, streamable_weights_size=500,
            spec_set=["num_io_tensors", "num_optimization_profiles", "device_memory_size_v2", "streamable_weights_size",
                      "get_tensor_name", "get_tensor_dtype", "get_tensor_shape", "get_tensor_mode", "get_tensor_location",
                      "get_tensor_profile_shape", "get_tensor_profile_values", "create_execution_context",
                      "weight_streaming_budget_v2"])  # fmt: skip
        self.engine.get_tensor_name.side_effect = names.__getitem__
        self.engine.get_tensor_dtype.side_effect = lambda name: 0 if name == "logits" else 5
        self.engine.get_tensor_shape.side_effect = lambda name: ((-1, -1), (1,), (-1, -1, 9))[names.index(name)]
        self.engine.get_tensor_mode.side_effect = lambda name: "out" if name == "logits" else "in"
        self.engine.get_tensor_location.side_effect = lambda name: HOST if name == "logits_to_keep" else DEVICE
        self.engine.get_tensor_profile_shape.side_effect = lambda name, i: shapes[("input_ids", "other")[i]]
        self.engine.get_tensor_profile_values.side_effect = lambda i, name: [[1], [1], [3 - i]]
        self.engine.create_execution_context.return_value = self.context

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        def deserialize(content: Any) -> Any:
            self.content = bytes(content)
            if self.content == b"bad":
                logger.log(1, "magicTag does not match")
                return None
            return self.engine

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("loading")).folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """An artefact of target tensorrt, as far as its description goes, without an engine."""
    there = tmp_path / "artefact"
    shutil.copytree(exported, there)
    info = json.loads((there / "attnspan.json").read_text()) | {"target": "tensorrt"}
    (there / "attnspan.json").write_text(json.dumps(info))
    return there


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """TensorRT 11.4 and an H200, both imitated."""
    fake = FakeTensorRt()
    monkeypatch.setattr(loading, "load", lambda rtx: Api(fake, "tensorrt", "11.4.0.106"))
    monkeypatch.setattr(loading, "gpu", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Mock(cuda_stream=0))
    monkeypatch.setattr("attnspan.plugins.trt_sparse_attn.plugin.register", Mock())
    return fake


def add_engine(folder: Path, content: bytes = b"engine", **changes: Any) -> Path:
    import hashlib

    path = folder / "engine" / "trt11.4-sm90.engine"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    artefact = Artefact.load(folder)
    values: dict[str, Any] = {
        "engine": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "flavour": "tensorrt",
        "version": "11.4.0.106", "sm": "90", "gpu": None, "cuda": None, "plugin": "python", "plugin_schema": digest(),
        "model": artefact.fingerprint, "dtype": artefact.dtype, "cache_dtype": artefact.cache_dtype, "profiles": [],
        "weight_streaming": False,
    }  # fmt: skip
    Sidecar(**values | changes).save(path)
    return path


def opened(folder: Path, batch: int = 1, **options: Any) -> TensorRtEngine:
    return open_engine(Artefact.load(folder), batch, **options)


def test_an_engine_is_read(folder: Path, trt: FakeTensorRt) -> None:
    add_engine(folder)
    engine = opened(folder)
    assert trt.content == b"engine"
    assert (engine.label, engine.plugin, engine.device.type) == ("engine/trt11.4-sm90.engine", "Python", "cuda")
    assert engine.tensors == {
        "input_ids": Tensor("int64", (-1, -1), True),
        "logits_to_keep": Tensor("int64", (1,), True, on_host=True),
        "logits": Tensor("float32", (-1, -1, 9), False),
    }
    assert engine.profiles == [Profile(0, (1, 4), (1, 512), (1, 3)), Profile(1, (2, 8), (1, 1), (1, 2))]


def test_contexts_share_their_memory(folder: Path, trt: FakeTensorRt) -> None:
    add_engine(folder)
    engine = opened(folder)
    engine.device = torch.device("cpu")
    for profile in (0, 1):
        context = engine.context(profile)
        trt.engine.create_execution_context.assert_called_with("user")
        trt.context.set_optimization_profile_async.assert_called_with(profile, 0)
    calls = trt.context.set_device_memory.call_args_list
    assert [call.args[1] for call in calls] == [1000, 1000]
    assert calls[0].args[0] == calls[1].args[0] > 0
    for name, call in (
        ("set_input_shape", lambda: context.set_shape("input_ids", (9, 9))),
        ("set_tensor_address", lambda: context.set_address("input_ids", 16)),
        ("execute_async_v3", lambda: context.enqueue(3)),
    ):
        getattr(trt.context, name).return_value = True
        call()
        getattr(trt.context, name).return_value = False
        with pytest.raises(RuntimeError, match=r"engine/trt11.4-sm90.engine (refuses|failed).*: it does not say why"):
            call()
    trt.context.execute_async_v3.assert_called_with(3)
    trt.context.set_optimization_profile_async.return_value = False
    with pytest.raises(RuntimeError, match="profile 1 cannot be used"):
        engine.context(1)
    trt.engine.create_execution_context.return_value = None
    with pytest.raises(UserError, match=r"not enough GPU memory for activations of 0\.00 GB .*; lower the batch"):
        engine.context(0)


def test_where_plugins_are_from(folder: Path, trt: FakeTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option, the variable, the folder, then Python; none for an engine without plugins."""
    from attnspan.plugins.trt_sparse_attn import plugin

    monkeypatch.delenv(loading.VARIABLE, raising=False)
    add_engine(folder)
    assert plugin_library(folder, None) is None
    opened(folder)
    plugin.register.assert_called_once()  # type: ignore[attr-defined]
    libraries = [folder / loading.LIBRARY, tmp_path / "by_variable.so", tmp_path / "by_option.so"]
    for library in libraries:
        library.write_bytes(b"")
    for library, variable, option in ((0, None, None), (1, libraries[1], None), (2, libraries[1], libraries[2])):
        if variable:
            monkeypatch.setenv(loading.VARIABLE, str(variable))
        assert opened(folder, plugin=option).plugin == str(libraries[library])
        trt.registry.load_library.assert_called_with(str(libraries[library]))
    with pytest.raises(UserError, match=r"nowhere.so does not exist; change --plugin"):
        opened(folder, plugin="nowhere.so")
    monkeypatch.setenv(loading.VARIABLE, "gone.so")
    with pytest.raises(UserError, match=r"gone.so does not exist; change ATTNSPAN_TRT_PLUGIN"):
        opened(folder)
    monkeypatch.delenv(loading.VARIABLE)
    trt.registry.load_library.return_value = None
    with pytest.raises(UserError, match=r"libattnspan_trt.so does not load"):
        opened(folder)
    add_engine(folder, plugin=None, plugin_schema=None)
    assert opened(folder).plugin == "none"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "11.3.0.99"}, r"built by TensorRT 11\.3\.0\.99, here is TensorRT 11\.4\.0\.106"),
        ({"sm": "80", "gpu": "A100"}, r"built for sm_80 \(A100\), this GPU is sm_90"),
        ({"plugin_schema": "0" * 64}, "plugins are of another version"),
        ({"model": "x"}, "another model or plan"),
        ({"bytes": 7}, "has 6 bytes, its description says 7: cut short"),
        ({"content": b"bad"}, r"TensorRT 11\.4\.0\.106 cannot read .*: 1: magicTag does not match; .* attnspan build"),
    ],
)
def test_engines_that_do_not_run_here(changes: dict[str, Any], words: str, folder: Path, trt: FakeTensorRt) -> None:
    add_engine(folder, **changes)
    with pytest.raises(UserError, match=words):
        opened(folder)
    if "content" not in changes:
        assert not hasattr(trt, "content")  # not a byte was given to TensorRT


def test_no_engine_no_gpu_no_memory(folder: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has no engine: TensorRT 11\.4\.0\.106 on sm_90 needs trt11\.4-sm90\.engine; .* build"):
        opened(folder)
    add_engine(folder)
    monkeypatch.setattr(loading, "gpu", lambda: Gpu("small", "90", 70_000, 10**9, "13.0"))
    assert Artefact.load(folder).kv_bytes() == 65536 * 2
    with pytest.raises(UserError, match=r"not enough GPU memory: the engine has 0\.00 GB, caches of 1 rows of 512 tokens take"):
        opened(folder)
    add_engine(folder, weight_streaming=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30 + 1000 + 131072 + 200, 2**34))
    opened(folder)
    assert trt.engine.weight_streaming_budget_v2 == 200
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**33, 2**34))
    opened(folder)
    assert trt.engine.weight_streaming_budget_v2 == 500  # all of them
    monkeypatch.setattr(loading, "gpu", lambda: None)
    with pytest.raises(UserError, match="no NVIDIA GPU is visible"):
        opened(folder)


def test_no_tensorrt(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    from attnspan.plugins.trt_sparse_attn import tensorrt_api

    tensorrt_api._load.cache_clear()
    try:
        with pytest.raises(UserError, match="TensorRT"):
            opened(folder)
        assert main(["run", str(folder), "-p", "x"]) == 2
        assert "installed" in capsys.readouterr().err
    finally:
        tensorrt_api._load.cache_clear()


def test_tensorrt_rtx_refuses_a_damaged_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, without a GPU: it answers, and does not crash."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from attnspan.plugins.trt_sparse_attn.tensorrt_api import load

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    path = tmp_path / "engine" / "rtx.engine"
    path.parent.mkdir()
    path.write_bytes(b"no engine at all" * 100)
    with pytest.raises(UserError, match=r"TensorRT-RTX .* cannot read .*rtx\.engine: .*\w.*; the plugin is none; make it again"):
        TensorRtEngine(load(rtx=True), path, "none")


def test_run_opens_what_the_target_needs(
    folder: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options of another runner are refused; figures tell what ran."""
    seen: dict[str, Any] = {}

    class Imitated(CpuSession):
        def __init__(self, artefact: Artefact, **options: Any) -> None:
            seen.update(options, target=artefact.target)
            super().__init__(exported, threads=1, use_library=False)

        @property
        def backend(self) -> dict[str, str | int | None]:
            return {"engine": "e", "plugin": "p"}

    monkeypatch.setattr("attnspan.plugins.trt_sparse_attn.session.Session", Imitated)
    words = ["-p", "x", "--max-new-tokens", "2", "--json"]
    assert main(["run", str(folder), *words, "--rtx", "--plugin", "lib.so"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["engine"], figures["plugin"], figures["new_tokens"]) == ("e", "p", len(figures["tokens"]))
    assert seen == {"rtx": True, "plugin": Path("lib.so"), "target": "tensorrt"}
    assert main(["run", str(folder), *words]) == 0
    assert seen == {"rtx": None, "plugin": None, "target": "tensorrt"}
    for arguments, message in (
        ([str(exported), "--threads", "0"], "threads is 0: must be 1 or more"),
        ([str(folder), "--threads", "2"], "--threads is for target cpu or portable"),
        ([str(folder), "--no-library"], "--no-library is for target cpu or portable"),
        ([str(exported), "--rtx"], "--rtx is for target tensorrt"),
    ):
        capsys.readouterr()
        assert main(["run", *arguments, *words]) == 2
        assert message in capsys.readouterr().err


def test_session_opens_the_engine_itself(folder: Path, trt: FakeTensorRt) -> None:
    add_engine(folder)
    with pytest.raises(UserError, match="does not belong to"):  # the imitated engine has three tensors
        Session(folder)
    assert sidecar.find(folder, Api(trt, "tensorrt", "11.4.0.106"), "90").read_bytes() == trt.content

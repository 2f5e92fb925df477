"""Which TensorRT is used, what is said when there is none, and the second name of a library."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn import soname, tensorrt_api
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Api


class Flags:
    """A set of flags as TensorRT's Python module has them."""

    STRONGLY_TYPED = 1


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What importing TensorRT's modules gives: a module, an error to raise, or ModuleNotFoundError where nothing is set."""
    modules: dict[str, Any] = {}

    def import_module(name: str) -> Any:
        got = modules.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(got, BaseException):
            raise got
        return got

    monkeypatch.setattr(tensorrt_api.importlib, "import_module", import_module)
    monkeypatch.setattr(soname, "provide", lambda *_: None)
    tensorrt_api._load.cache_clear()
    yield modules
    tensorrt_api._load.cache_clear()


def module(version: str) -> Any:
    return SimpleNamespace(__version__=version, NetworkDefinitionCreationFlag=Flags)


def test_tensorrt_is_preferred(installed: dict[str, Any]) -> None:
    installed |= {"tensorrt": module("11.4.0.106"), "tensorrt_rtx": module("1.7.1.116")}
    api = tensorrt_api.load()
    assert (api.product, api.tag, api.is_rtx, api.network_flags()) == ("TensorRT 11.4.0.106", "trt11.4", False, 0)
    api = tensorrt_api.load(rtx=True)
    assert (api.product, api.tag, api.is_rtx, api.network_flags()) == ("TensorRT-RTX 1.7.1.116", "rtx1.7", True, 0)
    assert tensorrt_api.load(rtx=False).flavour == "tensorrt"


def test_networks_of_tensorrt_10_ask_for_strong_types(installed: dict[str, Any]) -> None:
    installed["tensorrt"] = module("10.16.1.11")
    assert tensorrt_api.load().network_flags() == 2


def test_rtx_is_used_where_it_is_alone(installed: dict[str, Any]) -> None:
    installed["tensorrt_rtx"] = module("1.7.1.116")
    assert tensorrt_api.load().is_rtx


@pytest.mark.parametrize(
    ("modules", "rtx", "message"),
    [
        ({}, None, "neither TensorRT nor TensorRT-RTX is installed; install attnspan"),
        ({}, True, "TensorRT-RTX is not installed"),
        ({"tensorrt_rtx": module("1.7.1")}, False, "TensorRT is not installed"),
        ({"tensorrt": module("10.14.1.48")}, None, "TensorRT 10.14.1.48 is installed: must be 10.15 or newer"),
        ({"tensorrt_rtx": module("1.3.0.1")}, None, "TensorRT-RTX 1.3.0.1 is installed: must be 1.4 or newer"),
        ({"tensorrt": ImportError("libnvinfer.so.11: cannot open")}, None, "does not load: libnvinfer.so.11: cannot open"),
        ({"tensorrt": ModuleNotFoundError("x", name="tensorrt_libs")}, None, "tensorrt is installed but lacks tensorrt_libs"),
    ],
)
def test_what_cannot_be_used(installed: dict[str, Any], modules: dict[str, Any], rtx: bool | None, message: str) -> None:
    installed |= modules
    with pytest.raises(UserError, match=message):
        tensorrt_api.load(rtx)


def test_an_architecture_is_for_rtx_only() -> None:
    api = Api(module("11.4.0.106"), "tensorrt", "11.4.0.106")
    with pytest.raises(UserError, match=r"--arch is 89: TensorRT 11\.4\.0\.106 builds for the GPU at hand only"):
        api.set_arch(None, "89")


@pytest.mark.skipif(sys.platform != "linux", reason="the dynamic linker of Linux")
def test_a_loaded_library_gets_a_second_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="libattnspan_no_such"):
        ctypes.CDLL("libattnspan_no_such.so")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    soname.provide("libattnspan_no_such.so", "libc.so.6")
    assert ctypes.CDLL("libattnspan_no_such.so").getpid() == os.getpid()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="libattnspan_absent"):
        soname.provide("libattnspan_other.so", "libattnspan_absent.so.3")


def test_parsing_a_plugin_does_not_end_the_process(tmp_path: Path) -> None:
    """TensorRT-RTX aborts without the second name: in a process of its own."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from trt_nodes import SPAN, save_node, types_of

    from attnspan.plugins.trt_sparse_attn.schema import SPAN_ATTENTION

    model = save_node(tmp_path / "node.onnx", SPAN_ATTENTION, SPAN, types_of(SPAN_ATTENTION))
    script = f"""
from attnspan.plugins.trt_sparse_attn import tensorrt_api
api = tensorrt_api.load(rtx=True)
network = api.trt.Builder(api.logger(print)).create_network(0)
parser = api.trt.OnnxParser(network, api.logger(print))
print(parser.parse_from_file({str(model)!r}), parser.get_error(0).desc())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "False" in done.stdout
    assert "Plugin not found" in done.stdout

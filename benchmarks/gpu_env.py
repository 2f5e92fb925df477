"""The checkout as the package `attnspan`, without installing it; the machine in figures."""

from __future__ import annotations

import importlib.machinery
import platform
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class _Checkout:
    """Finds `attnspan.*` in this checkout, ahead of any installed one: what is measured is what lies here."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.PathFinder.find_spec(name, path) if name.startswith("attnspan.") else None


def make_importable() -> None:
    """After this `import attnspan.plugins...` imports from the checkout."""
    package = types.ModuleType("attnspan")
    package.__path__ = [str(ROOT)]
    sys.modules["attnspan"] = package
    sys.meta_path.insert(0, _Checkout)  # type: ignore[arg-type]


def _query(*fields: str) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else {}


def machine(device: Any) -> dict[str, Any]:
    """Versions, and the GPU: name, multiprocessors, memory, driver, clocks, power limit."""
    import numpy
    import torch
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__, "numpy": numpy.__version__,
    }  # fmt: skip
    if device.type != "cuda":
        return found | {"gpu": "none: Triton's interpreter on the CPU", "name": "dry-run"}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "gpu": properties.name,
        "name": re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-"),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    } | _query("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")  # fmt: skip

"""Runs artefacts on CPUs: ONNX Runtime with the op library `libattnspan_ort`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnspan.cpu_runtime.session import Session

__all__ = ["Session"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command line must not wait for what it does not use.
    if name == "Session":
        from attnspan.cpu_runtime.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Attention with a span per KV head on NVIDIA GPUs: Triton kernels, their PyTorch ops, ahead-of-time builds; TensorRT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnspan.plugins.trt_sparse_attn.session import Session

__all__ = ["Session"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: builds and kernels do without it.
    if name == "Session":
        from attnspan.plugins.trt_sparse_attn.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What to keep: rules per KV head, the plan file, its cost, the optimiser. NumPy and SciPy only; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnspan.planner.synthetic import optimize_synthetic as optimize_synthetic


def __getattr__(name: str) -> Any:
    # SciPy takes a moment to import, and most users of this package only want plans.
    if name == "optimize_synthetic":
        from attnspan.planner.synthetic import optimize_synthetic

        return optimize_synthetic
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

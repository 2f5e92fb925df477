"""Plans that need no calibration: the same density for every head, a fixed ladder of windows, or every head sampled."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.rules import HeadRule, LshParams, check_int, check_number
from attnspan.planner.shape import ModelShape

DENSE_EVERY = 16
"""Of so many layers, the first stays dense in a sampled plan."""


def uniform(shape: ModelShape, density: float, n_max: int, spread: float = 0.0) -> Plan:
    """A plan where every KV head keeps `density` of the sequence (StreamingLLM with a proportional window).

    spread > 0 spaces the KV heads of each layer evenly over [density - spread, density + spread]: the same
    mean, windows of several scales, uncalibrated. density 1 gives dense heads. UserError when a value is
    out of range.
    """
    if not 0 < density <= 1:
        raise UserError(f"density is {density!r}: must be a number above 0 and at most 1; change --density")
    check_number("spread", spread, 0.0, 1.0, "; change --spread")
    low, high = density - spread, density + spread
    if low <= 0 or high > 1 + 1e-9:
        raise UserError(
            f"spread is {spread:g}: density - spread must be above 0 and density + spread at most 1, "
            f"with density {density:g} that is at most {min(density, 1 - density):g}; change --spread"
        )
    if density == 1:
        layer = [HeadRule("dense")] * shape.kv_heads
    elif spread and shape.kv_heads > 1:
        # Nine decimals keep the file readable; the mean moves by less than 1e-9.
        betas = np.linspace(low, min(high, 1.0), shape.kv_heads).round(9).tolist()
        layer = [HeadRule("span", 0.0, beta) for beta in betas]
    else:
        layer = [HeadRule("span", 0.0, float(density))] * shape.kv_heads
    made = {"method": "uniform", "density": float(density), "spread": float(spread)}
    return Plan(shape, n_max, [layer] * shape.layers, provenance=made)


def sampled(shape: ModelShape, params: LshParams, n_max: int, dense_layers: Collection[int] | None = None) -> Plan:
    """A plan where every KV head keeps all tokens and samples them by `params`, but those of `dense_layers`, which are dense.

    dense_layers None: 0, 16, 32 ..., as MagicPIG keeps them. UserError when the model has no such layer.
    """
    dense = range(0, shape.layers, DENSE_EVERY) if dense_layers is None else dense_layers
    for layer in dense:
        check_int("dense layer", layer, 0, shape.layers - 1, f" (the model has {shape.layers} layers); change --dense-layers")
    rules = [[HeadRule("dense") if i in dense else HeadRule("lsh", lsh=params)] * shape.kv_heads for i in range(shape.layers)]
    return Plan(shape, n_max, rules, provenance={"method": "lsh", "dense_layers": sorted(set(dense))})

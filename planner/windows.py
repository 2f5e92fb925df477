"""Plans for models whose layers slide: a layer's own window bounds what a plan lets its heads see."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.rules import HeadRule

__all__ = ["limit_plan"]


def limit_plan(plan: Plan, windows: Sequence[int | None]) -> Plan:
    """The plan for a model with these windows, [layers], in tokens, None: the layer attends to everything.

    A token of a layer with window w sees the last w tokens, itself included, and no sinks beyond. The plan can only tighten
    that: a head keeps the last min(S(n), w) tokens and no sinks, a dense or sampled one w. A window that n_max does not
    exceed changes nothing. UserError when there is not one for each layer.
    """
    if len(windows) != plan.model.layers:
        raise UserError(f"the model has windows for {len(windows)} layers: the plan has {plan.model.layers}; change --plan")
    known = plan.windows or (None,) * len(windows)
    both = [min((w for w in pair if w is not None), default=None) for pair in zip(known, windows, strict=True)]
    limited = tuple(None if window is None or window >= plan.n_max else window for window in both)
    rules = [
        layer if window is None else [HeadRule("dense") if rule.lsh is not None else rule for rule in layer]
        for layer, window in zip(plan.rules, limited, strict=True)
    ]
    return dataclasses.replace(plan, rules=rules, windows=limited)

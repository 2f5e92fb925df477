"""From the profiles of items to loss curves: how noisy, signed, first-order estimates become losses a planner can add up.

    entry            sum of |E_ij| over what is dropped: the paper's influence with its reference's absolute value
    joint            weighted mean over items of the joint estimate, signed
    joint_positive   mean over items of its positive part: what one item gains does not pay for what another loses
    joint_absolute   mean over items of its absolute value: a head that changes an answer at all is taken to matter

All are then made non-negative and non-increasing in the span (`attnspan.planner.losses.monotone`). Profiles of several rounds,
the dense one and those with plans in force, are averaged per item first: a path from the dense model to the plan, along which
the first-order estimates of many heads that are cut together add up to what cutting them does (as in integrated gradients, arXiv
1703.01365).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from attnspan.calibration.item_profile import Curve, ItemProfile, by_length
from attnspan.planner.errors import UserError
from attnspan.planner.losses import monotone

Rounds = Sequence[Sequence[ItemProfile]]


def _path(rounds: Rounds) -> dict[int, tuple[Curve, list[float]]]:
    """Mean over rounds, per item, against the full span: float64 [items, layers, kv_heads, blocks + 1]; and their weights."""
    out: dict[int, Curve] = {}
    weights: dict[int, list[float]] = {}
    for profiles in rounds:
        for n, group in by_length(profiles).items():
            group = sorted(group, key=lambda p: p.item)
            curves = np.stack([p.joint for p in group])
            out[n] = out.get(n, 0) + (curves - curves[..., -1:]) / len(rounds)
            weights[n] = [p.weight for p in group]
    return {n: (curve, weights[n]) for n, curve in out.items()}


def _joint(part: Callable[[Curve], Curve]) -> Callable[[Rounds], dict[int, Curve]]:
    return lambda rounds: {n: np.average(part(items), 0, weights) for n, (items, weights) in _path(rounds).items()}


def _entry(rounds: Rounds) -> dict[int, Curve]:
    out = {}
    for n, group in by_length(rounds[0]).items():
        known = [p for p in group if p.entry is not None]
        if not known:
            raise UserError(
                "the profile holds no influence of single entries; calibrate with --entries, or use another --estimator"
            )
        out[n] = np.average([p.entry for p in known], 0, [p.weight for p in known])  # type: ignore[misc]
    return out


ESTIMATORS: dict[str, Callable[[Rounds], dict[int, Curve]]] = {
    "entry": _entry,
    "joint": _joint(lambda c: c),
    "joint_positive": _joint(lambda c: np.maximum(c, 0)),
    "joint_absolute": _joint(np.abs),
}
DEFAULT = "joint_absolute"


def curves(rounds: Rounds, estimator: str = DEFAULT) -> dict[int, Curve]:
    """Loss curves float64 [layers, kv_heads, N/64 + 1] by length N from one round of profiles or several. UserError: unknown
    name.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator is {estimator!r}: must be one of {', '.join(ESTIMATORS)}; change --estimator")
    return monotone(ESTIMATORS[estimator](rounds))

"""From the profiles of a calibration folder to the choices of the unified planner, all in one currency.

The currency is the KL divergence from the dense model that is predicted for an answer token, to second order: s^2 / 2, with the
change s of the token's loss that a head causes to first order. Samples have it from the sampling profile. The influence profile
has the change of the mean loss of an item's T answer tokens; the changes of single tokens have no common sign as long as they are
small, so that T s^2 / 2 of the mean stands for the mean of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from attnspan.calibration.folder import Calibration
from attnspan.calibration.item_profile import Curve, ItemProfile, by_length
from attnspan.calibration.items import Item
from attnspan.calibration.sampling_profile import ItemSampling
from attnspan.planner.choices import Choices
from attnspan.planner.errors import UserError
from attnspan.planner.grid import FULL, fine_grid
from attnspan.planner.losses import LossTable, monotone, stretched
from attnspan.planner.lsh_grid import dense_below
from attnspan.planner.problem import Array
from attnspan.planner.rules import HeadRule, LshParams
from attnspan.planner.shape import ModelShape
from attnspan.planner.unified_text import describe_lsh

__all__ = ["FOLDER", "build_choices", "load_choices", "span_curves"]

FOLDER = "sampling"
"""Of the sampling profile, in a calibration folder."""


def span_curves(profiles: Sequence[ItemProfile], items: Sequence[Item]) -> dict[int, Curve]:
    """Predicted KL in nats per answer token by length and span, float64 [layers, kv_heads, N/64 + 1], never rising."""
    count = {item.id: len(item.targets) for item in items}
    out = {}
    for n, group in by_length(profiles).items():
        squares = [count[p.item] / 2 * (p.joint - p.joint[..., -1:]) ** 2 for p in group]
        out[n] = np.average(squares, 0, [p.weight for p in group])
    return monotone(out)


def load_choices(
    folder: str | Path,
    n_max: int | None = None,
    rules: Sequence[HeadRule] | None = None,
    candidates: Sequence[LshParams] | None = None,
    sampled: Sequence[str] | None = None,
) -> Choices:
    """The choices of a calibration folder: spans, dense, and the ways of sampling that its sampling profile knows.

    n_max: the model's own limit without one; rules: spans to choose from, by default the fine grid; candidates: ways of sampling,
    by default all that every item was measured with; sampled: ids of the items to take them from, by default all. UserError when
    the folder is none, or not finished.
    """
    cal = Calibration.load(folder)
    if n_max is None:
        n_max = cal.limit or max(cal.lengths)
    files = cal.profiles()
    sampling = [ItemSampling.load(file) for file in sorted((cal.folder / FOLDER).glob("*.npz"))]
    sampling = [each for each in sampling if sampled is None or each.item in sampled]
    grid = tuple(rules) if rules is not None else fine_grid({*cal.lengths, n_max})
    curves = span_curves([ItemProfile.load(f) for f in files], cal.calibration_items())
    return build_choices(cal.shape, n_max, curves, sampling, grid, candidates)


def build_choices(
    shape: ModelShape,
    n_max: int,
    curves: Mapping[int, Curve],
    sampling: Sequence[ItemSampling],
    spans: Sequence[HeadRule],
    wanted: Sequence[LshParams] | None = None,
) -> Choices:
    """Spans, dense and what was sampled, at the profiled lengths and n_max. curves: of `span_curves`; wanted: ways of
    sampling, by default all that every item was measured with. UserError when an item lacks one of them, or items share none.

    At n_max spans lose what they do at the same share of the longest profiled text; samples what they lose in the longest that
    was sampled, though they err less in longer ones. Where a step is exact because the text is short, a sample loses nothing.
    """
    known = stretched(curves, n_max)
    rules = [rule for rule in spans if rule != FULL]
    table = LossTable.from_curves(monotone(known), [*rules, HeadRule("dense")])
    candidates = _common(sampling, wanted)
    lengths, (layers, heads) = table.lengths, table.loss.shape[1:3]
    loss = np.zeros((len(lengths), layers, heads, len(candidates)))
    drawn, read = np.zeros((2, layers, heads, len(candidates)))
    if candidates:
        measured = _measured(sampling, candidates)
        longest = max(measured)
        drawn, read = measured[longest][1:]
        exact = np.array([[n < dense_below(each) for each in candidates] for n in lengths])
        for i, n in enumerate(lengths):
            nearest = min(measured, key=lambda m: (abs(m - n), m))
            loss[i] = np.where(exact[i], 0.0, measured[nearest][0])
    none = np.zeros((layers, heads, len(table.rules)))
    return Choices(
        shape,
        n_max,
        (*table.rules, *(HeadRule("lsh", lsh=each) for each in candidates)),
        lengths,
        np.concatenate([table.loss, loss], -1),
        np.concatenate([none, drawn], -1),
        np.concatenate([none, read], -1),
    )


def _common(sampling: Sequence[ItemSampling], wanted: Sequence[LshParams] | None) -> list[LshParams]:
    """Candidates that every item was measured with, of `wanted` if it is given. UserError when they lack one of these, or when
    items share none."""
    measured = [each.candidates for each in sampling]
    common = [each for each in measured[0] if all(each in other for other in measured)] if measured else []
    lacking = [each for each in wanted or () if each not in common]
    if lacking or (measured and not common and wanted is None):
        what = f"no {describe_lsh(lacking[0])}, which is wanted" if lacking else "no way of sampling"
        raise UserError(
            f"the {len(measured)} sampled items have in common {what}: run attnspan plan DIR --target again with --index, "
            "--fractions and --sampling-items as wanted, which measures what is missing, or change candidates"
        )
    return [each for each in common if wanted is None or each in wanted]


def _measured(sampling: Sequence[ItemSampling], candidates: Sequence[LshParams]) -> dict[int, tuple[Array, Array, Array]]:
    """By length, the weighted means of loss, drawn and read, each [layers, kv_heads, candidates]."""
    out = {}
    for n in sorted({each.length for each in sampling}):
        group = [each for each in sampling if each.length == n]
        weights = [each.weight for each in group]
        columns = [[each.candidates.index(c) for c in candidates] for each in group]

        names = ("loss", "share", "read")
        each = [[getattr(item, name)[..., at] for item, at in zip(group, columns, strict=True)] for name in names]
        loss, share, read = (np.asarray(np.average(values, 0, weights)) for values in each)
        out[n] = loss, share, read
    return out

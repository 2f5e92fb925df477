"""Plans published by others: the MoA reference's alpha and beta per query head, folded to KV heads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json
from attnspan.planner.plan import MAX_TOKENS, Plan
from attnspan.planner.rules import HeadRule, check_int, check_number, span_tokens
from attnspan.planner.shape import ModelShape

FOLDS = ("max", "mean")
PROFILED = (2048, 4096, 8192)
"""Lengths the published plans were profiled at, in tokens."""


@dataclass(frozen=True)
class ImportReport:
    """What folding query heads to KV heads did: densities by length before and after, groups left short."""

    file: str
    heads: int
    kv_heads: int
    fold: str
    density_query: Mapping[int, float]
    density_kv: Mapping[int, float]
    groups: int
    groups_of_one_rule: int
    groups_short: int
    largest_shortfall: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def lines(self) -> list[str]:
        """The report for people, one sentence or table row a line."""
        how = {
            "max": "the member rule with the largest mean span",
            "mean": "the mean alpha and mean beta of the members",
        }
        out = [f"imported {self.file}: {self.heads} query heads, {self.kv_heads} KV heads a layer"]
        if self.group == 1:
            out.append("one query head per KV head: every rule is kept as it is")
        else:
            out.append(
                f"folded {self.group} query heads to one KV head, fold {self.fold!r}: {how[self.fold]}; "
                f"{self.groups_of_one_rule} of {self.groups} groups had one rule already"
            )
            if self.groups_short:
                out.append(
                    f"{self.groups_short} groups keep less than a member asked for at one of these lengths, "
                    f"by up to {self.largest_shortfall} tokens"
                )
        out.append("  length   density per query head   per KV head   cache of dense, query heads expanded")
        for n, before in self.density_query.items():
            after, expanded = self.density_kv[n], before * self.group
            out.append(f"{n:8d}   {before:22.3f}   {after:11.3f}   {expanded:35.2f}x")
        return out


def import_moa(
    path: str | Path,
    heads: int,
    kv_heads: int,
    fold: str = "max",
    n_max: int = 8192,
    head_dim: int | None = None,
    model_id: str | None = None,
    config_hash: str | None = None,
) -> tuple[Plan, ImportReport]:
    """Read a published MoA plan, `{"alphas": [[..] * heads] * layers, "betas": ...}`, alpha in tokens.

    Query head h belongs to KV head h // (heads / kv_heads); its group gets one rule. fold `max` takes the
    member with the largest mean span over 2k, 4k, 8k and n_max (as far as n_max reaches), so it never mixes
    rules; `mean` averages alpha and beta. UserError on a file that is no such plan or has other head counts.
    Source: github.com/thu-nics/MoA, format of `moa_alpha_beta.json`.
    """
    if fold not in FOLDS:
        raise UserError(f"fold is {fold!r}: must be one of {', '.join(FOLDS)}; change --fold")
    check_int("n_max", n_max, 128, MAX_TOKENS, "; change --n-max")
    file = Path(path)
    alpha, beta = _read(file, heads)
    layers = len(alpha)
    folder = file.resolve().parent.name  # published as organisation--model/file
    name = model_id or (folder.replace("--", "/") if "--" in folder else file.stem)
    shape = ModelShape(name, layers, heads, kv_heads, head_dim, config_hash)
    grouped = (layers, kv_heads, shape.group)
    alpha, beta = alpha.reshape(grouped), beta.reshape(grouped)
    lengths = np.array([n for n in PROFILED if n < n_max] + [n_max])
    # [layers, kv_heads, group, lengths]
    members = np.minimum(span_tokens(alpha[..., None], beta[..., None], lengths), lengths)
    if fold == "max":
        total = members.sum(axis=-1)
        best = total == total.max(axis=-1, keepdims=True)
        pick = np.where(best, members[..., -1], -1).argmax(axis=-1)[..., None]  # ties: the most at n_max
        folded = [np.take_along_axis(array, pick, axis=-1)[..., 0] for array in (alpha, beta)]
    else:
        folded = [alpha.mean(axis=-1), beta.mean(axis=-1)]
    rules = [[HeadRule("span", a, b) for a, b in layer] for layer in np.stack(folded, axis=-1)]
    kept = np.minimum(span_tokens(folded[0][..., None], folded[1][..., None], lengths), lengths)
    short = (members.max(axis=2) - kept).max(axis=-1)
    same = (alpha == alpha[..., :1]).all(axis=-1) & (beta == beta[..., :1]).all(axis=-1)
    before = {int(n): float(members[..., i].mean() / n) for i, n in enumerate(lengths)}
    provenance = {
        "method": "import",
        "format": "MoA alpha-beta",
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "fold": fold,
        "density_per_query_head": {str(n): round(value, 6) for n, value in before.items()},
    }
    plan = Plan(shape, n_max, rules, provenance=provenance)
    report = ImportReport(
        file=str(path),
        heads=heads,
        kv_heads=kv_heads,
        fold=fold,
        density_query=before,
        density_kv={n: plan.density(n) for n in before},
        groups=same.size,
        groups_of_one_rule=int(same.sum()),
        groups_short=int((short > 0).sum()),
        largest_shortfall=int(max(short.max(), 0)),
    )
    return plan, report


def _read(file: Path, heads: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """alpha and beta, float64 [layers, heads], checked value by value."""
    data = read_json(file)
    if set(data) != {"alphas", "betas"}:
        raise UserError(f"{file} has the keys {sorted(data)!r:.60}: a MoA plan has 'alphas' and 'betas'")
    alpha = _matrix(file, "alphas", data["alphas"], heads, -(2.0**30), 2.0**30)
    beta = _matrix(file, "betas", data["betas"], heads, 0.0, 1.0)
    if len(alpha) != len(beta):
        raise UserError(f"{file} has {len(alpha)} layers of alphas, {len(beta)} of betas: must be equal")
    return alpha, beta


def _matrix(file: Path, name: str, rows: Any, heads: int, low: float, high: float) -> npt.NDArray[np.float64]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise UserError(f"{file}: {name} must be a list of layers, each a list of numbers")
    for i, row in enumerate(rows):
        if len(row) != heads:
            raise UserError(f"{file} has {len(row)} query heads in layer {i}, not {heads}; change --heads")
        for h, value in enumerate(row):
            check_number(f"{file}: {name}[{i}][{h}]", value, low, high)
    return np.array(rows, np.float64)

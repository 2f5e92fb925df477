"""What decoding costs in milliseconds: a straight line through the times of `attnspan bench attention`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.planner.cost import CACHE_BYTES
from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json
from attnspan.planner.rules import check_int, check_number
from attnspan.planner.shape import ModelShape

KERNEL = "attnspan"
"""Name of this product's kernel in the benchmark's report."""


@dataclass(frozen=True)
class DecodeCost:
    """Time of one attention layer for one token of one sequence: fixed + per_slot * slots, in milliseconds.

    A slot is a token that one KV head keeps. Measured with this head_dim, number of query heads to a KV head, cache type and
    number of threads.
    """

    fixed: float
    per_slot: float
    head_dim: int
    group: int
    dtype: str
    threads: int

    def scaled(self, shape: ModelShape, dtype: str) -> tuple[float, float]:
        """fixed and per_slot for a model: per_slot in proportion to head_dim, and to the query heads of a group if it has more.

        Decode reads every slot once, whatever the group, so that a smaller group saves little; a larger one computes more.
        UserError when the cache type is another or head_dim is unknown.
        """
        if dtype != self.dtype:
            raise UserError(f"cache type is {dtype}: the times are for {self.dtype}; measure them with --dtype {dtype}")
        if shape.head_dim is None:
            raise UserError("milliseconds are bounded but the size of a head is unknown; give --head-dim, or drop --milliseconds")
        return self.fixed, self.per_slot * shape.head_dim / self.head_dim * max(1.0, shape.group / self.group)

    @classmethod
    def load(cls, path: str | Path, dtype: str = "bf16", batch: int = 1) -> DecodeCost:
        """Fit the line to a file of `attnspan bench attention --json FILE`: the decode times of this product's own kernel.

        Least squares of relative errors, both parts at least 0. UserError when the file has fewer than two different numbers of
        kept tokens for this cache type and batch.
        """
        file = Path(path)
        report = read_json(file)
        settings, results = report.get("settings"), report.get("results")
        if not isinstance(settings, Mapping) or not isinstance(results, list):
            raise UserError(f"{file} is not from `attnspan bench attention --json`: no settings or results; change --cost-table")
        if dtype not in CACHE_BYTES:
            raise UserError(f"cache type is {dtype!r}: must be one of {', '.join(CACHE_BYTES)}; change --cache-dtype")
        names = ("heads", "kv_heads", "head_dim", "threads")
        heads, kv_heads, head_dim, threads = (check_int(f"{file}: {name}", settings.get(name), 1, 65536) for name in names)
        wanted = {"kernel": KERNEL, "phase": "decode", "dtype": dtype, "batch": batch}
        mine = [r for r in results if isinstance(r, Mapping) and wanted.items() <= r.items()]
        slots = np.array([_number(file, r, "kept_bytes") for r in mine]) / (2 * batch * head_dim * CACHE_BYTES[dtype])
        times = np.array([_number(file, r, "median_ms") for r in mine])
        sizes = len(set(slots.tolist()))
        if sizes < 2:
            raise UserError(
                f"{file} has decode times of {KERNEL} for {sizes} numbers of kept tokens (cache {dtype}, batch {batch}): at "
                f"least 2 are needed; run `attnspan bench attention --dtype {dtype} --batch {batch} --density 1,0.5,0.25 "
                "--json FILE`"
            )
        fixed, per_slot = fit_times(times, slots)
        if per_slot <= 0:
            few, many = slots.min(), slots.max()
            raise UserError(f"{file}: decode takes as long for {few:g} slots as for {many:g}; measure longer contexts")
        return cls(float(fixed / batch), float(per_slot / batch), head_dim, heads // kv_heads, dtype, threads)


def fit_times(times: npt.NDArray[np.float64], *counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A fixed part and one for each of the counts, none below 0, that make up the times: least squares of relative errors."""
    from scipy.optimize import nnls  # takes a second to load: not for --help

    found: npt.NDArray[np.float64] = nnls(np.stack([1 / times, *(n / times for n in counts)], axis=1), np.ones(len(times)))[0]
    return found


def _number(file: Path, result: Mapping[str, Any], name: str) -> float:
    value = check_number(f"{file}: {name}", result.get(name), 0.0, 1e30)
    if value == 0:
        raise UserError(f"{file}: {name} is 0: must be above 0")
    return value

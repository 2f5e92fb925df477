"""What a step of sampled attention costs in milliseconds: a plane through the times of `attnspan bench lsh`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnspan.planner.cost import CACHE_BYTES
from attnspan.planner.decode_cost import fit_times
from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json
from attnspan.planner.rules import LshParams, check_int, check_number
from attnspan.planner.shape import ModelShape

__all__ = ["LshCost", "timed_as"]


def timed_as(params: LshParams) -> str:
    """Name of what a head's times are known by: its index, and the width of what that hashes to."""
    return _name(params.index, vars(params))


def _name(index: str, parameters: Mapping[str, Any]) -> str:
    if index == "signature":
        return f"{index} of {parameters.get('signature_bits')} bits"
    return f"{index} ({parameters.get('bits')}, {parameters.get('tables')})" if index == "tables" else index


@dataclass(frozen=True)
class LshCost:
    """Time of one layer of one index for one token: fixed + per_key * keys + per_row * rows, in milliseconds.

    A key is a token of one KV head that is indexed, a row one that is attended to. Measured with this head_dim, numbers of heads,
    cache type and number of threads.
    """

    fixed: float
    per_key: float
    per_row: float
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    threads: int

    def scaled(self, shape: ModelShape, dtype: str) -> tuple[float, float, float]:
        """fixed, for one KV head, per_key and per_row for a model: rows in proportion to head_dim, what a query costs to its
        number; keys and rows also to the query heads of a group if it has more. UserError when the cache type is another."""
        if dtype != self.dtype:
            raise UserError(f"cache type is {dtype}: the times are for {self.dtype}; measure them with bench lsh --dtype {dtype}")
        if shape.head_dim is None:
            raise UserError("milliseconds are bounded but the size of a head is unknown; give --head-dim")
        wider, more = shape.head_dim / self.head_dim, max(1.0, shape.group / (self.heads / self.kv_heads))
        return self.fixed * shape.group / self.heads, self.per_key * wider * more, self.per_row * wider * more

    @classmethod
    def load(cls, path: str | Path, dtype: str = "bf16", threads: int | None = None) -> dict[str, LshCost]:
        """By name of `timed_as`, fitted to a file of `attnspan bench lsh --json FILE`: least squares of relative errors, no part
        below 0. threads: those of the measurements to take, by default those of all.

        An index of one width needs three measurements, at two contexts or more: others are left out. UserError when the file is
        another, has enough of none, or measurements with other numbers of threads.
        """
        file = Path(path)
        results = read_json(file).get("results")
        if not isinstance(results, list) or not all(isinstance(r, Mapping) and "kernel" in r for r in results):
            raise UserError(f"{file} is not from `attnspan bench lsh --json`: no results; change --lsh-cost-table")
        mine = [
            r for r in results if isinstance(r.get("parameters"), Mapping) and r.get("dtype") == dtype and r.get("batch") == 1
        ]
        counts = sorted({check_int(f"{file}: threads", r.get("threads"), 1, 65536) for r in mine})
        if counts and (len(counts) > 1 if threads is None else threads not in counts):
            wanted = "one number" if threads is None else f"{threads}, as --cost-table"
            raise UserError(
                f"{file} has times of {', '.join(map(str, counts))} threads: must be of {wanted}; measure them with bench lsh "
                "--threads"
            )
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for r in mine:
            if threads in (None, r["threads"]):
                groups.setdefault(_name(str(r["kernel"]), r["parameters"]), []).append(r)
        out: dict[str, LshCost] = {}
        short: list[UserError] = []
        for name, records in groups.items():
            try:
                out[name] = cls._fit(file, name, records, dtype)
            except UserError as error:
                short.append(error)
        if short and not out:
            raise short[0]
        if not out:
            raise UserError(
                f"{file} has no times of sampled decoding (cache {dtype}, batch 1); run `attnspan bench lsh --dtype {dtype} "
                "--context 8192,32768 --index sketch --fraction 0.01,0.05 --json FILE`"
            )
        return out

    @classmethod
    def _fit(cls, file: Path, name: str, records: list[Mapping[str, Any]], dtype: str) -> LshCost:
        first = records[0]
        heads, kv_heads, dim, threads = (
            check_int(f"{file}: {key}", first.get(key), 1, 65536) for key in ("heads", "kv_heads", "head_dim", "threads")
        )
        same = [r for r in records if all(r.get(key) == first[key] for key in ("heads", "kv_heads", "head_dim"))]

        def column(key: str) -> Any:
            return np.array([check_number(f"{file}: {key}", r.get(key), 0.0, 1e30) for r in same])

        contexts, ms = column("context"), column("median_ms")
        if len(same) < 3 or len(set(contexts.tolist())) < 2 or not ms.all():
            raise UserError(
                f"{file} has {len(same)} times of index {name} at {len(set(contexts.tolist()))} contexts: at least 3 at 2 are "
                "needed; give bench lsh more --context and --fraction"
            )
        keys = contexts * kv_heads
        rows = np.maximum(column("kept_bytes") - _scanned(same, keys), 0) / (2 * dim * CACHE_BYTES[dtype])
        fixed, per_key, per_row = fit_times(ms, keys, rows)
        return cls(float(fixed), float(per_key), float(per_row), heads, kv_heads, dim, dtype, threads)


def _scanned(records: list[Mapping[str, Any]], keys: Any) -> Any:
    """Bytes of the index in `kept_bytes`: sketches and signatures are read whole; of tables it is little."""
    each = [0.0 if r["kernel"] == "tables" else float(r["index_bytes_per_token"]) for r in records]
    return np.array(each) * keys

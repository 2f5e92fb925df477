"""What a plan of spans, whole texts and samples may cost: memory by device, bytes read and time for a token, as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from attnspan.planner.choices import Choices
from attnspan.planner.cost import CACHE_BYTES, format_bytes
from attnspan.planner.decode_cost import DecodeCost
from attnspan.planner.errors import UserError
from attnspan.planner.lsh import state_bytes
from attnspan.planner.lsh_cost import LshCost
from attnspan.planner.problem import SLACK, Array, Choice, InfeasibleError, Rows
from attnspan.planner.rules import SINK, check_int, check_number, span_tokens

__all__ = ["TARGETS", "Limits"]

TARGETS = ("hybrid", "cpu")
_OPTION = {
    "gpu_kv": "--gpu-kv", "cpu_kv": "--cpu-kv", "kv": "--kv", "read": "--read", "milliseconds": "--ms-per-token",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Upper bounds; what is not given is not bounded.

    Memory in bytes of one sequence in an artefact for n_max, in caches of cache_dtype. target hybrid: gpu_kv counts the caches of
    spans and dense heads and the sinks and windows of sampled ones; cpu_kv the whole caches of sampled heads and their indexes.
    target cpu: kv counts everything. read: by length, bytes of keys, values and indexes that a step reads, over those of dense
    attention. milliseconds: by length, attention of all layers for one token, plus other_ms; needs decode_cost, and lsh_cost (by
    index) for sampled heads.
    """

    gpu_kv: float | None = None
    cpu_kv: float | None = None
    kv: float | None = None
    read: Mapping[int, float] = field(default_factory=dict)
    milliseconds: Mapping[int, float] = field(default_factory=dict)
    other_ms: float = 0.0
    target: str = "hybrid"
    cache_dtype: str = "bf16"
    decode_cost: DecodeCost | None = None
    lsh_cost: Mapping[str, LshCost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"target is {self.target!r}: plans with samples are for {' or '.join(TARGETS)}; change --target")
        if self.cache_dtype not in CACHE_BYTES:
            raise UserError(f"cache type is {self.cache_dtype!r}: must be one of {', '.join(CACHE_BYTES)}; change --cache-dtype")
        taken = {"hybrid": ("gpu_kv", "cpu_kv"), "cpu": ("kv",)}
        for name in ("gpu_kv", "cpu_kv", "kv"):
            bound = getattr(self, name)
            if bound is None:
                continue
            if name not in taken[self.target]:
                fitting = " and ".join(_OPTION[each] for each in taken[self.target])
                raise UserError(f"{_OPTION[name]} has no meaning for target {self.target}: must be {fitting}; drop it")
            check_number(_OPTION[name], bound, 0.0, 1e30)
        for name, most in (("read", 1.0), ("milliseconds", 1e30)):
            for n, bound in getattr(self, name).items():
                check_int(f"length of {_OPTION[name]}", n, 128, 2**30)
                check_number(f"{_OPTION[name]} at {n}", bound, 0.0, most)
        if not (self.read or self.milliseconds or any(getattr(self, name) is not None for name in taken[self.target])):
            fitting = ", ".join(_OPTION[name] for name in (*taken[self.target], "read", "milliseconds"))
            raise UserError(f"nothing is bounded: every head would be dense; give one or more of {fitting}")
        check_number("--other-ms", self.other_ms, 0.0, 1e30)
        if self.milliseconds and self.decode_cost is None:
            raise UserError("time is bounded but no times are known: give --cost-table, or drop --ms-per-token")

    def check_lengths(self, n_max: int) -> None:
        """UserError when a bound is given at a length above n_max."""
        for kind, bounds in (("read", self.read), ("milliseconds", self.milliseconds)):
            for n in bounds:
                if n > n_max:
                    raise UserError(f"{_OPTION[kind]} is given at {n} tokens: must be at most n_max, {n_max}; change --n-max")

    def costs(self, choices: Choices) -> list[tuple[str, int, float, Array]]:
        """(kind, length, bound, cost [layers, kv_heads, rules]) of every bound; costs of heads add up to what is bounded.

        UserError when head_dim is unknown, a length is above n_max, or a sampled head's times are.
        """
        shape = choices.shape
        if shape.head_dim is None:
            raise UserError("the size of a head is unknown: bytes cannot be counted; calibrate again")
        self.check_lengths(choices.n_max)
        out: list[tuple[str, int, float, Array]] = []
        memory = self._memory(choices)
        for kind in ("gpu_kv", "cpu_kv", "kv"):
            bound = getattr(self, kind)
            if bound is not None:
                out.append((kind, choices.n_max, bound, np.broadcast_to(memory[kind], choices.drawn.shape)))
        for n, bound in self.read.items():
            out.append(("read", n, bound, self.read_bytes(choices, n) / self.dense_bytes(choices, n)))
        for n, bound in self.milliseconds.items():
            left = bound - self.other_ms
            if left <= 0:
                raise InfeasibleError(
                    f"--ms-per-token is {bound:g}: the rest of the model alone takes {self.other_ms:g} ms; raise it by more than "
                    f"{-left:.4g} ms"
                )
            out.append(("milliseconds", n, left, self._times(choices, n)))
        return out

    def rows(self, choices: Choices) -> Rows:
        """The bounds as rows. InfeasibleError, saying by how much, when even the cheapest choices break one of them."""
        made = self.costs(choices)
        for kind, n, bound, cost in made:
            least = float(cost.min(axis=-1).sum())
            if least > bound * (1 + SLACK):
                raise InfeasibleError(_short(kind, n, bound, least))
        names = tuple(_name(kind, n) for kind, n, _, _ in made)
        return Rows(names, np.stack([cost for *_, cost in made]), np.array([bound for _, _, bound, _ in made], np.float64))

    def read_bytes(self, choices: Choices, n: int) -> Array:
        """Bytes that a step at n tokens reads of each head's cache and index, [layers, kv_heads, rules]."""
        return choices.rows(n) * self._slot(choices) + choices.index_bytes(n)

    def dense_bytes(self, choices: Choices, n: int) -> float:
        """Bytes that a step of dense attention reads at n tokens."""
        return n * self._slot(choices) * choices.shape.layers * choices.shape.kv_heads

    def memory(self, choices: Choices, choice: Choice) -> dict[str, float]:
        """Bytes that a choice takes, by device."""
        kinds = ("gpu_kv", "cpu_kv") if self.target == "hybrid" else ("kv",)
        return {kind: float(self._memory(choices)[kind][choice].sum()) for kind in kinds}

    @staticmethod
    def option(kind: str) -> str:
        """Name of the option of a bound."""
        return _OPTION[kind]

    def show(self, kind: str, value: float) -> str:
        """A bound for people; of time, with what the rest of the model takes."""
        return _show(kind, value + (self.other_ms if kind == "milliseconds" else 0))

    def _slot(self, choices: Choices) -> float:
        assert choices.shape.head_dim is not None
        return 2.0 * choices.shape.head_dim * CACHE_BYTES[self.cache_dtype]

    def _memory(self, choices: Choices) -> dict[str, Array]:
        """Bytes of a head by device, [rules]."""
        assert choices.shape.head_dim is not None
        slot, capacity = self._slot(choices), choices.capacities()
        sampled = np.array([rule.lsh is not None for rule in choices.rules])
        # The header of an index is counted for every head, though heads of a layer that share parameters share one.
        index = np.array([
            0 if rule.lsh is None else state_bytes(rule.lsh, 1, choices.shape.head_dim, int(slots))
            for rule, slots in zip(choices.rules, capacity, strict=True)
        ])  # fmt: skip
        windows = [0 if rule.lsh is None else SINK + rule.lsh.window for rule in choices.rules]
        near = span_tokens(windows, 0.0, choices.n_max)
        whole = capacity * slot
        return {
            "gpu_kv": np.where(sampled, near * slot, whole),
            "cpu_kv": np.where(sampled, whole + index, 0.0),
            "kv": whole + index,
        }

    def _times(self, choices: Choices, n: int) -> Array:
        assert self.decode_cost is not None
        fixed, each = self.decode_cost.scaled(choices.shape, self.cache_dtype)
        # The fixed part of a layer is shared out to its heads, so that the row sums to milliseconds.
        out = np.broadcast_to(fixed / choices.shape.kv_heads + each * choices.slots(n), choices.drawn.shape).copy()
        sampled, rows = choices.sampled(n), choices.rows(n)
        for i, rule in enumerate(choices.rules):
            if rule.lsh is None:
                continue
            known = self.lsh_cost.get(rule.lsh.index)
            if known is None:
                raise UserError(
                    f"time is bounded but no times of index {rule.lsh.index} are known: give --lsh-cost-table FILE of attnspan "
                    "bench lsh --json with them, or leave it out with --index or --kinds"
                )
            if sampled[i]:
                first, per_key, per_row = known.scaled(choices.shape, self.cache_dtype)
                out[..., i] = first + per_key * sampled[i] + per_row * rows[..., i]
        return out


def _name(kind: str, n: int) -> str:
    words = {
        "gpu_kv": "bytes on the GPU", "cpu_kv": "bytes on the CPU", "kv": "bytes", "read": "share of dense bytes read",
        "milliseconds": "milliseconds",
    }  # fmt: skip
    return f"{words[kind]} at {n} tokens"


def _show(kind: str, value: float) -> str:
    if kind == "read":
        return f"{value:.2%}"
    return f"{value:.4g} ms" if kind == "milliseconds" else format_bytes(round(value))


def _short(kind: str, n: int, bound: float, least: float) -> str:
    """Why a bound cannot be kept, and what could be."""
    ways = {
        "gpu_kv": "allow lsh heads or smaller spans, shorten --n-max", "cpu_kv": "allow span heads, shorten --n-max",
        "kv": "allow span heads, shorten --n-max", "read": "allow span heads, tables or shorter signatures",
        "milliseconds": "allow span heads",
    }  # fmt: skip
    more = f"{least / bound - 1:.1%} more" if bound else "more than nothing"
    return (
        f"{_name(kind, n)}: {_show(kind, bound)} is the bound, but the cheapest choices of all heads need {_show(kind, least)}, "
        f"{more}; raise {_OPTION[kind]} to that, or {ways[kind]} (--kinds, --index)"
    )

"""What a plan of spans, whole texts and samples may cost: memory by device, bytes read and time for a token, as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from attnspan.planner.choices import Choices
from attnspan.planner.cost import CACHE_BYTES
from attnspan.planner.decode_cost import DecodeCost
from attnspan.planner.errors import UserError
from attnspan.planner.limit_text import OPTION, enough, more, name, show
from attnspan.planner.lsh import state_bytes
from attnspan.planner.lsh_cost import LshCost, timed_as
from attnspan.planner.problem import SLACK, Array, Choice, InfeasibleError, Rows
from attnspan.planner.rules import MIN_SPAN, SINK, check_int, check_number, span_tokens

__all__ = ["TARGETS", "Limits"]

TARGETS = ("hybrid", "cpu")
_TAKEN = {"hybrid": ("gpu_kv", "cpu_kv"), "cpu": ("kv",)}
_CACHES = {"hybrid": ("fp16", "bf16", "fp32"), "cpu": tuple(CACHE_BYTES)}


@dataclass(frozen=True)
class Limits:
    """Upper bounds; what is not given is not bounded.

    Memory in bytes of one sequence in an artefact for n_max, in caches of cache_dtype. target hybrid: gpu_kv counts the caches of
    spans and dense heads and the sinks and windows of sampled ones; cpu_kv the whole caches of sampled heads and their indexes.
    target cpu: kv counts everything. read: by length, bytes of keys, values and indexes that a step reads, over those of dense
    attention. milliseconds: by length, attention of all layers for one token, plus other_ms; needs decode_cost, and for sampled
    heads lsh_cost (as `LshCost.load` reads it), both measured with as many threads.
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
        if self.cache_dtype not in _CACHES[self.target]:
            raise UserError(
                f"cache type is {self.cache_dtype!r}: must be one of {', '.join(_CACHES[self.target])} for target {self.target}; "
                "change --cache-dtype"
            )
        taken = _TAKEN[self.target]
        for kind in ("gpu_kv", "cpu_kv", "kv"):
            bound = getattr(self, kind)
            if bound is None:
                continue
            if kind not in taken:
                fitting = " and ".join(OPTION[each] for each in taken)
                raise UserError(f"{OPTION[kind]} has no meaning for target {self.target}: must be {fitting}; drop it")
            check_number(OPTION[kind], bound, 0.0, 1e30)
        for kind, most in (("read", 1.0), ("milliseconds", 1e30)):
            for n, bound in getattr(self, kind).items():
                check_int(f"length of {OPTION[kind]}", n, 128, 2**30)
                check_number(f"{OPTION[kind]} at {n}", bound, 0.0, most)
        if not (self.read or self.milliseconds or any(getattr(self, kind) is not None for kind in taken)):
            fitting = ", ".join(OPTION[kind] for kind in (*taken, "read", "milliseconds"))
            raise UserError(f"nothing is bounded: every head would be dense; give one or more of {fitting}")
        check_number("--other-ms", self.other_ms, 0.0, 1e30)
        if self.milliseconds:
            self._check_times()

    def _check_times(self) -> None:
        if self.decode_cost is None:
            raise UserError("time is bounded but no times are known: give --cost-table, or drop --ms-per-token")
        wrong = {each.threads for each in self.lsh_cost.values()} - {self.decode_cost.threads}
        if wrong:
            raise UserError(
                f"--lsh-cost-table has times of {min(wrong)} threads, --cost-table of {self.decode_cost.threads}: must be as "
                "many for times to add up; measure one of them again with --threads"
            )

    def check_lengths(self, n_max: int) -> None:
        """UserError when a bound is given at a length above n_max."""
        for kind, bounds in (("read", self.read), ("milliseconds", self.milliseconds)):
            for n in bounds:
                if n > n_max:
                    raise UserError(f"{OPTION[kind]} is given at {n} tokens: must be at most n_max, {n_max}; change --n-max")

    def costs(self, choices: Choices) -> list[tuple[str, int, float, Array]]:
        """(kind, length, bound, cost [layers, kv_heads, rules]) of every bound; costs of heads add up to what is bounded. That of
        time is what other_ms leaves of it, perhaps less than nothing.

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
            out.append(("milliseconds", n, bound - self.other_ms, self._times(choices, n)))
        return out

    def rows(self, choices: Choices) -> Rows:
        """The bounds as rows. InfeasibleError, saying by how much, when even the cheapest choices break one of them."""
        made = self.costs(choices)
        for kind, n, bound, cost in made:
            if _least(cost) > bound * (1 + SLACK):
                raise InfeasibleError(self._short(choices, kind, n, bound, cost))
        names = tuple(name(kind, n) for kind, n, _, _ in made)
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

    def would_do(self, choices: Choices, kind: str, n: int, bound: float, least: float) -> str:
        """A bound's option with a value that is enough, as it is typed, and how much more that is."""
        other = self._other(kind)
        at = f"@{n}" if kind in ("read", "milliseconds") and n != choices.n_max else ""
        return f"{OPTION[kind]} {enough(kind, least + other)}{at} ({more(least + other, bound + other)})"

    def _other(self, kind: str) -> float:
        """What the option of a bound counts beside the heads."""
        return self.other_ms if kind == "milliseconds" else 0.0

    def _short(self, choices: Choices, kind: str, n: int, bound: float, cost: Array) -> str:
        """Why a bound cannot be kept, and what could be."""
        other = self._other(kind)
        inside = f", --other-ms {other:g} in it" if other else ""
        ways = [self.would_do(choices, kind, n, bound, _least(cost)), *self._remedies(choices, kind, n, cost)]
        return (
            f"{name(kind, n)}: {show(kind, bound + other)} is the bound{inside}; the cheapest choices of all heads need more: "
            f"raise it to {', or '.join(ways)}"
        )

    def _remedies(self, choices: Choices, kind: str, n: int, cost: Array) -> list[str]:
        """What else lowers the least of a bound: nothing, where every head takes as little as with the smallest span."""
        if _least(cost) <= self._smallest(choices, kind, n) * choices.shape.layers * choices.shape.kv_heads * (1 + SLACK):
            return []
        kinds, memory = choices.kinds(), kind in ("gpu_kv", "cpu_kv", "kv")
        out = ["take smaller spans (--grid fine)" if "span" in kinds else "allow span heads (--kinds)"]
        if kind == "gpu_kv" and "lsh" not in kinds:
            out.append("allow lsh heads (--kinds)")
        cheapest = choices.rules[int(cost[0, 0].argmin())]
        if memory and cheapest.beta > 0 and not (kind == "gpu_kv" and cheapest.lsh):
            out.append("shorten --n-max")
        return out

    def _smallest(self, choices: Choices, kind: str, n: int) -> float:
        """What a head with the smallest span costs."""
        if kind == "milliseconds":
            fixed, each = self._decode(choices)
            return fixed + each * MIN_SPAN
        if kind == "cpu_kv":
            return 0.0
        return MIN_SPAN * self._slot(choices) / (self.dense_bytes(choices, n) if kind == "read" else 1.0)

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

    def _decode(self, choices: Choices) -> tuple[float, float]:
        """Milliseconds of a head that is not sampled: fixed, which is its share of the layer's, and for each slot."""
        assert self.decode_cost is not None
        fixed, each = self.decode_cost.scaled(choices.shape, self.cache_dtype)
        return fixed / choices.shape.kv_heads, each

    def _times(self, choices: Choices, n: int) -> Array:
        fixed, each = self._decode(choices)
        out = np.broadcast_to(fixed + each * choices.slots(n), choices.drawn.shape).copy()
        sampled, rows = choices.sampled(n), choices.rows(n)
        for i, rule in enumerate(choices.rules):
            if rule.lsh is None:
                continue
            known = self.lsh_cost.get(timed_as(rule.lsh))
            if known is None:
                raise UserError(
                    f"time is bounded but no times of index {timed_as(rule.lsh)} are known: give --lsh-cost-table FILE of "
                    "attnspan bench lsh --json with them, or leave it out with --index or --kinds"
                )
            if sampled[i]:
                first, per_key, per_row = known.scaled(choices.shape, self.cache_dtype)
                out[..., i] = first + per_key * sampled[i] + per_row * rows[..., i]
        return out


def _least(cost: Array) -> float:
    """What the cheapest choices of all heads take."""
    return float(cost.min(axis=-1).sum())

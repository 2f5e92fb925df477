"""What a plan may cost: density, KV bytes and decode time, each at some lengths, as rows of the optimiser's problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from attnspan.planner.cost import CACHE_BYTES, format_bytes
from attnspan.planner.decode_cost import DecodeCost
from attnspan.planner.errors import UserError
from attnspan.planner.plan import MAX_TOKENS
from attnspan.planner.problem import SLACK, Array, InfeasibleError, Rows
from attnspan.planner.rules import MIN_SPAN, HeadRule, check_int, check_number, span_tokens
from attnspan.planner.shape import ModelShape


@dataclass(frozen=True)
class Budget:
    """Upper bounds by sequence length in tokens; lengths need not be profiled ones.

    density: kept slots over dense slots, averaged over KV heads. kv_bytes: bytes of the keys and values of one sequence in the
    caches of an artefact built for that length. milliseconds: attention of all layers for one generated token, as decode_cost
    measured it; the rest of the model is not in it. cache_dtype is that of the caches.
    """

    density: Mapping[int, float] = field(default_factory=dict)
    kv_bytes: Mapping[int, float] = field(default_factory=dict)
    milliseconds: Mapping[int, float] = field(default_factory=dict)
    cache_dtype: str = "bf16"
    decode_cost: DecodeCost | None = None

    def __post_init__(self) -> None:
        if self.cache_dtype not in CACHE_BYTES:
            raise UserError(f"cache type is {self.cache_dtype!r}: must be one of {', '.join(CACHE_BYTES)}; change --cache-dtype")
        for name, most in (("density", 1.0), ("kv_bytes", 1e30), ("milliseconds", 1e30)):
            bounds = getattr(self, name)
            option = f"; change {_OPTION[name]}"
            for n, bound in bounds.items():
                check_int(f"length of a bound on {name}", n, MIN_SPAN, MAX_TOKENS, option)
                if check_number(f"{name} at {n}", bound, 0.0, most, option) <= 0:
                    raise UserError(f"{name} at {n} is {bound:g}: must be above 0{option}")
            object.__setattr__(self, name, dict(sorted(bounds.items())))
        if self.milliseconds and self.decode_cost is None:
            raise UserError("milliseconds are bounded but no times are known: give --cost-table, or drop --milliseconds")

    @classmethod
    def of_density(cls, density: float, lengths: Iterable[int], n_max: int) -> Budget:
        """The same density at all the lengths and at n_max, which is what the caches are allocated for."""
        return cls(density={n: density for n in sorted({*lengths, n_max})})

    def rows(self, rules: Sequence[HeadRule], shape: ModelShape) -> Rows:
        """The bounds as rows over the rules. InfeasibleError when even the cheapest rules of the grid break one of them."""
        alpha, beta = [rule.alpha for rule in rules], [rule.beta for rule in rules]
        heads = shape.layers * shape.kv_heads
        made: list[tuple[str, int, float, Array]] = []  # kind, length, bound, cost of each rule in one head
        for n, bound in self.density.items():
            made.append(("density", n, bound, _kept(alpha, beta, n) / (n * heads)))
        for n, bound in self.kv_bytes.items():
            if shape.head_dim is None:
                raise UserError("KV bytes are bounded but the size of a head is unknown; give --head-dim, or drop --kv-bytes")
            slot = 2.0 * shape.head_dim * CACHE_BYTES[self.cache_dtype]
            made.append(("kv_bytes", n, bound, span_tokens(alpha, beta, n).astype(np.float64) * slot))
        for n, bound in self.milliseconds.items():
            assert self.decode_cost is not None
            fixed, each = self.decode_cost.scaled(shape, self.cache_dtype)
            # The fixed part of a layer is shared out to its heads, so that the row sums to milliseconds.
            made.append(("milliseconds", n, bound, fixed / shape.kv_heads + each * _kept(alpha, beta, n)))
        if not made:
            raise UserError("nothing is bounded: every head would keep everything; give --density")
        for kind, n, bound, cost in made:
            _check_reachable(kind, n, bound, float(cost.min()) * heads)
        names = tuple(f"{kind.replace('_', ' ')} at {n} tokens" for kind, n, _, _ in made)
        size = (len(made), shape.layers, shape.kv_heads, len(rules))
        costs = np.broadcast_to(np.stack([cost for *_, cost in made])[:, None, None, :], size)
        return Rows(names, costs, np.array([bound for _, _, bound, _ in made], np.float64))


def _kept(alpha: list[float], beta: list[float], n: int) -> Array:
    """Slots that each rule fills at n tokens."""
    return np.minimum(span_tokens(alpha, beta, n), n).astype(np.float64)


def _check_reachable(kind: str, n: int, bound: float, least: float) -> None:
    if least > bound * (1 + SLACK):
        got, need = (format_bytes(round(x)) if kind == "kv_bytes" else f"{x:.4g}" for x in (bound, least))
        raise InfeasibleError(
            f"{kind.replace('_', ' ')} at {n} tokens is bounded by {got}: the smallest rules of the grid need {need}, "
            f"{least / bound - 1:.1%} more; raise {_OPTION[kind]}, or take a finer --grid"
        )


_OPTION = {"density": "--density", "kv_bytes": "--kv-bytes", "milliseconds": "--milliseconds"}

"""What keys, values and masks in foreign graphs are: computed on samples, at sizes of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from attnspan.export.frontends.foreign.core import MatchError, int_of
from attnspan.export.frontends.foreign.probe import HEAVY, Array, BlockedError, Probe, Sizes

SMALL = Sizes(past=6, new=5)
MASKED = -1e4  # scores below are masked out: masks hold -inf, or the least value of fp16 or more
# Where keys and values pass on their way to a product; input 0 is the data.
MOVES = {"Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Identity", "Cast", "Tile"}


@dataclass
class Samples:
    """Asks a graph by its probe. heads, kv_heads and dim are what a config or the caches' shapes say; None: unknown."""

    probe: Probe
    heads: int | None
    kv_heads: int
    dim: int
    longest: int
    """Tokens up to which masks are looked at: windows at least as long do not matter."""
    _windows: dict[object, int | None] = field(default_factory=dict)

    @property
    def small(self) -> Sizes:
        """Of samples: without a cache all tokens are new."""
        return SMALL if "past" in self.probe.roles.values() else Sizes(0, SMALL.new)

    def query_heads(self, query: ir.Value) -> int:
        """Query heads: the config's, else the shape's."""
        if self.heads is not None:
            return self.heads
        if query.shape is not None and len(query.shape) == 4 and isinstance(query.shape[1], int):
            return query.shape[1]
        raise MatchError("the number of query heads is unknown; put the model's config.json beside the file")

    def source(
        self, x: ir.Value, heads: int, transposed: bool = False, native: bool = False
    ) -> tuple[ir.Value, ir.Value | None, ir.Value | None, float]:
        """New keys or values from which those of all tokens and heads, `x`, follow; their cache; both joined; a factor.

        transposed: `x` is [batch, heads, dim, tokens]. native: it may have the KV heads only.
        """
        sample = np.random.default_rng(0).standard_normal((1, self.kv_heads, self.small.total, self.dim)).astype(np.float32)
        repeated = sample.repeat(heads // self.kv_heads, axis=1)
        reason = "no join of a cache and new keys or values was found before it"
        found = None
        for candidate, past in self._candidates(x):
            try:
                (got,) = self.probe([x], self.small, {candidate: sample})
            except BlockedError as error:
                reason = f"its keys or values depend on {error}"
                continue
            got = got.swapaxes(-1, -2) if transposed and got.ndim == 4 else got
            for wanted in (repeated, sample) if native else (repeated,):
                factor = float((got * wanted).sum() / (wanted * wanted).sum()) if got.shape == wanted.shape else None
                if factor is not None and np.allclose(got, factor * wanted, rtol=1e-3, atol=1e-5):
                    joined = candidate.producer()
                    new = candidate if past is None or joined is None else joined.inputs[1]
                    found = new, past, None if past is None else candidate, factor  # the first of the graph is what is cached
            reason = "its keys or values are not those of each group of query heads, repeated"
        if found is None:
            raise MatchError(reason)
        return found

    def _candidates(self, x: ir.Value) -> Iterator[tuple[ir.Value, ir.Value | None]]:
        """Where keys or values may come from: joins of a cache and new ones or, in graphs without caches, what `x` is made of."""
        cached = "past" in self.probe.roles.values()
        at: ir.Value | None = x
        while at is not None:
            node = at.producer()
            if not cached:
                yield at, None
            if node is None or node.op_type in HEAVY:
                return
            if node.op_type == "Concat" and cached and len(node.inputs) == 2:
                past = node.inputs[0]
                if past is not None and self.probe.roles.get(past) == "past" and int_of(node, "axis", 0) in (2, -2):
                    yield at, past
                return
            at = moved(node)

    def window(self, mask: ir.Value | None, given: Callable[[Sizes], Mapping[ir.Value, Array]], cached: bool) -> int | None:
        """The window of a mask that is an input of a fused op. given: what the op's other inputs are, by sizes."""
        if mask is None:
            raise MatchError("it has no causal mask: tokens see what comes after them")

        def seen(at: Sizes) -> Array:
            (got,) = self.probe([mask], at, given(at))
            if got.dtype != np.bool_:
                if np.abs(got[got > MASKED]).max(initial=0) > 1e-6:
                    raise MatchError("its mask adds a bias to scores: positions by ALiBi or the like have no counterpart")
                got = got > MASKED
            return np.broadcast_to(got, (*got.shape[:-2], at.new, at.total))

        at = SMALL if cached else Sizes(0, SMALL.new)
        check_causal(seen(at), at, last_seen(seen(at)))
        return self.window_of(mask, seen, cached)

    def window_of(self, mask: ir.Value, seen: Callable[[Sizes], Array], cached: bool) -> int | None:
        """The window by a text of `longest` tokens; None when all are seen."""
        if mask not in self._windows:
            at = Sizes(self.longest - 2, 2) if cached else Sizes(0, min(self.longest, 4096))
            long = seen(at)
            window = last_seen(long)
            check_causal(long, at, window)
            self._windows[mask] = window if window < at.total else None
        return self._windows[mask]


def last_seen(seen: Array) -> int:
    """How many tokens the last query sees."""
    return int(seen[..., -1, :].reshape(-1, seen.shape[-1]).sum(-1).max())


def check_causal(seen: Array, at: Sizes, window: int | None) -> None:
    """MatchError unless every head's mask is causal, with that window (None: nothing is seen)."""
    query, key = at.positions[:, None], np.arange(at.total)[None]
    wanted = (key <= query) & (key > query - (window or 0))
    if not np.array_equal(np.broadcast_to(wanted, seen.shape), seen):
        raise MatchError("its mask is neither causal nor a causal window")


def moved(node: ir.Node) -> ir.Value | None:
    """The input that a node moves or scales; None when there is no single one."""
    if node.op_type in MOVES:
        return node.inputs[0]
    if node.op_type in ("Mul", "Div"):
        varying = [x for x in node.inputs if x is not None and ir.convenience.get_const_tensor(x) is None]
        return varying[0] if varying else None
    return None

"""Attention in parts, found by its Softmax: what lies around it is not compared with patterns but computed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from attnspan.export.frontends.foreign.core import Core, MatchError, int_of, pair
from attnspan.export.frontends.foreign.probe import HEAVY, Array, Sizes
from attnspan.export.frontends.foreign.samples import MASKED, Samples, check_causal, last_seen

BIG = 1e30
PASSES = {"Identity", "Cast", "Dropout", "Where", "IsNaN"}  # of weights on their way to the values


class Parts(Samples):
    """Matches attention around a Softmax."""

    def parts(self, softmax: ir.Node) -> Core | None:
        """Around a Softmax; None when it is no attention's."""
        weighted = [x for x in products_after(softmax.outputs[0]) if x.op_type == "MatMul"]
        products = set(products_before(softmax.inputs[0]))
        if len(weighted) != 1 or len(products) != 1:
            return None
        (product,), (weighted_sum,) = products, weighted
        if product.op_type != "MatMul":
            return None
        query, keys = product.inputs
        values = weighted_sum.inputs[1]
        heads = self.query_heads(query)
        key, past_key, present_key, factor = self.source(keys, heads, transposed=True)
        value, past_value, present_value, one = self.source(values, heads)
        if not np.isclose(one, 1):
            raise MatchError(f"its values are scaled by {one:g}")
        past, present = pair(past_key, past_value, present_key, present_value)
        cached = past is not None
        self._check_weights(softmax, weighted_sum, heads)
        scale, softcap, window = self._scores(softmax, product, heads, present, cached)
        return Core(
            node=softmax,
            output=weighted_sum.outputs[0],
            flat=False,
            query=query,
            key=key,
            value=value,
            past=past,
            present=present,
            heads=heads,
            kv_heads=self.kv_heads,
            dim=self.dim,
            scale=scale * factor,
            softcap=softcap,
            window=window,
        )

    def _check_weights(self, softmax: ir.Node, weighted_sum: ir.Node, heads: int) -> None:
        if int_of(softmax, "axis", -1) not in (-1, 3):
            raise MatchError("its axis is not the last")
        sample = np.random.default_rng(1).random((1, heads, self.small.new, self.small.total)).astype(np.float32)
        (got,) = self.probe([weighted_sum.inputs[0]], self.small, {softmax.outputs[0]: sample})
        if got.shape != sample.shape or not np.allclose(got, sample, rtol=1e-3):
            raise MatchError("its weights are changed before they meet the values")

    def _scores(
        self, softmax: ir.Node, product: ir.Node, heads: int, joined: tuple[ir.Value, ...], cached: bool
    ) -> tuple[float, float, int | None]:
        """Scale, cap and window: what happens between the products of queries and keys, and the Softmax."""
        sizes = self.small

        def scores(sample: Array, at: Sizes = sizes) -> Array:
            given = {product.outputs[0]: sample, product.inputs[0]: np.zeros((1, heads, at.new, self.dim), np.float32)}
            given |= {x: np.zeros((1, self.kv_heads, at.total, self.dim), np.float32) for x in joined}
            (got,) = self.probe([softmax.inputs[0]], at, given)
            if got.shape != sample.shape:
                raise MatchError(f"its scores change their shape, {list(sample.shape)} to {list(got.shape)}")
            return got

        def filled(x: float, at: Sizes = sizes) -> Array:
            return np.full((1, heads, at.new, at.total), x, np.float32)

        base = scores(filled(0))
        seen = base > MASKED
        check_causal(seen, sizes, None if seen.sum() == 0 else last_seen(seen))
        if np.abs(base[seen]).max() > 1e-6:
            raise MatchError("its mask adds a bias to scores: positions by ALiBi or the like have no counterpart")
        steep, limit = float(scores(filled(1e-3))[seen].mean() / 1e-3), float(scores(filled(BIG))[seen].mean())
        softcap = 0.0 if limit > 1e6 else limit
        sample = 3 * np.random.default_rng(2).standard_normal(base.shape).astype(np.float32)
        expected = softcap * np.tanh(steep * sample / softcap) if softcap else steep * sample
        if not np.allclose(scores(sample)[seen], expected[seen], rtol=1e-3, atol=1e-4):
            raise MatchError("its scores are neither scaled nor capped by tanh, but changed in another way")

        def long(at: Sizes) -> Array:
            return scores(filled(0, at), at) > MASKED

        return steep, softcap, self.window_of(softmax.inputs[0], long, cached)


def products_before(x: ir.Value) -> Iterator[ir.Node]:
    """The matrix products that a value depends on most directly; shapes do not count."""
    todo, seen = [x], {x}
    while todo:
        node = todo.pop().producer()
        if node is None or node.op_type == "Shape":
            continue
        if node.op_type in HEAVY:
            yield node
            continue
        for y in node.inputs:
            if y is not None and y not in seen:
                seen.add(y)
                todo.append(y)


def products_after(x: ir.Value) -> Iterator[ir.Node]:
    """The matrix products whose first factor is `x`, perhaps cast or guarded."""
    found: dict[ir.Node, None] = {}
    todo, seen = [x], {x}
    while todo:
        for use in todo.pop().uses():
            if use.node.op_type == "MatMul" and use.idx == 0:
                found[use.node] = None
            elif use.node.op_type in PASSES and use.node.outputs[0] not in seen:
                seen.add(use.node.outputs[0])
                todo.append(use.node.outputs[0])
    return iter(found)

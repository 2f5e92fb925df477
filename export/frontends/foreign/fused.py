"""Attention as one op, of foreign graphs: `GroupQueryAttention`, `MultiHeadAttention` and the standard `Attention`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from attnspan.export.frontends.foreign.core import Core, Inputs, MatchError, Rotary, float_of, int_of, pair
from attnspan.export.frontends.foreign.probe import Array, Sizes
from attnspan.export.frontends.foreign.samples import SMALL, Samples


class Fused(Samples):
    """Matches ops that say what they are."""

    def group_query(self, node: ir.Node) -> Core:
        inputs = Inputs(node)
        refuse = {9: "position_ids", 10: "attention_bias", 11: "head_sink", 12: "k_scale", 14: "q_norm_weight"}
        for i, name in refuse.items():
            given = inputs[i]
            if given is not None and not (i == 9 and self.probe.roles.get(given) == "position_ids"):
                raise MatchError(f"its input {name} ({given.name!r}) has no counterpart")
        if (
            int_of(node, "smooth_softmax", 0) > 0
            or int_of(node, "kv_cache_bit_width", 0) > 0
            or int_of(node, "sliding_window_cache", 0)
        ):
            raise MatchError("smooth_softmax, quantised caches and caches of window size have no counterpart")
        heads, kv_heads = int_of(node, "num_heads", 0), int_of(node, "kv_num_heads", 0)
        past = self._pasts(inputs[3], inputs[4])
        rotary = None
        if int_of(node, "do_rotary", 0):
            tables = inputs[7], inputs[8]
            if any(x is None or x.const_value is None for x in tables):
                raise MatchError("its RoPE tables are chosen at run time; only constant cos_cache and sin_cache can be lifted")
            rotary = Rotary(tables[0], tables[1], int_of(node, "rotary_interleaved", 0))
        window = int_of(node, "local_window_size", -1)
        packed = inputs[1] is None
        return Core(
            node=node,
            output=node.outputs[0],
            flat=True,
            query=inputs[0],
            key=None if packed else inputs[1],
            value=None if packed else inputs[2],
            past=past,
            present=tuple(node.outputs[1:3]),
            heads=heads,
            kv_heads=kv_heads,
            dim=self.dim,
            scale=float_of(node, "scale", 0.0) or self.dim**-0.5,
            softcap=float_of(node, "softcap", 0.0),
            window=window if 0 < window < self.longest else None,
            rotary=rotary,
        )

    def multi_head(self, node: ir.Node) -> Core:
        inputs = Inputs(node)
        for i, name in {3: "bias", 4: "key_padding_mask", 8: "past_sequence_length", 9: "cache_indirection"}.items():
            refused = inputs[i]
            if refused is not None:
                raise MatchError(f"its input {name} ({refused.name!r}) has no counterpart")
        if inputs[1] is None or len(inputs[1].shape or ()) == 4:
            raise MatchError("only keys of shape [batch, tokens, heads * dim] can be lifted")
        heads = int_of(node, "num_heads", 0)
        if heads != self.kv_heads:
            raise MatchError(f"it has {heads} heads, its caches {self.kv_heads}")
        causal = bool(int_of(node, "unidirectional", 0))

        def given(at: Sizes) -> dict[ir.Value, Array]:
            return {x: np.zeros((1, at.new, heads * self.dim), np.float32) for x in (inputs[0], inputs[1])}

        return Core(
            node=node,
            output=node.outputs[0],
            flat=True,
            query=inputs[0],
            key=inputs[1],
            value=inputs[2],
            past=self._pasts(inputs[6], inputs[7]),
            present=tuple(node.outputs[1:3]),
            heads=heads,
            kv_heads=heads,
            dim=self.dim,
            scale=float_of(node, "scale", 0.0) or self.dim**-0.5,
            window=None if causal and inputs[5] is None else self.window(inputs[5], given, cached=True),
        )

    def attention(self, node: ir.Node) -> Core:
        inputs = Inputs(node)
        query, key, value, mask = (inputs[i] for i in range(4))
        if inputs[6] is not None:
            raise MatchError(f"its input nonpad_kv_seqlen ({inputs[6].name!r}) has no counterpart")
        flat = "q_num_heads" in node.attributes
        heads = int_of(node, "q_num_heads", 0) if flat else self.query_heads(query)
        past = None if inputs[4] is None else self._pasts(inputs[4], inputs[5])
        present = tuple(node.outputs[1:3]) if past else ()
        factor = 1.0
        if past is None and not flat:
            key, past_key, present_key, factor = self.source(key, heads, native=True)
            value, past_value, present_value, one = self.source(value, heads, native=True)
            if not np.isclose(one, 1):
                raise MatchError(f"its values are scaled by {one:g}")
            past, present = pair(past_key, past_value, present_key, present_value)
        elif past is None and int_of(node, "kv_num_heads", 0) != self.kv_heads:
            raise MatchError("its keys have other heads than the model")
        causal = bool(int_of(node, "is_causal", 0))
        if causal and past is not None and inputs[4] is None:
            raise MatchError("is_causal counts from the first cached key on, so that the file is right for whole prompts only")

        def given(at: Sizes) -> dict[ir.Value, Array]:
            joined = {} if inputs[4] else {x: np.zeros((1, self.kv_heads, at.total, self.dim), np.float32) for x in present}
            return joined if flat else joined | {query: np.zeros((1, heads, at.new, self.dim), np.float32)}

        sizes = SMALL if past is not None else Sizes(0, SMALL.new)
        return Core(
            node=node,
            output=self._guarded(node.outputs[0], sizes, given(sizes)),
            flat=flat,
            query=query,
            key=key,
            value=value,
            past=past,
            present=present,
            heads=heads,
            kv_heads=self.kv_heads,
            dim=self.dim,
            scale=factor * (float_of(node, "scale", 0.0) or self.dim**-0.5),
            softcap=float_of(node, "softcap", 0.0),
            window=None if causal and mask is None else self.window(mask, given, cached=past is not None),
        )

    def _guarded(self, output: ir.Value, sizes: Sizes, given: Mapping[ir.Value, Array]) -> ir.Value:
        """The output behind a Where that clears rows which see nothing: there are none."""
        while len(uses := output.uses()) == 1 and uses[0].node.op_type == "Where" and uses[0].idx in (1, 2):
            (seen,) = self.probe([uses[0].node.inputs[0]], sizes, given)
            if not np.all(seen == (uses[0].idx == 1)):
                break
            output = uses[0].node.outputs[0]
        return output

    def _pasts(self, key: ir.Value | None, value: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        for x in (key, value):
            if x is None or self.probe.roles.get(x) != "past":
                raise MatchError(f"its cache {x.name if x is not None else 'is left out and'!r} is no input of the graph")
        assert key is not None
        assert value is not None
        return key, value

"""The front end that builds the normal form from a config and the weights' names, without tracing or loading weights.

The normal form is standard ONNX: one `Attention` node `layers.{i}.attention` per layer, whose q, k, v have RoPE applied,
with its past and its present. Inputs: `input_ids`, `position_ids` [batch, sequence] int64; `logits_to_keep` [1] int64, the
number of last positions that get logits (0: all); `past_key.{i}`, `past_value.{i}` [batch, kv_heads, past, head_dim].
Outputs: `logits` [batch, kept, vocab]; `present_key.{i}`, `present_value.{i}` [batch, kv_heads, past + sequence, head_dim].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from attnspan.export.frontends.families import Decoder, decoder
from attnspan.export.graph import Recorder, value
from attnspan.export.ops import IR_VERSION, OPSET
from attnspan.export.source import Weights
from attnspan.export.weights import cast
from attnspan.planner.errors import UserError

END = 2**63 - 1  # of a Slice: as far as it goes
DERIVED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints store although they follow from the config


def build(config: Mapping[str, Any], weights: Weights, n_max: int, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """The normal form of a decoder in `dtype`, right for texts of up to `n_max` tokens. Weights stay on disk.

    UserError when the family is not known, or a weight is missing, left over or of the wrong shape.
    """
    return _Builder(decoder(config, n_max), weights, dtype).model()


class _Builder(Recorder):
    """Records one decoder. Between attentions the tokens of all rows are flat: [batch * sequence, features]."""

    def __init__(self, decoder: Decoder, weights: Weights, dtype: ir.DataType) -> None:
        super().__init__("build")
        self.decoder, self.weights, self.dtype = decoder, weights, dtype
        self.used: set[str] = set()

    def model(self) -> ir.Model:
        """The whole model."""
        d = self.decoder
        ids = value("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        positions = value("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        keep = value("logits_to_keep", ir.DataType.INT64, [1])
        pasts = [self.caches("past", i, "past") for i in range(d.shape.layers)]
        presents = [self.caches("present", i, "total") for i in range(d.shape.layers)]

        embedding = self.weight("model.embed_tokens.weight", d.vocab, d.hidden)
        hidden = self.op("Reshape", self.op("Gather", embedding, ids), [-1, d.hidden])
        rows = self.op("Concat", self.op("Shape", ids), [-1], axis=0)  # [batch, sequence, the rest]
        cos, sin = self.rope(positions)
        for i in range(d.shape.layers):
            name = f"model.layers.{i}"
            normed = self.norm(hidden, f"{name}.input_layernorm", d.hidden)
            hidden = self.op("Add", hidden, self.attention(i, normed, rows, cos, sin, pasts[i], presents[i]))
            normed = self.norm(hidden, f"{name}.post_attention_layernorm", d.hidden)
            hidden = self.op("Add", hidden, self.mlp(f"{name}.mlp", normed))
        logits = self.head(self.op("Reshape", hidden, rows), keep)

        self.refuse_leftovers()
        graph = ir.Graph(
            [ids, positions, keep, *(cache for pair in pasts for cache in pair)],
            [logits, *(cache for pair in presents for cache in pair)],
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET},
            name="normal_form",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="attnspan")

    def rope(self, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """cos and sin of every position, [batch, sequence, rotary_dim / 2], computed in fp32."""
        at = self.op("Unsqueeze", self.op("Cast", positions, to=ir.DataType.FLOAT), [-1])
        angle = self.op("Mul", at, self.decoder.frequencies)
        scaled = (self.op("Mul", self.op(f, angle), np.array([self.decoder.rope_factor], np.float32)) for f in ("Cos", "Sin"))
        cos, sin = (self.op("Cast", x, to=self.dtype) for x in scaled)
        return cos, sin

    def attention(
        self,
        i: int,
        x: ir.Value,
        rows: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        past: list[ir.Value],
        present: list[ir.Value],
    ) -> ir.Value:
        """Self-attention of layer i, flat tokens to flat tokens."""
        d, name = self.decoder, f"model.layers.{i}.self_attn"
        dim = d.head_dim

        def projection(kind: str, heads: int) -> ir.Value:
            # With its shape: the type inference of SpanAttention has to know it.
            out = value(f"layers.{i}.{kind}", self.dtype, ["batch", "sequence", heads * dim])
            y = self.linear(x, f"{name}.{kind[0]}_proj", d.hidden, heads * dim, d.qkv_bias)
            if kind == "value":
                return self.op("Reshape", y, rows, output=out)
            if d.qk_norm:
                y = self.norm(self.op("Reshape", y, [-1, heads, dim]), f"{name}.{kind[0]}_norm", dim)
            rotary = {"num_heads": heads, "rotary_embedding_dim": 2 * len(d.frequencies)}
            return self.op("RotaryEmbedding", self.op("Reshape", y, rows), cos, sin, output=out, **rotary)

        q = projection("query", d.shape.heads)
        k = projection("key", d.shape.kv_heads)
        v = projection("value", d.shape.kv_heads)
        mixed = value(f"layers.{i}.attention.output", self.dtype, ["batch", "sequence", d.shape.heads * dim])
        self.node(
            "Attention",
            [q, k, v, None, *past],
            [mixed, *present],
            {"is_causal": 1, "q_num_heads": d.shape.heads, "kv_num_heads": d.shape.kv_heads, "scale": dim**-0.5},
            name=f"layers.{i}.attention",
        )
        flat = self.op("Reshape", mixed, [-1, d.shape.heads * dim])
        return self.linear(flat, f"{name}.o_proj", d.shape.heads * dim, d.hidden, d.output_bias)

    def mlp(self, name: str, x: ir.Value) -> ir.Value:
        """The gated MLP: down(silu(gate(x)) * up(x))."""
        d = self.decoder
        gate = self.linear(x, f"{name}.gate_proj", d.hidden, d.intermediate, d.mlp_bias)
        up = self.linear(x, f"{name}.up_proj", d.hidden, d.intermediate, d.mlp_bias)
        silu = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.linear(self.op("Mul", silu, up), f"{name}.down_proj", d.intermediate, d.hidden, d.mlp_bias)

    def head(self, hidden: ir.Value, keep: ir.Value) -> ir.Value:
        """Logits [batch, kept, vocab] of the last `keep` positions of `hidden` [batch, sequence, hidden]."""
        d = self.decoder
        last = self.op("Slice", hidden, self.op("Neg", keep), [END], [1])
        kept = self.op("Concat", self.op("Shape", last, end=2), [-1], axis=0)
        normed = self.norm(self.op("Reshape", last, [-1, d.hidden]), "model.norm", d.hidden)
        name = "model.embed_tokens" if d.tied else "lm_head"
        logits = value("logits", self.dtype, ["batch", "kept", d.vocab])
        return self.op("Reshape", self.linear(normed, name, d.hidden, d.vocab), kept, output=logits)

    def norm(self, x: ir.Value, name: str, size: int) -> ir.Value:
        """Root-mean-square norm over the last axis."""
        return self.op("RMSNormalization", x, self.weight(f"{name}.weight", size), epsilon=self.decoder.eps)

    def linear(self, x: ir.Value, name: str, inputs: int, outputs: int, bias: bool = False) -> ir.Value:
        """x [tokens, inputs] to [tokens, outputs]. Gemm takes the weight as it is stored, so that nothing is copied."""
        arguments = [x, self.weight(f"{name}.weight", outputs, inputs)]
        if bias:
            arguments.append(self.weight(f"{name}.bias", outputs))
        return self.op("Gemm", *arguments, transB=1)

    def weight(self, name: str, *shape: int) -> ir.Value:
        """The weight of that Hugging Face name, in the model's type; one that is used twice is stored once."""
        if name in self.initializers:
            return self.initializers[name]
        if name not in self.weights:
            raise UserError(f"MODEL lacks the weight {name!r}; it must hold what its config.json describes")
        tensor = self.weights[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"weight {name!r} is {list(tensor.shape)}, {list(shape)} by config.json; check MODEL")
        self.used.add(name)
        return self.initializer(name, cast(tensor, self.dtype))

    def caches(self, when: str, i: int, tokens: str) -> list[ir.Value]:
        """Key and value cache of layer i, an input or an output."""
        shape: list[int | str] = ["batch", self.decoder.shape.kv_heads, tokens, self.decoder.head_dim]
        return [value(f"{when}_{kind}.{i}", self.dtype, shape) for kind in ("key", "value")]

    def refuse_leftovers(self) -> None:
        """A weight that nothing uses means that the model is not what this builder takes it for."""
        ignored = ("lm_head.weight",) if self.decoder.tied else ()
        left = sorted(x for x in self.weights if x not in self.used and x not in ignored and not x.endswith(DERIVED))
        if left:
            raise UserError(
                f"MODEL has {len(left)} weights that its model_type has no use for ({', '.join(left[:3])}, ...); "
                "only the unmodified architectures are allowed"
            )

"""The front end that builds the normal form from a config and the weights' names, without tracing or loading weights.

The normal form is standard ONNX: one `Attention` node `layers.{i}.attention` per layer, whose q, k, v have RoPE applied,
with its past and its present. Inputs: `input_ids`, `position_ids` [batch, sequence] int64; `logits_to_keep` [1] int64, the
number of last positions that get logits (0: all); `past_key.{i}`, `past_value.{i}` [batch, kv_heads, past, head_dim].
Outputs: `logits` [batch, kept, vocab]; `present_key.{i}`, `present_value.{i}` [batch, kv_heads, past + sequence, head_dim].
A layer that slides attends to everything here; metadata of its attention says what window the plan has to cut it to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from attnspan.export.frontends.decoder import Decoder, adapted, read_decoder
from attnspan.export.frontends.experts import mixture
from attnspan.export.frontends.family import Experts
from attnspan.export.frontends.rope import Rope
from attnspan.export.graph import WINDOW, Recorder, value
from attnspan.export.ops import IR_VERSION, OPSET
from attnspan.export.source import Weights
from attnspan.export.weights import cast
from attnspan.planner.errors import UserError

END = 2**63 - 1  # of a Slice: as far as it goes
DERIVED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints store although they follow from the config


def build(config: Mapping[str, Any], weights: Weights, n_max: int, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """The normal form of a decoder in `dtype`, right for texts of up to `n_max` tokens. Weights stay on disk.

    UserError when the family is not known, a weight is missing, left over or of the wrong shape, or a mixture of experts is not
    to be in fp32.
    """
    decoder = read_decoder(config, n_max)
    if dtype != ir.DataType.FLOAT and any(layer.experts for layer in decoder.layers):
        raise UserError("MODEL is a mixture of experts, which --dtype fp32 alone is for; TensorRT does not take its graph")
    return _Builder(decoder, adapted(weights, config), dtype).model()


class _Builder(Recorder):
    """Records one decoder. Between attentions the tokens of all rows are flat: [batch * sequence, features]."""

    def __init__(self, decoder: Decoder, weights: Weights, dtype: ir.DataType) -> None:
        super().__init__("build")
        self.decoder, self.weights, self.dtype = decoder, weights, dtype
        self.used: set[str] = set()
        self.shapes: dict[int, ir.Value] = {}

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
        hidden = self.scaled(hidden, d.scales.embedding)
        self.shape = self.op("Shape", ids)  # [batch, sequence]
        self.rotations = {kind: self.rotation(positions, rope) for kind, rope in d.ropes.items()}
        self.growth = self.query_growth(positions)
        for i, layer in enumerate(d.layers):
            name = f"model.layers.{i}"
            x = self.norm(hidden, name, d.norms.attention)
            x = self.norm(self.attention(i, x, pasts[i], presents[i]), name, d.norms.after_attention)
            hidden = self.op("Add", hidden, self.scaled(x, d.scales.residual))
            x = self.norm(hidden, name, d.norms.mlp)
            x = self.norm(self.mlp(f"{name}.mlp", x, layer.experts), name, d.norms.after_mlp)
            hidden = self.op("Add", hidden, self.scaled(x, d.scales.residual))
        logits = self.head(self.op("Reshape", hidden, self.rows(d.hidden)), keep)

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

    def rotation(self, positions: ir.Value, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """cos and sin of every position, [batch, sequence, rotary_dim / 2], computed in fp32."""
        at = self.op("Unsqueeze", self.op("Cast", positions, to=ir.DataType.FLOAT), [-1])
        angle = self.op("Mul", at, rope.frequencies)
        scaled = (self.op("Mul", self.op(f, angle), np.array([rope.factor], np.float32)) for f in ("Cos", "Sin"))
        cos, sin = (self.op("Cast", x, to=self.dtype) for x in scaled)
        return cos, sin

    def query_growth(self, positions: ir.Value) -> ir.Value | None:
        """What q of every position is multiplied by, [batch, sequence, 1], computed in fp32; None: by nothing."""
        if self.decoder.query_scaling is None:
            return None
        beta, length = (np.array([x], np.float32) for x in self.decoder.query_scaling)
        at = self.op("Unsqueeze", self.op("Cast", positions, to=ir.DataType.FLOAT), [-1])
        one = np.array([1], np.float32)
        log = self.op("Log", self.op("Add", self.op("Floor", self.op("Div", at, length)), one))
        return self.op("Cast", self.op("Add", self.op("Mul", log, beta), one), to=self.dtype)

    def attention(self, i: int, x: ir.Value, past: list[ir.Value], present: list[ir.Value]) -> ir.Value:
        """Self-attention of layer i, flat tokens to flat tokens."""
        d, name, layer = self.decoder, f"model.layers.{i}.self_attn", self.decoder.layers[i]
        dim = d.head_dim

        def projection(kind: str, heads: int) -> ir.Value:
            # With its shape: the type inference of SpanAttention has to know it.
            out = value(f"layers.{i}.{kind}", self.dtype, ["batch", "sequence", heads * dim])
            y = self.linear(x, f"{name}.{kind[0]}_proj", d.hidden, heads * dim, d.qkv_bias)
            if kind != "value" and d.qk_norm == "head":
                y = self.norm(self.op("Reshape", y, [-1, heads, dim]), name, f"{kind[0]}_norm", dim)
            elif kind != "value" and d.qk_norm == "all":
                y = self.norm(y, name, f"{kind[0]}_norm", heads * dim)
            steps: list[tuple[str, tuple[ir.Value, ...], dict[str, int]]] = [("Reshape", (self.rows(heads * dim),), {})]
            if kind != "value" and layer.rope is not None:
                rotary = {"num_heads": heads, "rotary_embedding_dim": 2 * len(d.ropes[layer.rope].frequencies)}
                steps.append(("RotaryEmbedding", self.rotations[layer.rope], rotary))
            if kind == "query" and self.growth is not None:
                steps.append(("Mul", (self.growth,), {}))
            for number, (op_type, inputs, attributes) in enumerate(steps, 1):
                y = self.op(op_type, y, *inputs, output=out if number == len(steps) else None, **attributes)
            return y

        q = projection("query", d.shape.heads)
        k = projection("key", d.shape.kv_heads)
        v = projection("value", d.shape.kv_heads)
        mixed = value(f"layers.{i}.attention.output", self.dtype, ["batch", "sequence", d.shape.heads * dim])
        scale = dim**-0.5 if d.scales.attention is None else float(d.scales.attention)
        counts = {"q_num_heads": d.shape.heads, "kv_num_heads": d.shape.kv_heads}
        attributes: dict[str, Any] = {"is_causal": 1, **counts, "scale": scale}
        if d.scales.attention_cap:
            attributes["softcap"] = float(d.scales.attention_cap)
        inputs = [q, k, v, None, *past]
        node = self.node("Attention", inputs, [mixed, *present], attributes, name=f"layers.{i}.attention")
        if layer.window is not None:
            node.metadata_props[WINDOW] = str(layer.window)
        flat = self.op("Reshape", mixed, [-1, d.shape.heads * dim])
        return self.linear(flat, f"{name}.o_proj", d.shape.heads * dim, d.hidden, d.output_bias)

    def mlp(self, name: str, x: ir.Value, experts: Experts | None) -> ir.Value:
        """The gated MLP, or a mixture of those, flat tokens to flat tokens."""
        d = self.decoder
        if experts is None:
            return self.gated(name, x, d.intermediate)
        router = self.linear(x, f"{name}.gate", d.hidden, experts.count)

        def expert(number: int, some: ir.Value) -> ir.Value:
            return self.gated(f"{name}.experts.{number}", some, experts.intermediate)

        return mixture(self, x, router, experts, expert, self.dtype)

    def gated(self, name: str, x: ir.Value, inner: int) -> ir.Value:
        """down(act(gate(x)) * up(x)), with `inner` features in between."""
        d = self.decoder
        gate = self.linear(x, f"{name}.gate_proj", d.hidden, inner, d.mlp_bias)
        up = self.linear(x, f"{name}.up_proj", d.hidden, inner, d.mlp_bias)
        if d.activation == "silu":
            active = self.op("Mul", gate, self.op("Sigmoid", gate))
        else:
            active = self.op("Gelu", gate, approximate="tanh")
        return self.linear(self.op("Mul", active, up), f"{name}.down_proj", inner, d.hidden, d.mlp_bias)

    def head(self, hidden: ir.Value, keep: ir.Value) -> ir.Value:
        """Logits [batch, kept, vocab] of the last `keep` positions of `hidden` [batch, sequence, hidden]."""
        d = self.decoder
        last = self.op("Slice", hidden, self.op("Neg", keep), [END], [1])
        kept = self.op("Concat", self.op("Shape", last, end=2), [d.vocab], axis=0)
        normed = self.norm(self.op("Reshape", last, [-1, d.hidden]), "model", "norm")
        name = "model.embed_tokens" if d.tied else "lm_head"
        logits = value("logits", self.dtype, ["batch", "kept", d.vocab])
        y = self.scaled(self.linear(normed, name, d.hidden, d.vocab), d.scales.logits)
        if d.scales.logits_cap:
            y = self.scaled(self.op("Tanh", self.scaled(y, 1 / d.scales.logits_cap)), d.scales.logits_cap)
        return self.op("Reshape", y, kept, output=logits)

    def norm(self, x: ir.Value, place: str, name: str | None, size: int | None = None) -> ir.Value:
        """Root-mean-square norm over the last axis, of `size` features (default: hidden); x where there is no norm."""
        if name is None:
            return x
        weight = self.weight(f"{place}.{name}.weight", size or self.decoder.hidden)
        return self.op("RMSNormalization", x, weight, epsilon=self.decoder.eps)

    def rows(self, features: int) -> ir.Value:
        """The shape [batch, sequence, features]. The last is written out: TensorRT does not follow a -1."""
        if features not in self.shapes:
            self.shapes[features] = self.op("Concat", self.shape, [features], axis=0)
        return self.shapes[features]

    def scaled(self, x: ir.Value, factor: float) -> ir.Value:
        """x * factor."""
        return x if factor == 1 else self.op("Mul", x, np.array([factor], np.float32).astype(self.dtype.numpy()))

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

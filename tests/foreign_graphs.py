"""ONNX files as other exporters write them, of the tiny llama in a Hugging Face folder, node by node after real ones.

`genai`: onnxruntime-genai 0.18's model builder (packed projections, GroupQueryAttention with RoPE inside, norms that skip).
`parts`: optimum-onnx 0.1 and torch.onnx up to opset 22 (RoPE, repeated keys, mask and Softmax in parts).
`attention`: torch.onnx from opset 23 on (the op Attention behind a join of the caches, a guard for rows that see nothing).
`fused`: Attention with its caches as inputs. `plain`: parts, without a cache and with ids as the only input.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from attnspan.export.graph import Recorder, value
from attnspan.export.source import open_source

MICROSOFT = "com.microsoft"
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
END = 2**63 - 1


@dataclass(frozen=True)
class Form:
    """Which exporter, and what is special. window, softcap: of all layers; bias: slopes of ALiBi; positions: as an input."""

    kind: str
    opset: int = 22
    window: int | None = None
    softcap: float = 0.0
    bias: float = 0.0
    positions: bool = True


def write_foreign(folder: Path, model: Path, form: Form) -> Path:
    """Write model.onnx with external data and its config.json into `folder`."""
    folder.mkdir(parents=True)
    ir.save(_Writer(model, form).model(), folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=256)
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder / "model.onnx"


class _Writer(Recorder):
    def __init__(self, model: Path, form: Form) -> None:
        super().__init__("foreign")
        source = open_source(str(model))
        self.config, self.form = source.config, form
        self.arrays = {name: np.asarray(x.numpy()) for name, x in source.weights.items()}
        self.heads, self.kv_heads = source.shape.heads, source.shape.kv_heads
        self.dim, self.layers = source.shape.head_dim, source.shape.layers
        self.hidden = self.config["hidden_size"]
        theta = self.config["rope_parameters"]["rope_theta"]
        self.frequencies = (1 / theta ** (np.arange(0, self.dim, 2) / self.dim)).astype(np.float32)

    def model(self) -> ir.Model:
        kind = self.form.kind
        self.ids = value("input_ids", INT64, ["batch_size", "sequence_length"])
        self.mask = value("attention_mask", INT64, ["batch_size", "total_sequence_length"])
        given = value("position_ids", INT64, ["batch_size", "sequence_length"])
        shape: list[Any] = ["batch_size", self.kv_heads, "past_sequence_length", self.dim]
        cached = kind != "plain"
        pasts = [[value(f"past_key_values.{i}.{x}", FLOAT, shape) for x in ("key", "value")] for i in range(self.layers)]
        self.past = self.op("Squeeze", self.op("Shape", pasts[0][0], start=2, end=3)) if cached else np.array(0)
        self.new = self.op("Squeeze", self.op("Shape", self.ids, start=1))
        self.total = self.op("Add", self.past, self.new)
        self.at = given if self.form.positions and cached else self.count(self.past, self.total)
        self.prepare()

        hidden = self.op("Gather", self.weight("model.embed_tokens.weight"), self.ids)
        presents = []
        for i in range(self.layers):
            name = f"model.layers.{i}"
            x = self.norm(hidden, f"{name}.input_layernorm.weight")
            mixed, present = self.attention(f"{name}.self_attn", x, pasts[i])
            presents.append(present)
            mixed = self.linear(mixed, f"{name}.self_attn.o_proj")
            if kind == "genai":
                outputs = [ir.Value() for _ in range(4)]
                scale = self.weight(f"{name}.post_attention_layernorm.weight")
                attributes = {"epsilon": self.config["rms_norm_eps"]}
                self.node("SkipSimplifiedLayerNormalization", [hidden, mixed, scale], outputs, attributes, MICROSOFT)
                x, hidden = outputs[0], outputs[3]
            else:
                hidden = self.op("Add", hidden, mixed)
                x = self.norm(hidden, f"{name}.post_attention_layernorm.weight")
            gate = self.linear(x, f"{name}.mlp.gate_proj")
            product = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), self.linear(x, f"{name}.mlp.up_proj"))
            hidden = self.op("Add", hidden, self.linear(product, f"{name}.mlp.down_proj"))
        logits = self.linear(self.norm(hidden, "model.norm.weight"), "lm_head")
        logits.name, logits.dtype = "logits", FLOAT
        logits.shape = ir.Shape(["batch_size", "sequence_length", self.config["vocab_size"]])
        for i, pair in enumerate(presents):
            for x, what in zip(pair, ("key", "value"), strict=bool(pair)):
                x.name, x.dtype = f"present.{i}.{what}", FLOAT
                x.shape = ir.Shape(["batch_size", self.kv_heads, "total_sequence_length", self.dim])
        inputs = [self.ids]
        if cached:
            inputs += [self.mask, *([given] if self.form.positions and kind != "genai" else []), *(x for y in pasts for x in y)]
        imports = {"": self.form.opset} | ({MICROSOFT: 1} if kind == "genai" else {})
        graph = ir.Graph(
            inputs,
            [logits, *(x for pair in presents for x in pair)],
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=imports,
            name="main_graph",
        )
        return ir.Model(graph, ir_version=10)

    def count(self, first: Any, end: Any) -> ir.Value:
        return self.op("Unsqueeze", self.op("Range", first, end, np.array(1)), [0])

    def prepare(self) -> None:
        """What all layers share: cos and sin, or their tables, and the mask."""
        form = self.form
        if form.kind == "genai":
            angles = np.arange(self.config["max_position_embeddings"])[:, None] * self.frequencies
            self.cos = self.initializer("cos_cache", ir.tensor(np.cos(angles).astype(np.float32)))
            self.sin = self.initializer("sin_cache", ir.tensor(np.sin(angles).astype(np.float32)))
            seen = self.op("Sub", self.op("ReduceSum", self.mask, [1], keepdims=0), [1])
            self.lengths = self.op("Cast", seen, to=ir.DataType.INT32)
            self.total = self.op(
                "Cast", self.op("Gather", self.op("Shape", self.mask), np.array(1), axis=0), to=ir.DataType.INT32
            )
            return
        angle = self.op("Mul", self.op("Unsqueeze", self.op("Cast", self.at, to=FLOAT), [2]), self.frequencies)
        half = form.kind in ("attention", "fused")  # RotaryEmbedding takes half of it
        angle = angle if half else self.op("Concat", angle, angle, axis=-1)
        self.cos, self.sin = self.op("Cos", angle), self.op("Sin", angle)
        query = self.op("Unsqueeze", self.op("Range", self.past, self.total, np.array(1)), [1])
        key = self.op("Unsqueeze", self.op("Range", np.array(0), self.total, np.array(1)), [0])
        self.seen = self.op("LessOrEqual", key, query)
        if form.window:
            self.seen = self.op("And", self.seen, self.op("Greater", key, self.op("Sub", query, np.array(form.window))))
        if form.kind != "plain":
            kept = self.op("Cast", self.op("Unsqueeze", self.mask, [1, 2]), to=ir.DataType.BOOL)
            self.seen = self.op("And", self.op("Unsqueeze", self.seen, [0, 1]), kept)
        self.scores = self.op("Where", self.seen, np.zeros(1, np.float32), np.full(1, np.finfo(np.float32).min))
        if form.bias:
            away = self.op("Cast", self.op("Sub", key, query), to=FLOAT)
            self.scores = self.op("Add", self.scores, self.op("Mul", away, np.array(form.bias, np.float32)))

    def attention(self, name: str, x: ir.Value, past: list[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        kind, rows = self.form.kind, [0, 0, self.heads * self.dim]
        if kind == "genai":
            return self.group_query(name, x, past)
        q, k, v = (self.linear(x, f"{name}.{part}_proj") for part in "qkv")
        if kind == "fused":
            attributes = {"rotary_embedding_dim": 0}
            q = self.op("RotaryEmbedding", q, self.cos, self.sin, num_heads=self.heads, **attributes)
            k = self.op("RotaryEmbedding", k, self.cos, self.sin, num_heads=self.kv_heads, **attributes)
            outputs = [ir.Value() for _ in range(3)]
            attributes = {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads, "is_causal": 1, "softcap": self.form.softcap}
            self.node("Attention", [q, k, v, None, *past], outputs, attributes)
            return outputs[0], outputs[1:]
        q, k, v = (
            self.op("Transpose", self.op("Reshape", y, [0, 0, heads, self.dim]), perm=[0, 2, 1, 3])
            for y, heads in ((q, self.heads), (k, self.kv_heads), (v, self.kv_heads))
        )
        q, k = self.rotate(q), self.rotate(k)
        present = []
        if kind != "plain":
            k, v = (self.op("Concat", old, y, axis=-2) for old, y in zip(past, (k, v), strict=True))
            present = [k, v]
        k, v = self.repeat(k), self.repeat(v)
        if kind == "attention":
            mixed = self.op("Attention", q, k, v, self.scores, scale=self.dim**-0.5, softcap=self.form.softcap)
            blind = self.op("Equal", self.op("ReduceSum", self.op("Cast", self.seen, to=FLOAT), [-1]), np.zeros(1, np.float32))
            mixed = self.op("Where", blind, np.zeros(1, np.float32), mixed)
        else:
            root = np.array(self.dim**-0.25, np.float32)
            keys = self.op("Mul", self.op("Transpose", k, perm=[0, 1, 3, 2]), root)
            scores = self.op("MatMul", self.op("Mul", q, root), keys)
            if self.form.softcap:
                cap = np.array(self.form.softcap, np.float32)
                scores = self.op("Mul", self.op("Tanh", self.op("Div", scores, cap)), cap)
            weights = self.op("Softmax", self.op("Add", scores, self.scores), axis=-1)
            weights = self.op("Where", self.op("IsNaN", weights), np.zeros(1, np.float32), weights)
            mixed = self.op("MatMul", weights, v)
        return self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), rows), present

    def group_query(self, name: str, x: ir.Value, past: list[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        packed = np.concatenate([self.arrays[f"{name}.{part}_proj.weight"] for part in "qkv"]).T
        qkv = self.op("MatMul", x, self.initializer(f"{name}.qkv_proj.MatMul.weight", ir.tensor(np.ascontiguousarray(packed))))
        outputs = [ir.Value() for _ in range(3)]
        attributes = {
            "num_heads": self.heads,
            "kv_num_heads": self.kv_heads,
            "scale": self.dim**-0.5,
            "local_window_size": self.form.window or -1,
            "softcap": self.form.softcap,
            "do_rotary": 1,
            "rotary_interleaved": 0,
        }
        inputs = [qkv, None, None, *past, self.lengths, self.total, self.cos, self.sin, None, None, None]
        self.node("GroupQueryAttention", inputs, outputs, attributes, MICROSOFT, f"/{name}/GroupQueryAttention")
        return outputs[0], outputs[1:]

    def rotate(self, x: ir.Value) -> ir.Value:
        """RoPE of [batch, heads, tokens, dim]."""
        if self.form.kind == "attention":
            return self.op("RotaryEmbedding", x, self.cos, self.sin)
        half = self.dim // 2
        first, second = self.op("Slice", x, [0], [half], [3]), self.op("Slice", x, [half], [END], [3])
        turned = self.op("Concat", self.op("Neg", second), first, axis=-1)
        cos, sin = (self.op("Unsqueeze", y, [1]) for y in (self.cos, self.sin))
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))

    def repeat(self, x: ir.Value) -> ir.Value:
        """Each KV head for all queries of its group."""
        group = self.heads // self.kv_heads
        shape = self.op("Concat", self.op("Shape", x, end=2), [group], self.op("Shape", x, start=2), axis=0)
        wide = self.op("Expand", self.op("Unsqueeze", x, [2]), shape)
        return self.op("Reshape", wide, self.op("Concat", self.op("Shape", x, end=1), [self.heads, -1, self.dim], axis=0))

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """Root-mean-square norm, as an op or in parts."""
        eps, scale = self.config["rms_norm_eps"], self.weight(name)
        if self.form.kind == "genai":
            return self.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=eps, stash_type=1)
        mean = self.op("ReduceMean", self.op("Pow", x, np.array(2, np.float32)), [-1])
        root = self.op("Sqrt", self.op("Add", mean, np.array(eps, np.float32)))
        return self.op("Mul", scale, self.op("Mul", x, self.op("Div", np.array(1, np.float32), root)))

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        key = f"{name}.transposed"
        if key not in self.initializers:
            self.initializer(key, ir.tensor(np.ascontiguousarray(self.arrays[f"{name}.weight"].T)))
        return self.op("MatMul", x, self.initializers[key])

    def weight(self, name: str) -> ir.Value:
        return self.initializers.get(name) or self.initializer(name, ir.tensor(self.arrays[name]))

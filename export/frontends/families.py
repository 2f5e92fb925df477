"""The decoder families that `build` knows, and their configs in one normalised form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnspan.export.frontends.rope import rope_frequencies
from attnspan.planner.errors import UserError
from attnspan.planner.shape import ModelShape

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` differ; a name stands for the config key that says it."""

    qkv_bias: bool | str = "attention_bias"
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    qk_norm: bool = False
    slides: bool | str = "use_sliding_window"  # whether sliding_window is in force


FAMILIES = {
    "llama": Family(mlp_bias="mlp_bias", slides=False),
    "mistral": Family(qkv_bias=False, output_bias=False, slides=True),
    "qwen2": Family(qkv_bias=True, output_bias=False),
    "qwen3": Family(qk_norm=True),
}


@dataclass(frozen=True)
class Decoder:
    """What `build` needs to know about a decoder; sizes in features."""

    shape: ModelShape
    hidden: int
    intermediate: int
    vocab: int
    head_dim: int
    frequencies: NDArray[np.float32]  # of RoPE, radians per token [rotary_dim / 2]
    rope_factor: float
    eps: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool


def decoder(config: Config, n_max: int) -> Decoder:
    """Read a Hugging Face config. UserError when its family or something in it is not supported at `n_max` tokens."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type is {kind!r}; MODEL must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]

    def flag(value: bool | str) -> bool:
        return bool(config.get(value, False)) if isinstance(value, str) else value

    if config.get("quantization_config"):
        raise UserError("MODEL is quantised (quantization_config); give the original fp32, fp16 or bf16 model, or a GGUF")
    if config.get("hidden_act") != "silu":
        raise UserError(f"hidden_act is {config.get('hidden_act')!r}; MODEL must use 'silu'")
    window = config.get("sliding_window")
    if flag(family.slides) and window is not None and window < n_max and _slides_somewhere(config):
        raise UserError(
            f"MODEL has layers with a sliding window of {window} tokens, less than n_max = {n_max}; "
            f"allowed are full-attention models, or --n-max up to {window}"
        )
    shape = ModelShape.from_config(config)
    assert shape.head_dim is not None  # from_config derives it
    frequencies, rope_factor = rope_frequencies(config, shape.head_dim, n_max)
    return Decoder(
        shape=shape,
        hidden=_required(config, "hidden_size"),
        intermediate=_required(config, "intermediate_size"),
        vocab=_required(config, "vocab_size"),
        head_dim=shape.head_dim,
        frequencies=frequencies,
        rope_factor=rope_factor,
        eps=_required(config, "rms_norm_eps"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
    )


def _slides_somewhere(config: Config) -> bool:
    types = config.get("layer_types")
    if types is not None:
        return any(kind == "sliding_attention" for kind in types)
    return int(config.get("max_window_layers", 0)) < int(config["num_hidden_layers"])


def _required(config: Config, key: str) -> Any:
    if key not in config:
        raise UserError(f"config.json lacks {key!r}; MODEL must be the config of a causal LM")
    return config[key]

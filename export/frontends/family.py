"""What sets the decoders of one `model_type` apart from Llama; `families` has one of these for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnspan.export.source import Weights

Config = Mapping[str, Any]

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Kinds of layers in `layer_types`, and of RoPE parameters where sliding layers have their own."""


@dataclass(frozen=True)
class Scales:
    """Factors and bounds of a decoder: of embeddings, of what is added to the residual stream, and of logits.

    attention: of scores; None: 1 / sqrt(head_dim). attention_cap, logits_cap: c in c * tanh(x / c), 0 for none.
    """

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    attention: float | None = None
    attention_cap: float = 0.0
    logits_cap: float = 0.0


@dataclass(frozen=True)
class Norms:
    """Names of a layer's norms, before and after attention and MLP; None where there is none."""

    attention: str | None = "input_layernorm"
    after_attention: str | None = None
    mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class Experts:
    """A mixture of `count` MLPs of `intermediate` features, of which each token takes `active`.

    normalised: the weights of those add up to 1.
    """

    count: int
    active: int
    intermediate: int
    normalised: bool


def never(_: Config, __: int) -> bool:
    """No layer slides."""
    return False


def always(_: Config, __: int) -> bool:
    """Every layer slides, where sliding_window is not null."""
    return True


def typed(otherwise: Callable[[Config, int], bool]) -> Callable[[Config, int], bool]:
    """Layers slide as `layer_types` says; in configs from before that key, as `otherwise` does."""

    def slides(config: Config, layer: int) -> bool:
        types = config.get("layer_types")
        return bool(types[layer] == LOCAL) if types else otherwise(config, layer)

    return slides


def one_rope(_: Config, __: int) -> str:
    """All layers share one RoPE."""
    return GLOBAL


def dense(_: Config, __: int) -> None:
    """No layer is a mixture of experts."""


def unscaled(_: Config) -> Scales:
    """No factors and bounds."""
    return Scales()


def as_named(weights: Weights, _: Config) -> Weights:
    """Weights are named as in Llama."""
    return weights


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` differ from Llama; text in place of a flag names the config key that says it.

    qk_norm: `head` normalises each head of q and k, `all` all heads together. activation: the config key. slides(config, layer):
    whether sliding_window is in force there. rope(config, layer): which RoPE a layer has, None for none. experts(config, layer):
    the mixture a layer has in place of its MLP, named mlp.gate and mlp.experts.{e}. weights: gives the checkpoint's weights
    Llama's names and shapes. query_scaling: q grows with the position (see `Decoder`). defaults: of keys that configs leave out.
    """

    qkv_bias: bool | str = "attention_bias"
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    qk_norm: str | None = None
    norms: Norms = Norms()
    activation: str = "hidden_act"
    scales: Callable[[Config], Scales] = unscaled
    slides: Callable[[Config, int], bool] = never
    rope: Callable[[Config, int], str | None] = one_rope
    experts: Callable[[Config, int], Experts | None] = dense
    weights: Callable[[Weights, Config], Weights] = as_named
    query_scaling: bool = False
    defaults: Config = field(default_factory=dict)

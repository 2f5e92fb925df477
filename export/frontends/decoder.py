"""A Hugging Face config in the form that `build` follows: one description per layer, every default filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnspan.export.frontends.families import FAMILIES
from attnspan.export.frontends.family import Config, Experts, Family, Norms, Scales
from attnspan.export.frontends.rope import Rope, read_rope, rope_parameters
from attnspan.export.source import Weights
from attnspan.planner.errors import UserError
from attnspan.planner.shape import ModelShape

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Layer:
    """One layer: its RoPE (None: positions do not enter), its window in tokens (None: it sees everything), its mixture."""

    rope: str | None
    window: int | None
    experts: Experts | None


@dataclass(frozen=True)
class Decoder:
    """What `build` needs to know about a decoder; sizes in features.

    query_scaling (b, n): q is multiplied by 1 + b * log(1 + floor(position / n)).
    """

    shape: ModelShape
    hidden: int
    intermediate: int
    vocab: int
    head_dim: int
    layers: tuple[Layer, ...]
    ropes: Mapping[str, Rope]
    norms: Norms
    scales: Scales
    activation: str
    eps: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: str | None
    query_scaling: tuple[float, float] | None


class _Filled(dict[str, Any]):
    """A config with its family's defaults."""

    def __missing__(self, key: str) -> Any:
        raise UserError(f"config.json lacks {key!r}; MODEL must be the config of a causal LM")


def read_decoder(config: Config, n_max: int) -> Decoder:
    """Read a Hugging Face config. UserError when its family or something in it is not supported at `n_max` tokens."""
    family = _family(config)
    shape = ModelShape.from_config(config)
    config = _Filled({**family.defaults, **config})

    def flag(value: bool | str) -> bool:
        return bool(config.get(value, False)) if isinstance(value, str) else value

    if config.get("quantization_config"):
        raise UserError("MODEL is quantised (quantization_config); give the original fp32, fp16 or bf16 model, or a GGUF")
    if config.get("use_bidirectional_attention"):
        raise UserError("MODEL attends to later tokens (use_bidirectional_attention); give a causal LM")
    activation = config.get(family.activation)
    if activation not in ACTIVATIONS:
        raise UserError(f"{family.activation} is {activation!r}; MODEL must use one of {', '.join(map(repr, ACTIVATIONS))}")
    assert shape.head_dim is not None  # from_config derives it
    windows = layer_windows(config)
    layers = tuple(Layer(family.rope(config, i), windows[i], family.experts(config, i)) for i in range(shape.layers))
    kinds = dict.fromkeys(layer.rope for layer in layers if layer.rope is not None)
    return Decoder(
        shape=shape,
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        head_dim=shape.head_dim,
        layers=layers,
        ropes={kind: read_rope(config, shape.head_dim, n_max, kind) for kind in kinds},
        norms=family.norms,
        scales=family.scales(config),
        activation=activation,
        eps=config["rms_norm_eps"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        query_scaling=_query_scaling(config) if family.query_scaling else None,
    )


def layer_windows(config: Config) -> list[int | None]:
    """Tokens that each layer of a model lets a token see, itself included, [layers]; None: all.

    UserError as in `read_decoder`.
    """
    family = _family(config)
    config = _Filled({**family.defaults, **config})
    window = config.get("sliding_window")
    layers = range(ModelShape.from_config(config).layers)
    return [window if window is not None and family.slides(config, i) else None for i in layers]


def adapted(weights: Weights, config: Config) -> Weights:
    """The weights of a checkpoint under Llama's names and in its shapes; none is read. UserError as in `read_decoder`."""
    return _family(config).weights(weights, config)


def _family(config: Config) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type is {kind!r}; MODEL must be one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _query_scaling(config: Config) -> tuple[float, float] | None:
    parameters = rope_parameters(config)
    beta, length = (parameters.get(key) for key in ("llama_4_scaling_beta", "original_max_position_embeddings"))
    return (float(beta), float(length)) if beta and length else None

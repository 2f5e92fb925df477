"""Rotary position embedding: the frequencies that a Hugging Face config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnspan.export.frontends.family import GLOBAL, LOCAL
from attnspan.planner.errors import UserError

DEFAULT_THETA = 10000.0  # of Llama, when a config.json from before the key existed does not say
SCALED = ("linear", "llama3", "yarn", "longrope")
OLD_NAMES = {"su": "longrope"}


@dataclass(frozen=True)
class Rope:
    """Radians per token [rotary_dim / 2], and the factor of cos and sin."""

    frequencies: NDArray[np.float32]
    factor: float


def rope_parameters(config: Mapping[str, Any], kind: str = GLOBAL) -> dict[str, Any]:
    """The RoPE parameters of the layers of that kind, `rope_type` and `rope_theta` among them.

    transformers 5 keeps them in `rope_parameters`, by kind of layer where that matters; older configs in `rope_theta`,
    `rope_scaling` and, for sliding layers, `rope_local_base_freq`.
    """
    given = config.get("rope_parameters")
    if given and {GLOBAL, LOCAL} & set(given):
        parameters = dict(given.get(kind) or {})
    elif kind == LOCAL:
        parameters = {"rope_theta": config.get("rope_local_base_freq", DEFAULT_THETA)}
    else:
        parameters = dict(given or config.get("rope_scaling") or {})
    named = str(parameters.get("rope_type", parameters.get("type", "default")))
    parameters["rope_type"] = OLD_NAMES.get(named, named)
    for key, default in (("rope_theta", DEFAULT_THETA), ("partial_rotary_factor", 1.0)):
        parameters.setdefault(key, config.get(key, default))
    if "original_max_position_embeddings" in config:  # Phi-3; it goes before what the parameters say
        parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return parameters


def read_rope(config: Mapping[str, Any], head_dim: int, n_max: int, kind: str = GLOBAL) -> Rope:
    """The RoPE of the layers of that kind in texts of up to `n_max` tokens.

    `longrope` has frequencies for texts of up to the length it was trained at first, and others for longer ones: here `n_max`
    decides which serve every text. UserError for a type whose frequencies would depend on the length of the text otherwise.
    """
    parameters = rope_parameters(config, kind)
    rope_type = parameters["rope_type"]
    limit = config["max_position_embeddings"]
    if rope_type == "dynamic" and n_max <= limit:
        rope_type = "default"  # dynamic NTK scaling starts above the trained length
    if rope_type == "default":
        rotary = int(head_dim * parameters["partial_rotary_factor"])
        exponent = np.arange(0, rotary, 2).astype(np.float32) / np.float32(rotary)
        return Rope(np.float32(1) / np.power(np.float32(parameters["rope_theta"]), exponent), 1.0)  # fp32 as in transformers
    if rope_type == "dynamic":
        raise UserError(f"rope_type is 'dynamic', fixed up to {limit} tokens only; change --n-max {n_max}")
    if rope_type not in SCALED:
        raise UserError(f"rope_type is {rope_type!r}; MODEL must use one of default, dynamic, {', '.join(SCALED)}")
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_type != "linear":
        parameters.setdefault("original_max_position_embeddings", limit)
    sizes = {"head_dim": head_dim, "hidden_size": head_dim, "num_attention_heads": 1, "num_key_value_heads": 1}
    full = AutoConfig.for_model("llama", max_position_embeddings=limit, rope_parameters=parameters, **sizes)
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](full, "cpu", **({"seq_len": n_max} if rope_type == "longrope" else {}))
    return Rope(frequencies.numpy(), float(factor))

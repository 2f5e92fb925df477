"""Rotary position embedding: the frequencies that a Hugging Face config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnspan.planner.errors import UserError

DEFAULT_THETA = 10000.0  # of Llama, when a config.json from before the key existed does not say
SCALED = ("linear", "llama3", "yarn")


def rope_frequencies(config: Mapping[str, Any], head_dim: int, n_max: int) -> tuple[NDArray[np.float32], float]:
    """Radians per token [rotary_dim / 2], and the factor of cos and sin.

    transformers 5 keeps the parameters in `rope_parameters`, older configs in `rope_theta` and `rope_scaling`.
    UserError for a type whose frequencies would depend on the length of the text.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    limit = config["max_position_embeddings"]
    if kind == "dynamic" and n_max <= limit:
        kind = "default"  # dynamic NTK scaling starts above the trained length
    if kind == "default":
        theta = parameters.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
        partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        rotary = int(head_dim * partial)
        exponent = np.arange(0, rotary, 2).astype(np.float32) / np.float32(rotary)
        return np.float32(1) / np.power(np.float32(theta), exponent), 1.0  # fp32 as in transformers
    if kind == "dynamic":
        raise UserError(f"rope_type is 'dynamic', fixed up to {limit} tokens only; change --n-max {n_max}")
    if kind not in SCALED:
        raise UserError(f"rope_type is {kind!r}; MODEL must use one of default, dynamic, {', '.join(SCALED)}")
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    full = AutoConfig.for_model(**config)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](full, "cpu")
    return frequencies.numpy(), float(factor)

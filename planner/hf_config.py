"""The `sparse_attention_config` entry of a Hugging Face config.json, as NVIDIA Model Optimizer writes it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

KEY = "sparse_attention_config"


def with_sparse_attention(config: Mapping[str, Any], plan: str = "plan.json") -> dict[str, Any]:
    """A copy of a Hugging Face config that says which plan its attention follows.

    plan is the path of the plan file relative to the config. An entry that was there is replaced.
    """
    out = copy.deepcopy(dict(config))
    out[KEY] = {"config_groups": {"group_0": {"algorithm": "moa", "plan": plan}}}
    return out

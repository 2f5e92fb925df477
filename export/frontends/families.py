"""The decoder families that `build` knows: one row each, and the functions that rows of their own need."""

from __future__ import annotations

from attnspan.export.frontends.family import GLOBAL, LOCAL, Config, Experts, Family, Norms, Scales, always, typed
from attnspan.export.frontends.tensors import norms_plus_one, renamed, unfused

SANDWICH = Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def _qwen_slides(config: Config, layer: int) -> bool:
    return bool(config.get("use_sliding_window", False)) and layer >= config.get("max_window_layers", 28)


def _qwen_moe_experts(config: Config, layer: int) -> Experts | None:
    plain = layer in (config.get("mlp_only_layers") or ()) or (layer + 1) % config.get("decoder_sparse_step", 1)
    count = config.get("num_local_experts", config.get("num_experts"))  # transformers 5 writes the first
    if plain or not count:
        return None
    sizes = (count, config["num_experts_per_tok"], config["moe_intermediate_size"])
    return Experts(*sizes, normalised=config.get("norm_topk_prob", False))


def _mixtral_experts(config: Config, _: int) -> Experts:
    return Experts(config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"], normalised=True)


def _gemma_scales(config: Config) -> Scales:
    return Scales(
        embedding=config["hidden_size"] ** 0.5,
        attention=config["query_pre_attn_scalar"] ** -0.5,
        attention_cap=config.get("attn_logit_softcapping") or 0.0,
        logits_cap=config.get("final_logit_softcapping") or 0.0,
    )


def _gemma3_slides(config: Config, layer: int) -> bool:
    return bool((layer + 1) % config.get("sliding_window_pattern", 6))


def _gemma3_rope(config: Config, layer: int) -> str:
    return LOCAL if typed(_gemma3_slides)(config, layer) else GLOBAL


def _smollm3_rope(config: Config, layer: int) -> str | None:
    has = config.get("no_rope_layers")
    return GLOBAL if (has[layer] if has else (layer + 1) % config.get("no_rope_layer_interval", 4)) else None


def _smollm3_slides(config: Config, layer: int) -> bool:
    return bool(config.get("use_sliding_window", False)) and _smollm3_rope(config, layer) is None


def _granite_scales(config: Config) -> Scales:
    return Scales(
        embedding=config.get("embedding_multiplier", 1.0),
        residual=config.get("residual_multiplier", 1.0),
        logits=1 / config.get("logits_scaling", 1.0),
        attention=config.get("attention_multiplier", 1.0),
    )


_WINDOW = {"sliding_window": 4096}
_GEMMA = _WINDOW | {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}

FAMILIES = {
    "llama": Family(mlp_bias="mlp_bias"),
    "mistral": Family(qkv_bias=False, output_bias=False, slides=always, defaults=_WINDOW),
    "ministral": Family(qkv_bias=False, output_bias=False, slides=typed(always), defaults=_WINDOW),
    "ministral3": Family(qkv_bias=False, output_bias=False, slides=always, query_scaling=True),
    "qwen2": Family(qkv_bias=True, output_bias=False, slides=typed(_qwen_slides), defaults=_WINDOW),
    "qwen3": Family(qk_norm="head", slides=typed(_qwen_slides), defaults=_WINDOW),
    "phi3": Family(qkv_bias=False, output_bias=False, slides=always, weights=unfused),
    "gemma2": Family(
        norms=SANDWICH,
        activation="hidden_activation",
        scales=_gemma_scales,
        slides=typed(lambda _, layer: layer % 2 == 0),
        weights=norms_plus_one,
        defaults=_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        qk_norm="head",
        norms=SANDWICH,
        activation="hidden_activation",
        scales=_gemma_scales,
        slides=typed(_gemma3_slides),
        rope=_gemma3_rope,
        weights=norms_plus_one,
        defaults=_GEMMA | {"rope_theta": 1000000.0},
    ),
    "smollm3": Family(
        mlp_bias="mlp_bias",
        slides=typed(_smollm3_slides),
        rope=_smollm3_rope,
        defaults={"tie_word_embeddings": True, "rope_theta": 2000000.0},
    ),
    "granite": Family(mlp_bias="mlp_bias", scales=_granite_scales),
    "olmo2": Family(qk_norm="all", norms=AFTER),
    "mixtral": Family(
        qkv_bias=False,
        output_bias=False,
        slides=always,
        experts=_mixtral_experts,
        weights=renamed(
            (r"\.block_sparse_moe\.", ".mlp."), (r"\.w1\.", ".gate_proj."), (r"\.w2\.", ".down_proj."), (r"\.w3\.", ".up_proj.")
        ),
    ),
    "qwen3_moe": Family(
        qk_norm="head",
        slides=lambda config, _: config.get("use_sliding_window", False),
        experts=_qwen_moe_experts,
        defaults=_WINDOW,
    ),
}

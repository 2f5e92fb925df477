"""Tiny random models of every family, saved as Hugging Face folders, and their artefacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnspan.export.pipeline import Exported, Options, export_model
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.rules import HeadRule
from attnspan.planner.uniform import uniform

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 258,
}

PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-mha": {"num_key_value_heads": 4, "head_dim": 24},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "mistral-sliding": {"sliding_window": 100},
    "ministral": {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 130, "max_window_layers": 1},
    "phi3": {},
    "phi3-partial": {"sliding_window": 200, "rope_parameters": PARTIAL, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 24, "sliding_window": 100, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 70,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
        },
        "query_pre_attn_scalar": 50,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "smollm3-sliding": {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 90},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
        "logits_scaling": 0.5,
        "attention_bias": True,
    },
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 120},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_model(folder: Path, family: str = "llama", seed: int = 0, dtype: str = "float32", **config: Any) -> Path:
    """Save a random model with a byte-level tokenizer; `config` overrides keys of its config. Returns `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = SIZES | FAMILIES[family] | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split("-")[0], **values)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:  # large enough for peaked attention and logits
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5, generator=generator)
            else:  # norms and biases that are not 1 and 0, so that leaving one out shows
                weight.normal_(1 if "norm" in name else 0, 0.2, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    """One token for each byte, then <s>, <|im_start|> and <|im_end|>; with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {char: byte for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def export_tiny(
    folder: Path, family: str = "llama", *, density: float = 0.5, spread: float = 0.25, n_max: int = 512, **options: Any
) -> Exported:
    """Save a tiny model in `folder`/model and export it to `folder`/artefact: KV heads of unequal span, fp32 cache.

    `options` override those of `export_model`; there is neither an op library nor verification unless asked for.
    """
    model = save_tiny_model(folder / "model", family)
    plan = folder / "tiny-plan.json"
    uniform(ModelShape.from_config(model), density, n_max, spread if density < 1 else 0.0).save(plan)
    wanted = {"model": str(model), "out": folder / "artefact", "plan": plan, "cache_dtype": "fp32"} | options
    return export_model(Options(**wanted))


def export_rules(
    folder: Path, rules: list[list[HeadRule]], *, n_max: int = 512, config: dict[str, Any] | None = None, **options: Any
) -> Exported:
    """As `export_tiny`, with a plan of these rules, [layers][kv_heads]; `config` overrides the tiny llama's."""
    model = save_tiny_model(folder / "model", **(config or {}))
    plan = folder / "tiny-plan.json"
    Plan(ModelShape.from_config(model), n_max, rules).save(plan)
    wanted = {"model": str(model), "out": folder / "artefact", "plan": plan, "cache_dtype": "fp32"} | options
    return export_model(Options(**wanted))

"""Weights, config and tokenizer of a GGUF file, under their Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from attnspan.planner.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, ir.TensorProtocol]]:
    """Hugging Face config, and weights by Hugging Face name that are dequantised to fp32 when they are read.

    UserError for a file that is not GGUF, an architecture this reader does not know, or a tensor it cannot name.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{file} is not a whole GGUF file ({error}); download MODEL again") from None
    architecture = reader.get_field("general.architecture").contents()
    if architecture not in ARCHITECTURES:
        raise UserError(f"{file} holds a {architecture!r} model; allowed are {', '.join(ARCHITECTURES)}")
    config = _config(reader, architecture, file)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    weights: dict[str, ir.TensorProtocol] = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        if name is None:
            raise UserError(f"{file}: no Hugging Face name is known for {tensor.name}; convert MODEL to safetensors")
        # llama.cpp interleaves the two RoPE halves of q and k for this architecture.
        interleaved = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2]) if architecture == "llama" else None
        shape = ir.Shape([int(n) for n in reversed(tensor.shape)])
        weights[name] = ir.LazyTensor(_reader(tensor, interleaved), ir.DataType.FLOAT, shape, name=name)
    return config, weights


def _config(reader: Any, architecture: str, file: Path) -> dict[str, Any]:
    """The Hugging Face config that a file's metadata means.

    Read here, as transformers reads the whole vocabulary to get at it: 9 s for 49,152 tokens.
    """
    known = {key.removeprefix(f"{architecture}."): field for key, field in reader.fields.items()}
    scaling = known["rope.scaling.type"].contents() if "rope.scaling.type" in known else "none"
    if scaling != "none":
        raise UserError(f"{file} has RoPE scaling {scaling!r}; allowed is none: convert MODEL to safetensors")
    config = {name: known[key].contents() for key, name in CONFIG.items() if key in known}
    missing = sorted(key for key, name in CONFIG.items() if name not in config and key not in OPTIONAL)
    if missing:
        raise UserError(f"{file} lacks {architecture}.{missing[0]}; download MODEL again")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{file} lacks token_embd.weight; give the file of a whole MODEL")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    for token in ("bos", "eos"):
        if (key := f"tokenizer.ggml.{token}_token_id") in known:
            config[f"{token}_token_id"] = known[key].contents()
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta", 10000.0)}
    return {"architectures": [ARCHITECTURES[architecture]], "model_type": architecture, "hidden_act": "silu"} | config


def write_tokenizer(file: Path, folder: Path) -> None:
    """Write the tokenizer inside a GGUF file as tokenizer.json, tokenizer_config.json and chat template."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def _name(gguf_name: str) -> str | None:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name)
    if match is None or match[2] not in NAMES:
        return None
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def _reader(tensor: Any, interleaved: int | None) -> Callable[[], ir.TensorProtocol]:
    """Function that dequantises `tensor`; with `interleaved` heads, row pairs go back to HF's two halves."""

    def read() -> ir.TensorProtocol:
        from gguf import dequantize

        x = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if interleaved is not None:
            pairs = x.reshape(interleaved, x.shape[0] // interleaved // 2, 2, *x.shape[1:])
            x = pairs.swapaxes(1, 2).reshape(x.shape)
        return ir.tensor(x)

    return read

"""Weights, config and tokenizer of a GGUF file, under their Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from attnspan.planner.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")

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


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, ir.TensorProtocol]]:
    """Hugging Face config, and weights by Hugging Face name that are dequantised to fp32 when they are read.

    UserError for a file that is not GGUF, an architecture this reader does not know, or a tensor it cannot name.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{file} is not a whole GGUF file ({error}); download MODEL again") from None
    architecture = reader.get_field("general.architecture").contents()
    if architecture not in ARCHITECTURES:
        raise UserError(f"{file} holds a {architecture!r} model; allowed are {', '.join(ARCHITECTURES)}")
    config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weights: dict[str, ir.TensorProtocol] = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        if name is None:
            raise UserError(f"{file}: no Hugging Face name is known for {tensor.name}; convert MODEL to safetensors")
        # llama.cpp interleaves the two RoPE halves of q and k for this architecture.
        interleaved = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2]) if architecture == "llama" else None
        shape = ir.Shape([int(n) for n in reversed(tensor.shape)])
        weights[name] = ir.LazyTensor(_reader(tensor, interleaved), ir.DataType.FLOAT, shape, name=name)
    return config.to_dict(), weights


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

"""The original model in PyTorch, in fp32, with a plan's spans as a mask: what an artefact is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging

NAME = "attnspan_reference"
QUERIES = 256  # scored at a time, so that memory grows with the text and not with its square


class TorchReference:
    """A causal LM whose keys and values pass through the cache's type and whose queries see what their spans allow."""

    def __init__(self, model: Path, layers: int, cache_dtype: str, sink: int) -> None:
        """Load `model`, a Hugging Face folder or a .gguf file, cut to its first `layers` layers."""
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        file: dict[str, Any] = {}
        how: dict[str, Any] = {}
        if model.is_file():
            file, how = {"gguf_file": model.name}, {"quantization_config": GgufConfig(dequantize=True)}
            model = model.parent
        config = AutoConfig.from_pretrained(model, **file)
        config.num_hidden_layers = layers
        self.model = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=torch.float32, attn_implementation=NAME, **file, **how
        ).eval()
        self.cache_dtype: torch.dtype = getattr(torch, cache_dtype)
        self.sink = sink
        self.spans = torch.empty(0)

    @torch.inference_mode()
    def hidden(self, tokens: list[int], spans: torch.Tensor) -> torch.Tensor:
        """Last hidden states [tokens, features].

        `spans` [tokens, layers, kv_heads]: what the query of each token sees, in tokens, sinks included.
        """
        self.spans = spans
        states: torch.Tensor = self.model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state
        return states[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocab] of hidden states [tokens, features]."""
        out: torch.Tensor = self.model.lm_head(hidden)
        return out

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, scaling: float, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """Attention of one layer. query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim]."""
        _, heads, tokens, dim = query.shape
        kv_heads = key.shape[1]
        key, value = (x[0, :, None].to(self.cache_dtype).float() for x in (key, value))
        grouped = query[0].reshape(kv_heads, heads // kv_heads, tokens, dim)
        position = torch.arange(tokens)
        windows = self.spans[:, module.layer_idx].T[:, :, None] - self.sink  # [kv_heads, tokens, 1]
        output = torch.empty_like(grouped)
        for first in range(0, tokens, QUERIES):
            end = min(first + QUERIES, tokens)
            distance = position[first:end, None] - position[:end]
            near = (position[:end] < self.sink) | (distance < windows[:, first:end])
            seen = (distance >= 0) & near  # [kv_heads, queries, keys]
            score = grouped[:, :, first:end] @ key[:, :, :end].transpose(-1, -2) * scaling
            weight = score.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
            output[:, :, first:end] = weight @ value[:, :, :end]
        return output.reshape(1, heads, tokens, dim).transpose(1, 2), None

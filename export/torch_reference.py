"""The original model in PyTorch, in fp32, with a plan's spans as a mask: what an artefact is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import logging

from attnspan.export.quantize import WEIGHTS, fake_quantize, is_quantized
from attnspan.planner.plan import Plan

NAME = "attnspan_reference"
QUERIES = 256  # scored at a time, so that memory grows with the text and not with its square


class TorchReference:
    """A causal LM whose keys and values pass through the cache's type and whose queries see what their spans allow."""

    def __init__(self, model: Path, plan: Plan, cache_dtype: str, dtype: str = "float32") -> None:
        """Load `model`, a Hugging Face folder or a .gguf file: as many layers as `plan` has, weights rounded to `dtype`.

        cache_dtype int8: give the scales with `quantize`; until then keys and values are not rounded.
        """
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
        _cut(config, plan.model.layers)
        _fix_rope(config, plan.n_max)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=torch.float32, attn_implementation=NAME, **file, **how
        ).eval()
        for weight in self.model.parameters():
            weight.data = weight.data.to(getattr(torch, dtype)).float()
        self.cache_dtype: torch.dtype = getattr(torch, cache_dtype if cache_dtype != "int8" else "float32")
        self.scales: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.sinks = plan.sinks
        self.spans = torch.empty(0)
        # What follows the layers, scaling and capping of logits among it, is the model's own: it is given hidden states.
        self.body, self.model.model = self.model.model, _Given()

    def quantize(self, weights: str | None, scales: Sequence[tuple[np.ndarray, np.ndarray]] | None) -> None:
        """Do to the model what an export did: to its matrices (see `export.quantize`), to keys and values of each layer.

        scales: of keys and of values [kv_heads], by layer (`export.cache_scales.layer_scales`).
        """
        if scales is not None:
            self.scales = [(_by_head(key), _by_head(value)) for key, value in scales]
        if weights not in WEIGHTS:
            return
        embedding, head = self.body.embed_tokens, self.model.lm_head
        if head.weight is embedding.weight:
            head.weight = torch.nn.Parameter(head.weight.data.clone())
        for name, weight in [*self.body.named_parameters(), ("head", head.weight)]:
            at_end = weight is embedding.weight or name == "head"
            matrix = weight.data.reshape(-1, weight.shape[-1])  # experts are stored together
            if weight.ndim > 1 and is_quantized(tuple(weight.shape[-2:]), name, embedding=weight is embedding.weight):
                weight.data = torch.from_numpy(fake_quantize(matrix.numpy(), weights, at_end)).reshape(weight.shape)

    @torch.inference_mode()
    def hidden(self, tokens: list[int], spans: torch.Tensor) -> torch.Tensor:
        """Last hidden states [tokens, features].

        `spans` [tokens, layers, kv_heads]: what the query of each token sees, in tokens, sinks included.
        """
        self.spans = spans
        states: torch.Tensor = self.body(torch.tensor([tokens]), use_cache=False).last_hidden_state
        return states[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocab] of hidden states [tokens, features]."""
        out: torch.Tensor = self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return out

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        scaling: float,
        softcap: float | None = None,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of one layer. query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim]."""
        _, heads, tokens, dim = query.shape
        kv_heads = key.shape[1]
        key, value = (x[0, :, None].to(self.cache_dtype).float() for x in (key, value))
        if self.scales is not None:
            pairs = zip((key, value), self.scales[module.layer_idx], strict=True)
            key, value = ((x / scale).round().clamp(-127, 127) * scale for x, scale in pairs)
        grouped = query[0].reshape(kv_heads, heads // kv_heads, tokens, dim)
        position = torch.arange(tokens)
        sink = self.sinks[module.layer_idx]
        windows = self.spans[:, module.layer_idx].T[:, :, None] - sink  # [kv_heads, tokens, 1]
        output = torch.empty_like(grouped)
        for first in range(0, tokens, QUERIES):
            end = min(first + QUERIES, tokens)
            distance = position[first:end, None] - position[:end]
            near = (position[:end] < sink) | (distance < windows[:, first:end])
            seen = (distance >= 0) & near  # [kv_heads, queries, keys]
            score = grouped[:, :, first:end] @ key[:, :, :end].transpose(-1, -2) * scaling
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            weight = score.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
            output[:, :, first:end] = weight @ value[:, :, :end]
        return output.reshape(1, heads, tokens, dim).transpose(1, 2), None


def _by_head(scale: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(scale)[:, None, None, None]  # to go with [kv_heads, 1, tokens, dim]


class _Given(torch.nn.Module):
    """In place of a model's body: its hidden states are what it is given."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _cut(config: Any, layers: int) -> None:
    """Leave a config its first `layers` layers."""
    config.num_hidden_layers = layers
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:layers])


def _fix_rope(config: Any, n_max: int) -> None:
    """Let RoPE of type `longrope` use one set of frequencies for texts of any length, as artefacts do (`frontends/rope`)."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and n_max > rope["original_max_position_embeddings"]:
        rope["short_factor"] = rope["long_factor"]

"""The dense model's own answers, with its cache kept from one question to the next of the same document."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

__all__ = ["GreedyAnswers"]


class GreedyAnswers:
    """Answers prompts greedily with a transformers causal LM under its attention `implementation`, never a plan's.

    A prompt that starts like what the cache holds is computed from where it differs.
    """

    def __init__(self, model: Any, implementation: str = "sdpa") -> None:
        self._model, self._implementation = model, implementation
        given = model.generation_config.eos_token_id if model.generation_config is not None else None
        self._ends = set(given) if isinstance(given, list | tuple) else {given}
        self._cache = DynamicCache()
        self._held: list[int] = []

    @torch.inference_mode()
    def __call__(self, tokens: list[int], limit: int) -> list[int]:
        """Up to `limit` tokens, without the one that ends a text."""
        shorter = min(len(tokens), len(self._held))
        same = next((i for i in range(shorter) if tokens[i] != self._held[i]), shorter)
        same = min(same, len(tokens) - 1)  # the last token's logits are needed
        if not same:
            self._cache = DynamicCache()
        elif same < len(self._held):
            self._cache.crop(same - len(self._held))  # negative: so many tokens off the end
        self._held = self._held[:same]
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation(self._implementation)
        try:
            out: list[int] = []
            step = tokens[same:]
            while len(out) < limit:
                token = self._next(step)
                if token in self._ends:
                    break
                out.append(token)
                step = [token]
            return out
        finally:
            self._model.set_attn_implementation(before)

    def _next(self, step: list[int]) -> int:
        ids = torch.tensor([step], device=self._model.device)
        done = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._held += step
        return int(done.logits[0, -1].argmax())

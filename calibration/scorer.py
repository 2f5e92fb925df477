"""Logits of a sequence under some attention: dense, or cut to a plan's spans."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from attnspan.calibration.attention import Setting, attention
from attnspan.calibration.items import Item
from attnspan.planner.plan import Plan


class Scorer(Protocol):
    """Gives the logits of a sequence; scorers of one comparison differ in what their heads may see."""

    def logits(self, tokens: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.float32]:
        """Logits [tokens - first, vocab] at positions first to the last of one sequence [tokens]."""


class TorchScorer:
    """A hooked PyTorch model (`load_model`) under a plan: S(n) of the whole sequence is in force for every query."""

    def __init__(self, model: Any, plan: Plan | None = None) -> None:
        """plan None is the dense model."""
        self.model, self.plan = model, plan

    def logits(self, tokens: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.float32]:
        """See `Scorer`; memory grows with the tokens and with vocab * (tokens - first)."""
        spans = None if self.plan is None else self.plan.spans(len(tokens))
        logits: npt.NDArray[np.float32] = span_logits(self.model, tokens, first, spans).float().cpu().numpy()
        return logits


def span_logits(model: Any, tokens: npt.NDArray[np.int64], first: int, spans: npt.NDArray[np.int32] | None) -> torch.Tensor:
    """Logits [tokens - first, vocab] of a hooked model with spans [layers, kv_heads] in force (None: dense)."""
    ids = torch.tensor(np.asarray(tokens, np.int64))[None].to(model.device)
    with torch.inference_mode(), attention(Setting(spans)):
        logits: torch.Tensor = model(ids, use_cache=False, logits_to_keep=int(len(tokens) - first)).logits[0]
    return logits


def answer_logits(model: Any, item: Item, spans: npt.NDArray[np.int32] | None) -> torch.Tensor:
    """Logits [targets, vocab] in fp32 of an item's answer tokens, with spans [layers, kv_heads] in force (None: dense)."""
    tokens = item.tokens[: int(item.targets[-1]) + 1]
    logits = span_logits(model, tokens, item.first, spans)
    return logits[torch.from_numpy(item.targets - 1 - item.first).to(logits.device)].float()

"""What attention would be if it saw the largest scores only, or the most recent tokens: PyTorch in fp32, from given prompts.

Kinds, by the budget that they take:
  exact        everything (a check of this file against the dense artefact)
  topk:F       each query head its largest scores, a share F of what lies between the first 64 and the last 64 tokens, and these;
               the layers 0 and 16 attend to everything, as in plans made by `attnspan plan lsh`
  window:F     as many of the most recent tokens in their place
  rows:F       each KV head a share F of all tokens, in every layer: those of the largest probability, added over its query heads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from equal_bytes_caches import Prompt, log_softmax
from equal_bytes_documents import Question
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from attnspan.calibration.loading import load_model
from attnspan.planner.errors import UserError

NAME = "attnspan_reduced"
KINDS = ("exact", "topk", "window", "rows")
SINK, WINDOW = 64, 64
DENSE_LAYERS = (0, 16)


@dataclass(frozen=True)
class Reduction:
    """One of KINDS and the share that it keeps."""

    kind: str
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Reduction:
        """From "topk:0.02"; UserError when it is none."""
        kind, _, share = text.partition(":")
        try:
            found = cls(kind, float(share or 1))
        except ValueError:
            found = cls("")
        if found.kind not in KINDS or not 0 < found.share <= 1:
            raise UserError(f"reduction is {text!r}: must be {', '.join(KINDS)}, with a share after a colon; change --reduced")
        return found

    def kept(self, scores: Tensor, totals: Tensor, layer: int) -> Tensor | None:
        """Which keys are attended to, bool like scores [rows, kv_heads, group, tokens], -inf beyond totals [rows]; None: all."""
        if self.kind == "exact" or (self.kind != "rows" and layer in DENSE_LAYERS):
            return None
        rows, _, _, tokens = scores.shape
        if self.kind == "rows":
            counts = (self.share * totals).round().long().clamp(min=1)
            weight = scores.softmax(-1).sum(2, keepdim=True)
            weight.scatter_(-1, (totals - 1).view(rows, 1, 1, 1).expand(*weight.shape[:3], 1), torch.inf)  # its own token
            return _largest(weight, counts).expand_as(scores)
        at = torch.arange(tokens).view(1, 1, 1, -1)
        end = totals.view(-1, 1, 1, 1)
        counts = (self.share * (totals - SINK - WINDOW)).round().long().clamp(min=0)
        fixed = (at < SINK) | (at >= end - WINDOW)
        if self.kind == "window":
            return (fixed | (at >= end - WINDOW - counts.view(-1, 1, 1, 1))).expand_as(scores)
        return fixed | _largest(scores.masked_fill(fixed, -torch.inf), counts)


def _largest(values: Tensor, counts: Tensor) -> Tensor:
    """Marks the counts[row] largest values over the last axis, [rows, ...]; more where the last of them appears twice."""
    most = int(counts.max())
    if most == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    best = values.topk(most, sorted=True).values
    index = (counts - 1).clamp(min=0).view(-1, 1, 1, 1).expand(*best.shape[:-1], 1)
    least = best.gather(-1, index).masked_fill(counts.view(-1, 1, 1, 1) == 0, torch.inf)
    return (values >= least) & (values > -torch.inf)


class Reduced:
    """A model whose decode steps attend as Reductions say, for many questions about one document at a time."""

    def __init__(self, path: Path) -> None:
        self.model, _ = load_model(path, "fp32")
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)
        self.model.set_attn_implementation(NAME)
        self._context: Tensor = torch.empty(0)
        self._stored = torch.float32
        self._tails: list[Tensor] = []
        self._totals = torch.empty(0)
        self._groups: list[tuple[Reduction, slice]] = []

    def answers(
        self, prompt: Prompt, questions: Sequence[Question], reductions: Sequence[Reduction]
    ) -> list[list[npt.NDArray[np.float32]]]:
        """Log-probabilities of each answer under each reduction, [reductions][questions][answer, vocab]."""
        stored = prompt.context()
        document = stored.shape[3]
        self._context = _widened(stored)
        self._stored = {np.uint16: torch.bfloat16, np.float16: torch.float16}.get(stored.dtype.type, torch.float32)
        count, kinds = len(questions), len(reductions)
        held = [len(question.prompt) - 1 for question in questions]
        steps = max(len(question.answer) for question in questions)
        layers, _, kv_heads, _, dim = stored.shape
        rows = count * kinds
        tail = torch.zeros(layers, 2, rows, kv_heads, max(held) + steps, dim)
        for q, question in enumerate(questions):
            tail[:, :, q::count, :, : held[q]] = _widened(prompt.tail(question)).unsqueeze(2)
        self._tails = list(tail)
        self._groups = [(reduction, slice(i * count, (i + 1) * count)) for i, reduction in enumerate(reductions)]
        lengths = torch.tensor(held * kinds)
        logits = []
        with torch.inference_mode():
            for step in range(steps):
                fed = [(q.prompt[-1], *q.answer)[min(step, len(q.answer) - 1)] for q in questions] * kinds
                self._totals = document + lengths + 1
                out = self.model(
                    torch.tensor(fed)[:, None], position_ids=(self._totals - 1)[:, None], use_cache=False, logits_to_keep=1
                )
                logits.append(log_softmax(out.logits[:, -1].float().numpy()))
                lengths = lengths + 1
        found = np.stack(logits, 1)
        return [[found[k * count + q, : len(each.answer)] for q, each in enumerate(questions)] for k in range(kinds)]

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls: query [rows, heads, 1, dim], key and value [rows, kv_heads, 1, dim]."""
        layer = module.layer_idx
        context, tail, totals = self._context[layer], self._tails[layer], self._totals
        rows, heads, _, dim = query.shape
        kv_heads, document = context.shape[1], context.shape[2]
        at = (torch.arange(rows), slice(None), totals - document - 1)
        for store, new in zip(tail, (key, value), strict=True):
            store[at] = new[:, :, 0].to(self._stored).float()
        asked = query.view(rows, kv_heads, -1, dim) * scaling
        group = asked.shape[2]
        flat = asked.transpose(0, 1).reshape(kv_heads, rows * group, dim)
        far = (flat @ context[0].transpose(1, 2)).view(kv_heads, rows, group, document).transpose(0, 1)
        scores = torch.cat([far, asked @ tail[0].transpose(2, 3)], -1)
        beyond = torch.arange(scores.shape[-1]).view(1, 1, 1, -1) >= totals.view(-1, 1, 1, 1)
        scores = scores.masked_fill(beyond, -torch.inf)
        for reduction, some in self._groups:
            kept = reduction.kept(scores[some], totals[some], layer)
            if kept is not None:
                scores[some] = scores[some].masked_fill(~kept, -torch.inf)
        weight = scores.softmax(-1)
        seen = weight[..., :document].transpose(0, 1).reshape(kv_heads, rows * group, document)
        out = (seen @ context[1]).view(kv_heads, rows, group, dim).transpose(0, 1) + weight[..., document:] @ tail[1]
        return out.reshape(rows, 1, heads, dim), None


def _widened(stored: npt.NDArray[Any]) -> Tensor:
    """A cache of bf16 bits, or of fp32 or fp16, as fp32."""
    copy = torch.from_numpy(stored.view(np.int16).copy() if stored.dtype == np.uint16 else stored.copy())
    return (copy.view(torch.bfloat16) if stored.dtype == np.uint16 else copy).float()

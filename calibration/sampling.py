"""How well each KV head's attention samples: the last rows of calibration items, decoded against the cache of the dense model.

The prompt is computed exactly, as a deployed model does; the rows that predict answers are decode steps. One pass with gradients
over these rows alone gives every layer's queries, keys, values and the gradient of the answer loss in its output, which is all
that `sampling_error` needs. The losses of an item's answer tokens enter with random signs: what they have in common with each
other would otherwise count as if it were one token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface

from attnspan.calibration.attention import NAME as EXACT
from attnspan.calibration.attention import Setting, attention
from attnspan.calibration.corpus_kinds import WEIGHTS
from attnspan.calibration.items import Item
from attnspan.calibration.sampling_error import Steps, tally
from attnspan.calibration.sampling_profile import ItemSampling
from attnspan.planner.errors import UserError
from attnspan.planner.rules import LshParams

__all__ = ["STEPS", "sample_item", "sample_items"]

NAME = "attnspan_sampling"
STEPS = 32
"""Rows of an item that are measured, at most."""
LEAST = 512
"""Tokens before the first answer; a shorter text has next to nothing to sample."""


class _Prompt:
    """Remembers every layer's keys and values [kv_heads, tokens, dim] of a dense pass."""

    def __init__(self) -> None:
        self.key: dict[int, Tensor] = {}
        self.value: dict[int, Tensor] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        self.key[module.layer_idx], self.value[module.layer_idx] = key[0], value[0]
        return AttentionInterface()[EXACT](module, query, key, value, *rest, **more)


class _Answer:
    """Attends to a prompt and to the rows themselves; remembers what goes in and comes out of every layer."""

    def __init__(self, prompt: _Prompt) -> None:
        self.prompt = prompt
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}
        self.output: dict[int, Tensor] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
        layer = module.layer_idx
        keys = torch.cat([self.prompt.key.pop(layer), key[0]], 1)
        values = torch.cat([self.prompt.value.pop(layer), value[0]], 1)
        self.seen[layer] = (query[0].detach(), keys.detach(), values.detach(), scaling)
        group = query.shape[1] // keys.shape[0]
        # Kept scores of all layers would be large: they are computed again on the way back.
        parts = [
            checkpoint(_attend, query[0, h * group : (h + 1) * group], keys[h], values[h], scaling, use_reentrant=False)
            for h in range(keys.shape[0])
        ]
        self.output[layer] = torch.cat(parts)[None]
        return self.output[layer].transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query [group, rows, dim], key and value [tokens, dim]; the rows are the last of the tokens -> [group, rows, dim]."""
    rows, tokens = query.shape[1], key.shape[0]
    scores = (query.float() @ key.float().t()) * scale
    ahead = torch.arange(tokens, device=key.device) > torch.arange(tokens - rows, tokens, device=key.device)[:, None]
    return (scores.masked_fill(ahead, -torch.inf).softmax(-1) @ value.float()).to(query.dtype)


def sample_item(model: Any, item: Item, candidates: Sequence[LshParams], seed: int = 0, bar: Any = None) -> ItemSampling:
    """Measure candidates on one item with a hooked model (`load_model`).

    Memory above the model's: the dense cache of the item, and for one KV head a few arrays of its query heads' steps by tokens.
    UserError when the item is too short or its loss is not finite.
    """
    tokens = item.tokens[: int(item.targets[-1]) + 1]
    first = item.first
    if first < LEAST:
        raise UserError(f"item {item.id} has {first} tokens before its answer: at least {LEAST} are needed; change --lengths")
    ids = torch.from_numpy(tokens.astype(np.int64))[None].to(model.device)
    prompt = _Prompt()
    AttentionInterface.register(NAME, prompt.attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)
    model.eval()
    try:
        with torch.no_grad(), attention(Setting()):
            model(ids[:, :first], use_cache=False, logits_to_keep=1)
        answer = _Answer(prompt)
        AttentionInterface.register(NAME, answer.attend)
        embedded = model.get_input_embeddings()(ids[:, first:-1]).detach().requires_grad_(True)
        at = torch.arange(first, len(tokens) - 1, device=model.device)[None]
        with torch.enable_grad():
            logits = model(inputs_embeds=embedded, position_ids=at, use_cache=False).logits[0]
            rows = torch.from_numpy(item.targets - 1 - first).to(model.device)
            losses = torch.nn.functional.cross_entropy(logits[rows].float(), ids[0, first + rows + 1], reduction="none")
            if not bool(torch.isfinite(losses).all()):
                raise UserError(f"the loss of item {item.id} ({item.kind}) is no number; try --dtype fp32 in attnspan calibrate")
            rng = np.random.default_rng([seed, int(item.id, 16)])
            sign = torch.from_numpy(rng.choice([-1.0, 1.0], len(rows))).to(losses)
            layers = sorted(answer.output)
            grads = torch.autograd.grad((sign * losses).sum(), [answer.output[layer] for layer in layers])
    finally:
        model.set_attn_implementation(EXACT)
    chosen = np.unique(np.linspace(0, len(item.targets) - 1, min(STEPS, len(item.targets))).round().astype(int))
    steps = item.targets[chosen] - 1
    tallies = []
    for layer, grad in zip(layers, grads, strict=True):
        tallies.append(_layer(answer.seen.pop(layer), grad[0], steps, first, candidates))
        if bar is not None:
            bar.update()
    # [layers, kv_heads, 4, candidates]
    measured = np.array([[[t.loss, t.error, t.share, t.read] for t in heads] for heads in tallies])
    weight = WEIGHTS.get(item.kind, 1.0)
    return ItemSampling(item.id, item.length, len(tokens), weight, tuple(candidates), *np.moveaxis(measured, 2, 0))


def _layer(seen: Any, grad: Tensor, steps: Any, first: int, candidates: Sequence[LshParams]) -> list[Any]:
    query, keys, values, scale = seen
    group = query.shape[0] // keys.shape[0]
    rows = torch.from_numpy(steps - first).to(query.device)

    def array(x: Tensor) -> Any:
        return x.detach().float().cpu().numpy()

    out = []
    for h in range(keys.shape[0]):
        part = slice(h * group, (h + 1) * group)
        of_head = Steps(
            array(query[part][:, rows]), array(grad[part][:, rows]), array(keys[h]), array(values[h]), steps, float(scale)
        )
        out.append(tally(of_head, candidates))
    return out


def sample_items(
    model: Any, items: Sequence[Item], candidates: Sequence[LshParams], folder: Path, seed: int = 0
) -> list[ItemSampling]:
    """Measurements of all items, these candidates and those that were there. What `folder` lacks is measured and kept beside what
    it holds, so that an interrupted run loses at most one item."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = model.config.get_text_config().num_hidden_layers
    files = [folder / f"{item.id}.npz" for item in items]
    missing = [ItemSampling.missing(file, candidates) for file in files]
    with tqdm(total=len(items) * layers, initial=missing.count([]) * layers, unit=" layers", desc="sampling",
              disable=None) as bar:  # fmt: skip
        for item, file, wanted in zip(items, files, missing, strict=True):
            if wanted:
                made = sample_item(model, item, wanted, seed, bar)
                (ItemSampling.load(file).joined(made) if file.is_file() else made).save(file)
    return [ItemSampling.load(file) for file in files]

"""The influence profile of a model: one forward and one backward pass per item, each kept as a file of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attnspan.calibration.attention import Setting, attention
from attnspan.calibration.corpus_kinds import WEIGHTS
from attnspan.calibration.influence import blocks_of, entry_rise, joint_rise
from attnspan.calibration.item_profile import Curve, ItemProfile
from attnspan.calibration.items import Item
from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan


class _Sums:
    """Adds up the tiles of one item in float64."""

    def __init__(self, layers: int, kv_heads: int, blocks: int, entries: bool) -> None:
        self.blocks = blocks
        self.joint = np.zeros((layers, kv_heads, blocks + 1))
        self.entry = np.zeros_like(self.joint) if entries else None

    def tile(self, layer: int, head: int, weight: Tensor, gradient: Tensor, base: Tensor) -> None:
        self.joint[layer, head] += _total(joint_rise(weight, weight * gradient, base, self.blocks))
        if self.entry is not None:
            self.entry[layer, head] += _total(entry_rise(weight, gradient, base, self.blocks))


def _total(rows: Tensor) -> Curve:
    # float64 does not exist on every device; a tile's sum in fp32 is of a few hundred terms.
    summed = rows.double() if rows.device.type in ("cpu", "cuda") else rows
    out: Curve = summed.sum((0, 1)).cpu().numpy().astype(np.float64)
    return out


def profile_item(model: Any, item: Item, plan: Plan | None = None, entries: bool = False) -> ItemProfile:
    """One item through a hooked model (`load_model`) with a plan in force (None: dense).

    Memory above the model's: some hundred bytes per token, layer and feature while a layer is worked on, and one copy of the
    hidden states per layer; nothing grows with the square of the tokens. UserError when the loss is not finite.
    """
    if entries and plan is not None:
        raise ValueError("the influence of single entries is defined for the dense model")
    tokens = item.tokens[: int(item.targets[-1]) + 1]
    config = model.config.get_text_config()
    layers, kv_heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    sums = _Sums(layers, kv_heads, blocks_of(item.length), entries)
    _checkpoint(model)
    device = model.device
    ids = torch.tensor(tokens)[None].to(device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    where = torch.from_numpy(item.targets - 1 - item.first).to(device)
    with attention(Setting(None if plan is None else plan.spans(len(tokens)), sums)), torch.enable_grad():
        out = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=len(tokens) - item.first)
        loss = torch.nn.functional.cross_entropy(out.logits[0][where].float(), ids[0, where + item.first + 1])
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss of item {item.id} ({item.kind}, {len(tokens)} tokens) is {loss.item()}: must be a number; "
                            "try --dtype fp32, or remove the item from --data")  # fmt: skip
        torch.autograd.grad(loss, embedded)
    return ItemProfile(item.id, item.length, loss.item(), sums.joint, sums.entry, WEIGHTS.get(item.kind, 1.0))


def _checkpoint(model: Any) -> None:
    """Have layers computed again on the way back instead of kept: a third more time for a tenth of the memory.

    Layers do so only in training mode, which changes nothing else without dropout.
    """
    if not getattr(model, "is_activation_checkpointing", False):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()


def profile_items(
    model: Any, items: Sequence[Item], folder: Path, plan: Plan | None = None, entries: bool = False, label: str = "profile"
) -> list[ItemProfile]:
    """Profiles of all items; those already in `folder` are read from there, so that an interrupted run loses at most one item."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{item.id}.npz" for item in items]
    done = [file.is_file() for file in files]
    # Work grows a little faster than the tokens; the bar counts tokens so that its ETA is about right.
    total, kept = (sum(len(i.tokens) for i, d in zip(items, done, strict=True) if d or all_) for all_ in (True, False))
    out = []
    start = time.monotonic()
    with tqdm(total=total, initial=kept, unit=" tokens", desc=label, disable=None) as bar:
        for item, file, there in zip(items, files, done, strict=True):
            if there:
                out.append(ItemProfile.load(file))
                continue
            got = profile_item(model, item, plan, entries)
            got.save(file)
            out.append(got)
            bar.update(len(item.tokens))
            bar.set_postfix_str(f"loss {got.loss:.3f}")
    if not all(done):
        tqdm.write(f"{label}: {len(items)} items ({sum(done)} from before), {time.monotonic() - start:.0f} s, mean loss "
                   f"{np.mean([p.loss for p in out]):.4f}")  # fmt: skip
    return out

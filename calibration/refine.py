"""Better than one look at the dense model: re-profiling with a plan in force, measured ablation, measured swaps.

All three need the model and answer the same question with rising cost and certainty: what does this head's span do to the
answers, given what the other heads keep?
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from attnspan.calibration.item_profile import Curve, ItemProfile
from attnspan.calibration.items import Item
from attnspan.calibration.profile import profile_items
from attnspan.calibration.scorer import answer_logits
from attnspan.planner.plan import Plan
from attnspan.planner.rules import BLOCK, MIN_SPAN

Spans = npt.NDArray[np.int32]
MakePlan = Callable[[Sequence[Sequence[ItemProfile]], float], Plan]
"""(rounds of profiles so far, share of the way from dense to the budget) -> the plan to go on with."""


def answer_loss(model: Any, item: Item, spans: Spans | None) -> float:
    """Mean cross-entropy of an item's answer tokens in nats, with spans [layers, kv_heads] in force (None: dense)."""
    logits = answer_logits(model, item, spans)
    wanted = torch.from_numpy(item.tokens[item.targets]).to(logits.device)
    return float(torch.nn.functional.cross_entropy(logits, wanted))


def schedule(rounds: int) -> list[float]:
    """Shares of the way from dense to the budget that the rounds are made at: the last two are at the budget itself."""
    return [min(1.0, (r + 1) / max(rounds - 1, 1)) for r in range(rounds)]


def rounds(
    model: Any, items: Sequence[Item], dense: Sequence[ItemProfile], make_plan: MakePlan, count: int, folder: Path
) -> list[Sequence[ItemProfile]]:
    """The dense profile and `count` more, each with the plan made from those before it in force, on tightening budgets.

    Interrupted, it goes on where it was: a round's folder is named after its plan, and what is there is not profiled again.
    """
    history: list[Sequence[ItemProfile]] = [dense]
    for number, share in enumerate(schedule(count), 1):
        plan = make_plan(history, share)
        rules = json.dumps(plan.to_dict()["rules"]).encode()
        name = f"round-{number}-{hashlib.sha256(rules).hexdigest()[:12]}"
        history.append(profile_items(model, items, folder / name, plan, label=f"round {number} of {count}"))
    return history


def ablate(
    model: Any,
    items: Sequence[Item],
    profiled: dict[int, Curve],
    dense_loss: dict[str, float],
    heads: int,
    shares: Sequence[float],
) -> dict[int, Curve]:
    """Loss curves where those of the most sensitive heads are measured: each is cut alone, everything else dense.

    heads: how many of them (by the curve at the smallest span, summed over lengths); shares: spans tried, as shares of the
    length, the smallest span always; between them the measured rise is interpolated. dense_loss: loss of the dense model by item
    id.
    """
    kv_heads = next(iter(profiled.values())).shape[1]
    rank = sum((curve[..., 0] / max(curve[..., 0].sum(), 1e-30) for curve in profiled.values()), np.zeros(()))
    chosen = [divmod(int(i), kv_heads) for i in np.argsort(-np.asarray(rank), axis=None)[:heads]]
    out = {n: curve.copy() for n, curve in profiled.items()}
    with tqdm(total=len(chosen) * sum(len(_points(item.length, shares)) for item in items), desc="ablation", disable=None) as bar:
        for n, curve in out.items():
            group = [item for item in items if item.length == n]
            points = _points(n, shares)
            for layer, head in chosen:
                rise = []
                for blocks in points:
                    spans = np.full(curve.shape[:2], n, np.int32)
                    spans[layer, head] = blocks * BLOCK
                    rise.append(float(np.mean([answer_loss(model, item, spans) - dense_loss[item.id] for item in group])))
                    bar.update(len(group))
                curve[layer, head] = np.interp(np.arange(curve.shape[-1]), [*points, n // BLOCK], [*rise, 0.0])
    return out


def _points(n: int, shares: Sequence[float]) -> list[int]:
    least = MIN_SPAN // BLOCK
    return sorted({least, *(max(least, round(share * n / BLOCK)) for share in shares)} - {n // BLOCK})


Neighbour = Callable[[np.random.Generator, Plan], Plan | None]
"""A plan near another that costs no more; None when none was found."""


def search(
    model: Any, items: Sequence[Item], plan: Plan, neighbour: Neighbour, trials: int, seed: int = 0
) -> tuple[Plan, list[tuple[int, float]]]:
    """Local search on the measured answer loss: a neighbour that is better on the items becomes the plan.

    A trial stops at the item after which it cannot win any more. Returns the plan and (trial, loss) of every improvement.
    """
    rng = np.random.default_rng(seed)
    losses = [answer_loss(model, item, plan.spans(len(item.tokens))) for item in tqdm(items, desc="search: start", disable=None)]
    trail = [(0, float(np.mean(losses)))]
    with tqdm(range(1, trials + 1), desc="search", disable=None) as bar:
        for trial in bar:
            other = neighbour(rng, plan)
            if other is None:
                break
            tried: list[float] = []
            budget = sum(losses)
            # Losses are positive: once the sum is passed, the rest cannot bring it back.
            for item in items:
                tried.append(answer_loss(model, item, other.spans(len(item.tokens))))
                if sum(tried) >= budget:
                    break
            else:
                plan, losses = other, tried
                trail.append((trial, float(np.mean(losses))))
                bar.set_postfix_str(f"loss {trail[-1][1]:.4f}")
    return plan, trail

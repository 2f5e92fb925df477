"""Plans on held-out items: answer loss, KL from the dense model, agreement of the most likely token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attnspan.calibration.items import Item
from attnspan.calibration.scorer import answer_logits
from attnspan.planner.plan import Plan


@dataclass(frozen=True)
class Scores:
    """Means over items of means over answer tokens. loss, dense_loss and kl (of the dense from the sparse distribution) in nats;
    top1: share of answer tokens where both models have the same most likely token."""

    loss: float
    dense_loss: float
    kl: float
    top1: float

    def to_dict(self) -> dict[str, float]:
        """As JSON, rounded to six digits."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def validate(model: Any, items: Sequence[Item], plans: Mapping[str, Plan]) -> dict[str, Scores]:
    """Scores of every plan on the same items; the dense model runs once per item. Memory: the logits of one item's answers."""
    rows: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in plans}
    with tqdm(total=len(items) * (len(plans) + 1), desc="validate", unit="pass", disable=None) as bar:
        for item in items:
            dense = _answers(model, item, None)
            bar.update()
            for name, plan in plans.items():
                rows[name].append(_compare(dense, _answers(model, item, plan), item))
                bar.update()
    return {name: Scores(*np.mean(values, 0).tolist()) for name, values in rows.items()}


def _answers(model: Any, item: Item, plan: Plan | None) -> Tensor:
    """Log-probabilities [targets, vocab] in fp32."""
    spans = None if plan is None else plan.spans(int(item.targets[-1]) + 1)
    return torch.log_softmax(answer_logits(model, item, spans), -1)


def _compare(dense: Tensor, sparse: Tensor, item: Item) -> tuple[float, float, float, float]:
    wanted = torch.from_numpy(item.tokens[item.targets]).to(dense.device)[:, None]
    loss, dense_loss = (-float(x.gather(1, wanted).mean()) for x in (sparse, dense))
    kl = float((dense.exp() * (dense - sparse)).sum(-1).mean())
    return loss, dense_loss, kl, float((dense.argmax(-1) == sparse.argmax(-1)).float().mean())

"""What sampling does to one item, and its file. No torch: plans and reports are made of these."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole
from attnspan.planner.rules import LshParams

__all__ = ["ItemSampling"]

Array = npt.NDArray[np.float64]
_MEASURED = ("loss", "error", "share", "read")


@dataclass(frozen=True)
class ItemSampling:
    """Measurements of one item, each float64 [layers, kv_heads, candidates], a head alone being sampled.

    loss: predicted KL divergence from the dense model in nats per answer token; error: squared relative error of the head's
    output; share: of the sampled keys, those that a query head of the group draws; read: bytes of the index for each sampled key.
    length: the nominal one; tokens: what the item has; weight: what it counts among those of its length.
    """

    item: str
    length: int
    tokens: int
    weight: float
    candidates: tuple[LshParams, ...]
    loss: Array
    error: Array
    share: Array
    read: Array

    def save(self, path: Path) -> None:
        """Write one .npz, whole."""
        buffer = io.BytesIO()
        told = json.dumps([asdict(each) for each in self.candidates])
        measured = {name: getattr(self, name) for name in _MEASURED}
        np.savez_compressed(
            buffer, item=self.item, length=self.length, tokens=self.tokens, weight=self.weight, candidates=told, **measured
        )
        write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> ItemSampling:
        """Read what `save` wrote; UserError when it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as data:
                candidates = tuple(LshParams(**each) for each in json.loads(str(data["candidates"])))
                measured = [data[name].astype(np.float64) for name in _MEASURED]
                if any(x.ndim != 3 or x.shape[-1] != len(candidates) or not np.isfinite(x).all() for x in measured):
                    raise ValueError("measurements do not fit the candidates")
                about = str(data["item"]), int(data["length"]), int(data["tokens"]), float(data["weight"])
                return cls(*about, candidates, *measured)
        except (OSError, ValueError, KeyError, EOFError, TypeError, UserError) as error:
            raise UserError(f"{path} is no sampling profile of an item ({error}); delete it and run the command again") from None

    @classmethod
    def missing(cls, path: Path, candidates: Sequence[LshParams]) -> list[LshParams]:
        """Those candidates that a file does not hold, or all of them when it is not there."""
        known = cls.load(path).candidates if path.is_file() else ()
        return [each for each in dict.fromkeys(candidates) if each not in known]

    def joined(self, more: ItemSampling) -> ItemSampling:
        """The measurements of both, of the same item."""
        measured: dict[str, Any] = {name: np.concatenate([getattr(self, name), getattr(more, name)], -1) for name in _MEASURED}
        return replace(self, candidates=self.candidates + more.candidates, **measured)

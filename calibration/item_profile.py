"""What the profile of one item says, and its file. No torch: plans and reports are made of these."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole

Curve = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ItemProfile:
    """What one item says. loss: mean cross-entropy of its answer tokens, in nats.

    joint float64 [layers, kv_heads, blocks + 1]: rise of the loss, signed, when a head's span becomes that many blocks of 64
    tokens, against the span in force (all zeros at that span). entry: sum of |E_ij| over what a span drops, dense profiles only,
    else None. weight: what the item counts among those of its length.
    """

    item: str
    length: int
    loss: float
    joint: Curve
    entry: Curve | None = None
    weight: float = 1.0

    def save(self, path: Path) -> None:
        """Write one .npz, whole."""
        values: dict[str, Any] = {
            "item": self.item, "length": self.length, "loss": self.loss, "joint": self.joint, "weight": self.weight,
        }  # fmt: skip
        if self.entry is not None:
            values["entry"] = self.entry
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **values)
        write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> ItemProfile:
        """Read what `save` wrote; UserError when it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as data:
                entry = data.get("entry")
                weight = float(data["weight"])
                return cls(str(data["item"]), int(data["length"]), float(data["loss"]), data["joint"], entry, weight)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path} is no profile of an item ({error}); delete it and run the command again") from None


def by_length(profiles: Iterable[ItemProfile]) -> dict[int, list[ItemProfile]]:
    """Profiles of each nominal length, lengths rising."""
    out: dict[int, list[ItemProfile]] = {}
    for each in profiles:
        out.setdefault(each.length, []).append(each)
    return dict(sorted(out.items()))

"""What calibration and evaluation work on: a sequence of tokens, some of which are answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole

__all__ = ["Item", "load_items", "save_items"]

Tokens = npt.NDArray[np.int64]
_KEYS = frozenset({"tokens", "targets", "kind", "length", "depth", "id"})


@dataclass(frozen=True, eq=False)
class Item:
    """A document with its answers.

    tokens int64 [n]; targets int64 [t]: positions in `tokens` whose token belongs to an answer (the logits one position
    earlier predict it), increasing, each at least 1; length: the nominal length, at least n; depth: where in the document
    the answer lies, 0 (start) to 1 (end), None when at several places or at none. UserError when a value is out of range.
    """

    tokens: Tokens
    targets: Tokens
    kind: str
    length: int
    depth: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "targets"):
            given = np.asarray(getattr(self, name))
            if given.ndim != 1 or not given.size or given.dtype.kind not in "iu":
                raise UserError(f"{name} of an item is {given.dtype} {list(given.shape)}: must be one or more integers in a row")
            array = given.astype(np.int64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        n, targets = len(self.tokens), self.targets
        if int(self.tokens.min()) < 0:
            raise UserError(f"an item holds token {int(self.tokens.min())}: must be 0 or more")
        if targets[0] < 1 or targets[-1] >= n or (np.diff(targets) <= 0).any():
            raise UserError(f"targets of an item of {n} tokens must increase and lie in 1 to {n - 1}")
        if type(self.length) is not int or self.length < n:
            raise UserError(f"length of an item is {self.length!r}: must be an integer of at least its {n} tokens")
        if self.depth is not None:
            if not isinstance(self.depth, int | float) or not 0 <= self.depth <= 1:
                raise UserError(f"depth of an item is {self.depth!r}: must be from 0 to 1, or null")
            object.__setattr__(self, "depth", float(self.depth))
        if not isinstance(self.kind, str) or not self.kind:
            raise UserError(f"kind of an item is {self.kind!r}: must be text")

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the SHA-256 of the content."""
        digest = hashlib.sha256(json.dumps([self.kind, self.length, self.depth, len(self.tokens)]).encode())
        digest.update(self.tokens.astype("<i8").tobytes())
        digest.update(self.targets.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    @property
    def first(self) -> int:
        """Position whose logits predict the first target."""
        return int(self.targets[0]) - 1

    def to_dict(self) -> dict[str, Any]:
        """The item as a JSON object."""
        return {
            "id": self.id,
            "kind": self.kind,
            "length": self.length,
            "depth": self.depth,
            "tokens": self.tokens.tolist(),
            "targets": self.targets.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "item") -> Item:
        """Check and build from a JSON object; UserError names the place."""
        if not isinstance(data, Mapping) or set(data) != _KEYS:
            keys = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise UserError(f"{where} holds {keys}: must be an object with {', '.join(sorted(_KEYS))}")
        try:
            tokens, targets = np.array(data["tokens"]), np.array(data["targets"])
            item = cls(tokens, targets, data["kind"], data["length"], data["depth"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{where}: tokens and targets must be lists of integers") from None
        if item.id != data["id"]:
            raise UserError(f"{where}: id is {data['id']!r}, its content has {item.id}; the file was changed, write it anew")
        return item


def save_items(items: Iterable[Item], path: str | Path) -> None:
    """Write items as JSON lines, whole: to a temporary name in the same folder, then renamed."""
    lines = [json.dumps(item.to_dict(), separators=(",", ":")) + "\n" for item in items]
    write_whole(Path(path), "".join(lines).encode("ascii"))


def load_items(path: str | Path) -> list[Item]:
    """Read items from JSON lines; UserError names file and line."""
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    items = []
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {file} is not JSON: {error}") from None
        items.append(Item.from_dict(data, f"line {number} of {file}"))
    return items

"""The calibration folder: what `attnspan calibrate` measured and `attnspan plan` reads.

calibration.json   model, shape, lengths, seeds, versions
items.jsonl        the calibration items, with the dense model's own answers
held_out.jsonl     items of another text, at a longer length: what plans are validated on
profile/           one .npz per calibration item, of the dense model
plans/             profiles with plans in force, candidates and their validation
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from attnspan.calibration.items import Item, load_items
from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json, write_whole
from attnspan.planner.shape import ModelShape

SCHEMA = 1


@dataclass(frozen=True)
class Calibration:
    """What calibration.json says; lengths in tokens, limit: the longest text the model was made for, if known."""

    folder: Path
    model: str
    shape: ModelShape
    limit: int | None
    lengths: tuple[int, ...]
    items: int
    held_out_length: int
    held_out: int
    seed: int
    dtype: str
    answers: str
    data: str | None
    plain: bool
    entries: bool
    versions: dict[str, str]

    def save(self) -> None:
        """Write calibration.json, whole."""
        content = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_whole(self.folder / "calibration.json", (json.dumps({"schema": SCHEMA, **content}, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Read calibration.json of a folder; UserError when it is none."""
        where = Path(folder)
        file = where / "calibration.json"
        if not file.is_file():
            raise UserError(
                f"{where} is no calibration folder: must hold calibration.json; make one with attnspan calibrate MODEL -o {where}"
            )
        data: dict[str, Any] = dict(read_json(file))
        if data.pop("schema", None) != SCHEMA:
            raise UserError(f"{file}: schema must be {SCHEMA}; calibrate again with this version")
        names = {f.name for f in fields(cls)} - {"folder"}
        if set(data) != names:
            raise UserError(
                f"{file}: differs in {', '.join(sorted(set(data) ^ names))} from what this version writes; calibrate again"
            )
        shape = ModelShape(**data.pop("shape"))
        return cls(where, shape=shape, lengths=tuple(data.pop("lengths")), **data)

    def calibration_items(self) -> list[Item]:
        """Items that plans are made with."""
        return load_items(self.folder / "items.jsonl")

    def profiles(self) -> list[Path]:
        """The files of the calibration items' dense profiles; UserError when the calibration was interrupted."""
        items = self.calibration_items()
        files = [self.folder / "profile" / f"{item.id}.npz" for item in items]
        missing = sum(not file.is_file() for file in files)
        if missing:
            raise UserError(
                f"{self.folder}: {missing} of {len(items)} items are not profiled yet; run attnspan calibrate again to finish"
            )
        return files

    def held_out_items(self) -> list[Item]:
        """Items that plans are validated on."""
        return load_items(self.folder / "held_out.jsonl")

    def provenance(self) -> dict[str, Any]:
        """What a plan says of where it comes from."""
        return {
            "corpus": self.data or "generated",
            "lengths": list(self.lengths),
            "held_out_length": self.held_out_length,
            "seed": self.seed,
            "dtype": self.dtype,
            "items": [item.id for item in self.calibration_items()],
            "held_out": [item.id for item in self.held_out_items()],
            "versions": self.versions,
        }

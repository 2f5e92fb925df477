"""A file that holds one row of a session: its tokens, caches and indexes. Written whole, checked when read.

    magic | length of the header (8 bytes, little-endian) | header, JSON | arrays, one after another | SHA-256 of all before

Zeros of large arrays are holes of the file: they take no room on disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.files import whole_file

__all__ = ["SavedRow", "Views", "fill", "read_row", "write_row"]

MAGIC = b"attnspan row 01\n"
BLOCK = 1 << 20
DIGEST = hashlib.sha256().digest_size

Views = Sequence[tuple[str, npt.NDArray[Any]]]
"""Contiguous arrays, or parts of arrays, by name; names may repeat."""


@dataclass(frozen=True)
class SavedRow:
    """What a saved row says about itself.

    artefact: fingerprint of the artefact it is of. tokens, pending, text: as in `SequenceState`. arrays: name and bytes of each.
    """

    artefact: str
    model_id: str
    tokens: list[int]
    pending: int | None
    text: str | None
    arrays: list[tuple[str, int]]

    def check(self, where: Path, artefact: str, model_id: str, views: Views) -> None:
        """UserError when the row is not of that artefact, or its arrays are not those that are to be filled."""
        if self.artefact != artefact:
            raise UserError(
                f"{where} was saved with another artefact (model {self.model_id!r}, {self.artefact[:12]}...): this one is "
                f"{model_id!r}, {artefact[:12]}...; load it with that one, or save it again"
            )
        if self.arrays != _sizes(views):
            raise UserError(f"{where} has arrays of other sizes than this version of attnspan: save it again")


def write_row(path: Path, row: SavedRow, views: Views) -> None:
    """Write a row and its arrays (`row.arrays` is filled in). UserError when the folder cannot be written."""
    header = json.dumps(asdict(row) | {"arrays": _sizes(views)}).encode()
    digest = hashlib.sha256()
    with whole_file(path) as file:
        for part in (MAGIC, len(header).to_bytes(8, "little"), header):
            digest.update(part)
            file.write(part)
        for _, view in views:
            content = _bytes(view)
            for start in range(0, content.size, BLOCK):
                block = content[start : start + BLOCK]
                digest.update(block.data)
                if block.size == BLOCK and not block.any():
                    file.seek(BLOCK, 1)
                else:
                    file.write(block.data)
        file.write(digest.digest())


@contextmanager
def read_row(path: Path) -> Iterator[tuple[SavedRow, IO[bytes]]]:
    """A row that was saved, and the file where its arrays begin. UserError when it is no such file, cut short or changed."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a file that was written by save") from None
    with file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path} is no saved row, or another version's; give a file that was written by save")
        end = path.stat().st_size - DIGEST
        digest = hashlib.sha256(MAGIC)
        while (left := end - file.tell()) > 0 and (block := file.read(min(BLOCK, left))):
            digest.update(block)
        if end < len(MAGIC) or file.read() != digest.digest():
            raise UserError(f"{path} was cut short or changed: its SHA-256 is not what it says; save it again, or copy it again")
        file.seek(len(MAGIC))
        row = _header(path, file.read(int.from_bytes(file.read(8), "little")))
        yield row, file


def fill(file: IO[bytes], views: Views) -> None:
    """Read the arrays of a file that `read_row` opened."""
    for name, view in views:
        target = _bytes(view)
        if file.readinto(target.data) != target.size:  # type: ignore[attr-defined]
            raise UserError(f"{file.name} was cut short while it was read, in {name}: copy it again")


def _bytes(view: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous array."""
    return view.reshape(-1).view(np.uint8)


def _sizes(views: Views) -> list[tuple[str, int]]:
    return [(name, view.nbytes) for name, view in views]


def _header(path: Path, text: bytes) -> SavedRow:
    try:
        row = SavedRow(**json.loads(text))
        arrays = [(str(name), int(size)) for name, size in row.arrays]
        good = all(type(token) is int for token in (*row.tokens, 0 if row.pending is None else row.pending))
        good &= isinstance(row.artefact, str) and isinstance(row.model_id, str) and isinstance(row.text, str | None)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise UserError(f"{path} has a header that this version of attnspan does not know: save it again")
    return SavedRow(row.artefact, row.model_id, row.tokens, row.pending, row.text, arrays)

"""Files read strictly and written whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from attnspan.planner.errors import UserError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is whole or absent, as `whole_file` does."""
    with whole_file(path) as file:
        file.write(data)


def check_output(path: Path | None, option: str) -> None:
    """UserError when no file can be written there; asked before the long work whose result it is to hold (None: none)."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; must be the path of a file; change {option}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: no such folder; must be in a folder that exists; change {option}")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that will be whole or absent: temporary name beside it, renamed at the end, removed on an error.

    UserError when the folder is missing or cannot be written; other OSErrors (disk full) pass.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; must be the path of a file")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {path}: {error.strerror}; must be in a writable folder") from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write into. It takes the place of `out` at the end, or is removed on any error."""
    out = out.absolute()
    work, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    work.mkdir()
    try:
        yield work
        if out.exists():
            out.rename(old)
        work.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object strictly (no NaN, no repeated keys); UserError on anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        data = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}: must be a JSON object")
    return data


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} appears twice")
    return out


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")

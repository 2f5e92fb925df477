"""The folder that an artefact is written to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from attnspan.planner.errors import UserError


def check_destination(out: Path, overwrite: bool, needed: int) -> None:
    """Refuse, before any work, a folder that cannot be written. `needed`: bytes that it will hold.

    UserError when `out` exists and `overwrite` is false, when its parent does not exist or is read-only, or when the
    disk is too full.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; allowed is a new folder, or add --overwrite")
    if out.exists() and not (out / "attnspan.json").is_file():
        raise UserError(f"{out} exists and is not an artefact, --overwrite replaces artefacts only; change OUT")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent} does not exist; make it or change OUT")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not writable; change OUT")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(f"{out} needs {needed / 1e6:.0f} MB, {parent} has {free / 1e6:.0f} MB free; change OUT")

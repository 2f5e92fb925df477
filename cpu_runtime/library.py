"""Where the op library `libattnspan_ort.so` is."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from attnspan.planner.errors import UserError

NAME = "libattnspan_ort.so"


def library_path() -> Path:
    """Path of the installed op library; `SessionOptions.register_custom_ops_library` takes it.

    Raises `UserError` when the package was built without it (`ATTNSPAN_ORT=OFF`).
    """
    # An editable install spreads the package over the source tree and the build's install folder: ask for the file itself.
    path = Path(str(importlib.resources.files("attnspan.cpu_runtime").joinpath(NAME)))
    if not path.is_file():
        raise UserError(
            f"{NAME} is not installed ({path} does not exist); build it with `make install`, or run without it (slow)"
        )
    return path

"""What `attnspan run` needs to run engines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.runtime.run_command import Runner

if TYPE_CHECKING:
    from attnspan.plugins.trt_sparse_attn.session import Session
    from attnspan.runtime.artefact import Artefact

__all__ = ["RUNNER"]


def _add_options(group: Any) -> None:
    group.add_argument("--rtx", action="store_true", help="use TensorRT-RTX (default: where TensorRT is not installed)")
    group.add_argument("--plugin", metavar="FILE", type=Path,
                       help="libattnspan_trt.so (default: $ATTNSPAN_TRT_PLUGIN, else the plugin in Python)")  # fmt: skip


def _open(artefact: Artefact, args: argparse.Namespace) -> Session:
    from attnspan.plugins.trt_sparse_attn.session import Session

    return Session(artefact, rtx=True if args.rtx else None, plugin=args.plugin)


RUNNER = Runner(("tensorrt",), _add_options, lambda _: None, _open)

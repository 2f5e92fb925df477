"""The verb `attnspan build`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError

__all__ = ["register"]


def register(subparsers: Any) -> None:
    """Add the verb to the program `attnspan`."""
    parser = subparsers.add_parser(
        "build",
        help="turn an artefact of target tensorrt or portable into a TensorRT engine",
        description="Build the engine of an artefact, for the TensorRT that is installed and the GPU at hand, into DIR/engine.",
        allow_abbrev=False,
    )
    parser.add_argument("artefact", metavar="DIR", type=Path, help="artefact folder, made by attnspan export --target tensorrt")
    parser.add_argument("--max-batch", metavar="N", type=int, default=1, help="texts that are decoded at a time (default 1)")
    parser.add_argument("--max-prompt-chunk", metavar="N", type=int, help="tokens of a prompt per call (default: at most 1024)")
    parser.add_argument("--max-logits", metavar="N", type=int, default=1,
                        help="positions of a call that may be asked for logits (default 1)")  # fmt: skip
    parser.add_argument("--rtx", action="store_true", help="use TensorRT-RTX (default: where TensorRT is not installed)")
    parser.add_argument("--arch", metavar="SM", help="build for another GPU, with TensorRT-RTX: compute capability such as 89")
    parser.add_argument("--weight-streaming", action="store_true", help="weights may stay in the host's memory")
    parser.add_argument("--timing-cache", metavar="FILE", type=Path, help="timings of tactics (default DIR/engine/timing.cache)")
    parser.add_argument("--memory", metavar="GB", type=float, help="scratch memory that tactics may take (default: all)")
    parser.add_argument("--plugin", metavar="FILE", type=Path,
                        help="libattnspan_trt.so (default: $ATTNSPAN_TRT_PLUGIN, else the plugin in Python)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build, then print where the engine is and what it takes."""
    from attnspan.plugins.trt_sparse_attn.engine import BuildOptions, build_engine, describe

    if args.memory is not None and not 0 < args.memory < 1e6:
        raise UserError(f"--memory is {args.memory} GB; must be more than 0")
    path = build_engine(
        args.artefact,
        BuildOptions(
            max_batch=args.max_batch,
            max_prompt_chunk=args.max_prompt_chunk,
            max_logits=args.max_logits,
            rtx=True if args.rtx else None,
            arch=args.arch,
            weight_streaming=args.weight_streaming,
            timing_cache=args.timing_cache,
            workspace=None if args.memory is None else int(args.memory * 1e9),
            library=args.plugin,
        ),
    )
    print(describe(path))
    return 0

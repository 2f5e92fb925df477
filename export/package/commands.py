"""The verb `attnspan package`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["register"]


def register(subparsers: Any) -> None:
    """Add the verb to the command line `attnspan`."""
    package = subparsers.add_parser("package", help="lay an artefact out for a server", allow_abbrev=False)
    kinds = package.add_subparsers(dest="kind", metavar="KIND", required=True)
    parser = kinds.add_parser(
        "triton",
        help="model repository of Triton Inference Server",
        description="Write a model repository: the model with its caches as sequence state, and a model that chats by it.",
        allow_abbrev=False,
    )
    parser.add_argument("artefact", metavar="DIR", type=Path, help="artefact folder, as made by attnspan export")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be new")
    parser.add_argument("--name", default="chat", help="name of the model that chats; the other is NAME_core (default chat)")
    parser.add_argument("--sequences", metavar="N", type=int, default=4, help="conversations at a time (default 4)")
    idle = "a conversation ends after so long without a message (default 600)"
    parser.add_argument("--idle", metavar="SECONDS", type=int, default=600, help=idle)
    where = "where the server sees OUT/models (default /models)"
    parser.add_argument("--repository", metavar="PATH", default="/models", help=where)
    parser.add_argument("--threads", metavar="N", type=int, help="cpu, portable: threads (default: ONNX Runtime's)")
    parser.add_argument("--engine", metavar="FILE", type=Path, help="tensorrt: the engine (default: the only one of TensorRT)")
    plugin = "tensorrt: libattnspan_trt.so (default: $ATTNSPAN_TRT_PLUGIN, else DIR's)"
    parser.add_argument("--plugin", metavar="FILE", type=Path, help=plugin)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the repository and print what is in it."""
    from attnspan.export.package.triton import Options, package

    options = Options(
        name=args.name,
        sequences=args.sequences,
        idle=args.idle,
        repository=args.repository,
        threads=args.threads,
        engine=args.engine,
        plugin=args.plugin,
    )
    print(package(args.artefact, args.out, options))
    return 0

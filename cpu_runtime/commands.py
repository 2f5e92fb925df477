"""The verb `bench`, and what `run` needs to run artefacts on CPUs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError
from attnspan.runtime.run_command import Runner

if TYPE_CHECKING:
    from attnspan.cpu_runtime.session import Session
    from attnspan.runtime.artefact import Artefact

__all__ = ["RUNNER", "register"]


def register(subparsers: Any) -> None:
    """Add the verb to the program `attnspan`."""
    bench = subparsers.add_parser("bench", help="measure speed and memory", allow_abbrev=False)
    what = bench.add_subparsers(dest="what", metavar="WHAT", required=True)
    from attnspan.cpu_runtime import bench_attention, bench_generate, bench_lsh

    bench_attention.register(what)
    bench_lsh.register(what)
    bench_generate.register(what)


def _add_options(group: Any) -> None:
    group.add_argument("--threads", metavar="N", type=int, help="threads (default: physical cores, on a GPU one less)")
    library = group.add_mutually_exclusive_group()
    library.add_argument("--library", metavar="FILE", type=Path, help="op library to use (default: the installed one)")
    library.add_argument("--no-library", action="store_true", help="run attention as standard ONNX: slow")
    group.add_argument("--device", choices=("cpu", "cuda"), help="hybrid: where all but the sampling runs (default: cpu)")


def _check(args: argparse.Namespace) -> None:
    if args.threads is not None and args.threads < 1:
        raise UserError(f"threads is {args.threads}: must be 1 or more; change --threads")
    if args.device is not None:
        from attnspan.cpu_runtime.loading import check_device

        check_device(args.device)


def _open(artefact: Artefact, args: argparse.Namespace) -> Session:
    from attnspan.cpu_runtime.session import Session

    device = args.device or "cpu"
    return Session(artefact, threads=args.threads, use_library=not args.no_library, library=args.library, device=device)


RUNNER = Runner(("cpu", "portable", "hybrid"), _add_options, _check, _open)

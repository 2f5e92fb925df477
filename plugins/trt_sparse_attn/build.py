"""`python -m attnspan.plugins.trt_sparse_attn.build`: kernels as cubin and PTX, with a manifest and C sources; needs no GPU."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from attnspan.planner.errors import UserError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _arguments(
    argv: Sequence[str] | None, archs: Sequence[int], head_dims: Sequence[int], types: Sequence[str]
) -> argparse.Namespace:
    parser = _Parser(prog="python -m attnspan.plugins.trt_sparse_attn.build", description=__doc__, allow_abbrev=False)
    parser.add_argument("--arch", nargs="+", metavar="SM", help=f"of {_list(archs)} (all)")
    parser.add_argument("--head-dim", nargs="+", metavar="D", help=f"of {_list(head_dims)} (all)")
    parser.add_argument("--dtype", nargs="+", metavar="TYPE", help=f"of {_list(types)} (all)")
    parser.add_argument("--jobs", metavar="N", help="processes that compile (one a core)")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, required=True, help="folder to write; replaces an earlier build"
    )
    args = parser.parse_args(argv)
    args.arch = _chosen(args.arch, archs, "--arch")
    args.head_dim = _chosen(args.head_dim, head_dims, "--head-dim")
    args.dtype = _chosen(args.dtype, types, "--dtype")
    cores = len(os.sched_getaffinity(0))
    if args.jobs is not None and not (args.jobs.isdigit() and 1 <= int(args.jobs) <= 256):
        raise UserError(f"--jobs is '{args.jobs}'; allowed is a number from 1 to 256")
    args.jobs = cores if args.jobs is None else int(args.jobs)
    return args


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _chosen(words: Sequence[str] | None, allowed: Sequence[Any], option: str) -> list[Any]:
    if words is None:
        return list(allowed)
    known = {str(value): value for value in allowed}
    for word in words:
        if word not in known:
            raise UserError(f"{option} is '{word}'; allowed are {_list(allowed)}")
    return [value for word, value in known.items() if word in words]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 (a kernel may not ship), 2 (a user's mistake), 130 (interrupted) or 143 (terminated)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-written is removed
    try:
        try:
            from attnspan.plugins.trt_sparse_attn.aot import ARCHS, BuildError
            from attnspan.plugins.trt_sparse_attn.aot_folder import build
            from attnspan.plugins.trt_sparse_attn.kernels.common import HEAD_DIMS
            from attnspan.plugins.trt_sparse_attn.kernels.variants import TYPES, variants
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed; install attnspan[gpu-kernels]") from None
        args = _arguments(argv, ARCHS, HEAD_DIMS, tuple(TYPES))
        table = partial(variants, head_dims=tuple(args.head_dim), dtypes=tuple(args.dtype))
        binaries = build(table, args.arch, args.output, args.jobs)
        size = sum(len(one.cubin) for one in binaries)
        print(f"{args.output}: {len(binaries)} kernels for {_list(args.arch)}, {size / 1e6:.1f} MB of machine code")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BuildError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

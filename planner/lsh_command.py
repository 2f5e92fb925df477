"""The verb `attnspan plan lsh`: heads that sample their context, by sketches of the keys or by locality-sensitive hashing."""

from __future__ import annotations

import argparse
from typing import Any

from attnspan.planner.errors import UserError
from attnspan.planner.rules import FRACTION, MAX_FRACTION, LshParams

__all__ = ["MAX_HAMMING", "register"]

MAX_HAMMING = {64: 20, 128: 47, 256: 101}
"""Default threshold by signature length: draws 0.5, 0.9, 2.5 % of keys whose cosine to the query has mean 0 and deviation 0.1."""
TABLES = {"bits": 10, "tables": 150, "min_collisions": 2}
"""MagicPIG's own: 1.8 % of such keys."""


def register(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the kind to `attnspan plan`."""
    from attnspan.planner.commands import add_shape

    parser = kinds.add_parser(
        "lsh",
        help="every head keeps all tokens and samples them, no calibration",
        description="Write a plan where KV heads keep every token, attend to sinks and recent tokens exactly, sample the rest.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--index", default="sketch", help="how keys are drawn: sketch (default), signature, tables; exact: all, a test"
    )
    parser.add_argument(
        "--fraction",
        type=float,
        metavar="F",
        help=f"sketch: share of the indexed tokens that a query draws, above 0, at most {MAX_FRACTION:g} (default {FRACTION:g})",
    )
    bounds = ", ".join(f"{bound} for {bits}" for bits, bound in MAX_HAMMING.items())
    parser.add_argument("--signature-bits", type=int, metavar="N", help="signature: bits of a key, 64, 128 or 256 (default)")
    parser.add_argument(
        "--max-hamming",
        type=int,
        metavar="H",
        help=f"signature: keys at most so far are drawn (default {bounds}; about 0.5, 0.9, 1 %% of synthetic keys, 2 to 5 %% of "
        "a real model's)",
    )
    parser.add_argument("--bits", type=int, metavar="K", help=f"tables: bits of a hash, 1 to 15 (default {TABLES['bits']})")
    parser.add_argument("--tables", type=int, metavar="L", help=f"tables: hash tables, 1 to 1024 (default {TABLES['tables']})")
    parser.add_argument(
        "--min-collisions",
        type=int,
        metavar="N",
        help=f"tables: keys that collide in so many are drawn, 1 to 4 (default {TABLES['min_collisions']})",
    )
    parser.add_argument("--window", type=int, default=64, help="recent tokens that are exact, the current one too (default 64)")
    parser.add_argument("--dense-layers", metavar="I,J,...", help="layers that are not sampled, or none (default 0,16,32 ...)")
    parser.add_argument("--seed", type=int, default=0, help="of the random rotation or projection (default 0)")
    parser.add_argument(
        "--min-inclusion",
        type=float,
        default=0.0,
        metavar="U",
        help="signature, tables: least probability that a drawn key is weighted by; above 0 less noise for some bias (default 0)",
    )
    parser.add_argument(
        "--guard",
        type=float,
        default=0.0,
        metavar="E",
        help="a head's step is exact where the draw's own estimate of its relative standard error is above E (default 0: never)",
    )
    add_shape(parser, layers=True)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the plan."""
    from attnspan.planner.commands import read_shape, write
    from attnspan.planner.uniform import sampled

    params = _params(args)
    return write(sampled(read_shape(args), params, args.n_max, _layers(args.dense_layers)), args.output)


def _params(args: argparse.Namespace) -> LshParams:
    names = ("fraction", "bits", "tables", "min_collisions", "signature_bits", "max_hamming")
    given: dict[str, Any] = {name: getattr(args, name) for name in names}
    defaults: dict[str, Any] = {}
    if args.index == "tables":
        defaults = TABLES
    elif args.index == "signature":
        bits = 256 if given["signature_bits"] is None else given["signature_bits"]
        defaults = {"signature_bits": bits, "max_hamming": MAX_HAMMING.get(bits)}
    filled = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    return LshParams(args.index, args.window, seed=args.seed, min_inclusion=args.min_inclusion, guard=args.guard, **filled)


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if text == "none":
        return []
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise UserError(f"--dense-layers is {text!r}: must be numbers of layers like 0,16, or none") from None

"""`attnspan bench lsh`: a decode step of one sampled layer beside dense attention, in time, bytes and error."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.cpu_runtime.bench_attention import _choices, _list
from attnspan.planner.errors import UserError
from attnspan.planner.rules import LshParams, check_int, check_number

if TYPE_CHECKING:
    from attnspan.cpu_runtime.bench_lsh_case import Case, Wanted
    from attnspan.cpu_runtime.lsh_keys import Capture

__all__ = ["register"]

_BASELINES = ("attnspan-dense", "ort-gqa", "ort-gqa-int8", "torch-sdpa", "topk")
_SHAPE = {"heads": 32, "kv_heads": 8, "head_dim": 128}
_INDEXES = ("sketch", "signature", "tables")
_AUTO = ("auto", "per-head")


def register(subparsers: Any) -> None:
    """Add `lsh` to the benchmarks."""
    parser = subparsers.add_parser(
        "lsh",
        help="decode of one sampled layer: time, bytes and error, beside dense attention and Top-K",
        description="Interleaved rounds, medians, all on the same keys. limit_ms is the time to read what a step must (the keys "
        "and values that a group draws, the index) at the memory bandwidth measured in the same rounds. Lists take commas.",
        allow_abbrev=False,
    )
    parser.add_argument("--index", default=",".join(_INDEXES), help="some of sketch, signature and tables (all)")
    parser.add_argument("--bits", default="10", help="bits of a table's hash; one number, or one for each of --tables (10)")
    parser.add_argument("--tables", default="150", help="hash tables; one number, or one for each of --bits (150)")
    parser.add_argument("--min-collisions", type=int, default=2, help="tables in which a drawn key must collide (2)")
    parser.add_argument("--signature-bits", default="128", help="64, 128 or 256 (128)")
    parser.add_argument(
        "--max-hamming", default="auto", help="bits in which a drawn key may differ; auto: one number for all heads that draws "
        "--fraction; per-head: a number for each KV head that does (auto)",
    )  # fmt: skip
    parser.add_argument(
        "--fraction", default="0.02", help="shares of the context that sketches draw, and that auto and per-head aim at (0.02)"
    )
    parser.add_argument(
        "--min-inclusion", type=float, default=0.0, help="of hashes: least probability that drawn keys are weighted by (0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the projection and of generated keys (0)")
    parser.add_argument("--window", type=int, default=64, help="most recent tokens that are always read (64)")
    parser.add_argument("--context", default="32768", help="tokens of context (32768)")
    parser.add_argument("--batch", default="1", help="rows (1)")
    parser.add_argument("--ragged", action="store_true", help="rows of unequal length: the last of B has 1/B of the context")
    parser.add_argument("--keys", default="clustered", help="random, clustered, or a file of attnspan capture (clustered)")
    parser.add_argument("--layers", help="of a captured file (all)")
    parser.add_argument("--heads", type=int, help="query heads (32, or those of the file)")
    parser.add_argument("--kv-heads", type=int, help="KV heads (8, or those of the file)")
    parser.add_argument("--head-dim", type=int, help="head dimension (128, or that of the file)")
    parser.add_argument("--dtype", default="bf16", help="fp32, fp16, bf16 or int8: type of the cache (bf16)")
    parser.add_argument("--threads", help="threads (default: all cores)")
    parser.add_argument("--baselines", default=",".join(_BASELINES), help="some of the default, or none")
    parser.add_argument(
        "--library", metavar="SO", type=Path, help="another build of the op library: its dense kernel is one baseline more"
    )
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (9)")
    parser.add_argument("--append", metavar="N", type=int, default=0, help="then append N tokens, and time each step (0)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", metavar="PNG", type=Path, help="draw error against time and against the fraction drawn")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    # Two OpenMP pools that spin collapse when they share cores; both must be said before a library is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("ATTNSPAN_PROFILE", "1")
    from attnspan.cpu_runtime.bandwidth import ReadPass
    from attnspan.cpu_runtime.bench_lsh_report import draw, show
    from attnspan.cpu_runtime.bench_lsh_rounds import measure
    from attnspan.planner.files import check_output, write_whole

    cases = _cases(args)
    threads = _threads(args.threads)
    check_output(args.json, "--json")
    check_output(args.plot, "--plot")
    results: list[dict[str, Any]] = []
    bandwidth: list[float] = []
    passes = {count: ReadPass(count) for count in threads}
    for case in cases:
        for records in measure(case, passes):
            show(case, records)
            results += records
            bandwidth += [record["bandwidth_gbs"] for record in records]
    gbs = statistics.median(bandwidth)
    if args.json is not None:
        names = ("rounds", "window", "min_collisions", "min_inclusion", "seed", "ragged", "append")
        settings = {name: getattr(args, name) for name in names} | {"threads": threads}
        report = {"settings": settings, "bandwidth_gbs": gbs, "results": results}
        write_whole(args.json, (json.dumps(report, indent=1) + "\n").encode())
    if args.plot is not None:
        draw(results, args.plot)
    return 0


def _threads(text: str | None) -> list[int]:
    counts = [len(os.sched_getaffinity(0))] if text is None else _list(text, int, "--threads", "thread counts")
    for count in _some(counts, "--threads"):
        check_int("threads", count, 1, 4096, "; change --threads")
    return counts


def _some(values: list[Any], option: str) -> list[Any]:
    if not values:
        raise UserError(f"{option} is empty: at least one is needed")
    return values


def _cases(args: argparse.Namespace) -> list[Case]:
    """One for each distribution of keys, context and batch; everything is checked before anything is computed."""
    from attnspan.cpu_runtime.bench_contenders import DTYPES
    from attnspan.cpu_runtime.bench_lsh_case import Case
    from attnspan.cpu_runtime.lsh_keys import Capture

    indexes, baselines = _indexes(args), tuple(_choices(args.baselines, _BASELINES, "--baselines"))
    contexts = _some(_list(args.context, int, "--context", "token counts"), "--context")
    batches = _some(_list(args.batch, int, "--batch", "row counts"), "--batch")
    for batch in batches:
        check_int("batch", batch, 1, 65536, "; change --batch")
    if args.library is not None and not args.library.is_file():
        raise UserError(f"--library is {args.library}, which does not exist; must be a libattnspan_ort.so")
    check_int("rounds", args.rounds, 1, 10**6, "; change --rounds")
    check_int("tokens to append", args.append, 0, 2**20, "; change --append")
    if args.dtype not in DTYPES:
        raise UserError(f"--dtype is '{args.dtype}'; allowed are {', '.join(DTYPES)}")
    sources = _some([name for name in args.keys.split(",") if name], "--keys")
    files = {name: None for name in sources if name in ("random", "clustered")}
    layers = None if args.layers is None else _some(_list(args.layers, int, "--layers", "layers"), "--layers")
    if layers is not None and len(files) == len(sources):
        raise UserError("--layers is for a captured file: give one with --keys")
    captures = files | {name: Capture.load(Path(name), layers) for name in sources if name not in files}
    shapes = {name: _shape(args, captures[name]) for name in sources}
    cases = [
        Case(name, captures[name], context, batch, args.ragged, *shapes[name], args.dtype, indexes, baselines, args.rounds,
             args.window, args.append, args.seed, args.library)
        for name, context, batch in product(sources, contexts, batches)
    ]  # fmt: skip
    for case in cases:
        case.check()
    return cases


def _shape(args: argparse.Namespace, capture: Capture | None) -> tuple[int, int, int]:
    """Query heads, KV heads and head dimension."""
    given = {name: getattr(args, name) for name in _SHAPE}
    for name, value in given.items():
        if value is not None:
            check_int(name, value, 1, 65536, f"; change --{name.replace('_', '-')}")
    shape = dict(_SHAPE)
    if capture is not None:
        meta = capture.meta
        shape["kv_heads"] = given["kv_heads"] or meta["kv_heads"] * len(meta["layers"])
        shape["heads"] = meta["heads"] // meta["kv_heads"] * shape["kv_heads"]
        shape["head_dim"] = meta["head_dim"]
    wanted = shape | {name: value for name, value in given.items() if value is not None}
    if capture is not None and wanted != shape:
        raise UserError(
            f"--heads {wanted['heads']}, --head-dim {wanted['head_dim']}: {capture.file} has {shape['heads']} and "
            f"{shape['head_dim']}; leave them out"
        )
    if wanted["heads"] % wanted["kv_heads"]:
        raise UserError(f"--heads is {wanted['heads']}; it must be a multiple of --kv-heads ({wanted['kv_heads']})")
    return wanted["heads"], wanted["kv_heads"], wanted["head_dim"]


def _indexes(args: argparse.Namespace) -> list[Wanted]:
    from attnspan.cpu_runtime.bench_lsh_case import Wanted

    def numbers(option: str, kind: Any = int) -> list[Any]:
        return _some(_list(getattr(args, option.strip("-").replace("-", "_")), kind, option, "numbers"), option)

    kinds = _some(_choices(args.index, _INDEXES, "--index"), "--index")
    out: list[Wanted] = []
    common: dict[str, Any] = {"window": args.window, "seed": args.seed}
    hashed = common | {"min_inclusion": args.min_inclusion}
    if {"sketch", "signature"} & {*kinds}:
        shares = [check_number("fraction", share, 1e-6, 1, "; change --fraction") for share in numbers("--fraction", float)]
    if "sketch" in kinds:
        # Beside hashes, --min-inclusion is for these; alone, a sketch refuses it.
        own = hashed if {*kinds} == {"sketch"} else common
        out += [Wanted(LshParams("sketch", fraction=share, **own)) for share in shares]
    if "signature" in kinds:
        hamming = _some([word for word in args.max_hamming.split(",") if word], "--max-hamming")
        for width, word in product(numbers("--signature-bits"), hamming):
            auto = word in _AUTO
            most = 0 if auto else _list(word, int, "--max-hamming", "numbers, auto or per-head")[0]
            params = LshParams("signature", signature_bits=width, max_hamming=most, **hashed)
            out += [Wanted(params, word, share) for share in shares] if auto else [Wanted(params)]
    if "tables" in kinds:
        bits, tables = numbers("--bits"), numbers("--tables")
        count = max(len(bits), len(tables))
        if {len(bits), len(tables)} - {1, count}:
            raise UserError(f"--bits has {len(bits)} numbers, --tables {len(tables)}: must be as many, or one")
        for k, n in zip(bits * (count // len(bits)), tables * (count // len(tables)), strict=True):
            out.append(Wanted(LshParams("tables", bits=k, tables=n, min_collisions=args.min_collisions, **hashed)))
    return out

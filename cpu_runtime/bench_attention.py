"""`attnspan bench attention`: one layer of SpanAttention beside the best dense attention of other CPU libraries."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError

__all__ = ["register"]

_MIN_SECONDS = 0.05  # a sample repeats its step until it took this long
_SETTLE_SECONDS = 0.02  # until the threads of what ran before have stopped spinning


def register(subparsers: Any) -> None:
    """Add `attention` to the benchmarks."""
    parser = subparsers.add_parser(
        "attention",
        help="decode and prefill of one attention layer, against other libraries and the memory bandwidth",
        description="Interleaved rounds, medians. limit_ms is the time to read the kept keys and values once at the memory "
        "bandwidth measured in the same rounds. Lists are given with commas: --context 32768,131072",
        allow_abbrev=False,
    )
    parser.add_argument("--phase", default="decode", help="decode, prefill or both with a comma (decode)")
    parser.add_argument("--context", default="32768", help="tokens of context (32768)")
    parser.add_argument("--batch", default="1", help="rows (1)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (32)")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads (8)")
    parser.add_argument("--head-dim", type=int, default=128, help="head dimension (128)")
    parser.add_argument("--dtype", default="bf16", help="fp32, fp16, bf16 or int8: type of the cache (bf16)")
    parser.add_argument("--density", default="1,0.25", help="densities of SpanAttention; 1 is its dense form (1,0.25)")
    parser.add_argument("--threads", type=int, help="threads (default: all cores)")
    parser.add_argument("--baselines", default="ort-gqa,ort-gqa-int8,torch-sdpa", help="some of the default, or none")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (9)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures to this file")
    parser.set_defaults(run=_run)


def _list(text: str, kind: Any, option: str, allowed: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise UserError(f"{option} is '{text}'; allowed is a list of {allowed} with commas") from None


def _choices(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in allowed:
            raise UserError(f"{option} holds '{name}'; allowed are {', '.join(allowed)}")
    return names


def _run(args: argparse.Namespace) -> int:
    # Two OpenMP pools that spin collapse when they share cores; it must be said before PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from attnspan.cpu_runtime import bench_contenders as contenders
    from attnspan.cpu_runtime.bandwidth import ReadPass
    from attnspan.planner.files import check_output, write_whole

    check_output(args.json, "--json")
    phases = _choices(args.phase, ("decode", "prefill"), "--phase")
    names = _choices(args.baselines, contenders.BASELINES, "--baselines")
    contexts = _list(args.context, int, "--context", "token counts")
    batches = _list(args.batch, int, "--batch", "row counts")
    densities = _list(args.density, float, "--density", "numbers in (0, 1]")
    threads = args.threads if args.threads is not None else len(os.sched_getaffinity(0))
    if args.dtype not in contenders.DTYPES:
        raise UserError(f"--dtype is '{args.dtype}'; allowed are {', '.join(contenders.DTYPES)}")
    single = ("heads", "kv_heads", "head_dim", "rounds")
    counts = {"context": contexts, "batch": batches, "threads": [threads]} | {name: [getattr(args, name)] for name in single}
    for name, values in counts.items():
        if not values or min(values) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {values}; at least 1 is needed")
    if args.heads % args.kv_heads:
        raise UserError(f"--heads is {args.heads}; it must be a multiple of --kv-heads ({args.kv_heads})")
    if not densities or not all(0 < d <= 1 for d in densities):
        raise UserError(f"--density is '{args.density}'; allowed are numbers in (0, 1]")

    read_pass = ReadPass(threads)
    bandwidth: list[float] = []
    results: list[dict[str, Any]] = []
    for phase in phases:
        for context in contexts:
            for batch in batches:
                case = contenders.Case(phase, context, batch, args.heads, args.kv_heads, args.head_dim, threads)
                results += _measure(case, args, densities, names, read_pass, bandwidth)
    gbs = statistics.median(bandwidth)
    print(f"memory bandwidth {gbs:.1f} GB/s with {threads} threads; every limit is from the read passes of its own rounds")
    if args.json is not None:
        settings = {k: getattr(args, k) for k in ("heads", "kv_heads", "head_dim", "rounds")} | {"threads": threads}
        report = {"settings": settings, "bandwidth_gbs": gbs, "results": results}
        write_whole(args.json, (json.dumps(report, indent=1) + "\n").encode())
    return 0


def _sample(step: Any) -> float:
    """Milliseconds of one step: the median of as many as fill `_MIN_SECONDS`, after one that wakes the threads."""
    time.sleep(_SETTLE_SECONDS)
    step()
    each: list[float] = []
    while sum(each) < _MIN_SECONDS:
        start = time.perf_counter()
        step()
        each.append(time.perf_counter() - start)
    return statistics.median(each) * 1e3


def _measure(case: Any, args: Any, densities: list[float], names: list[str], read_pass: Any, bandwidth: list[float]) -> list[Any]:
    from tqdm import tqdm

    from attnspan.cpu_runtime import bench_contenders as contenders

    made = [contenders.attnspan_contender(case, density, args.dtype) for density in densities]
    made += [contenders.baseline(name, case, args.dtype) for name in names]
    for one in made:
        for _ in range(one.copies):  # the first pass over fresh memory is slow
            one.step()
    times: list[list[float]] = [[] for _ in made]
    reads: list[float] = []
    rounds = args.rounds if case.phase == "decode" else max(3, args.rounds // 3)
    with tqdm(total=rounds * len(made), leave=False, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for turn in range(rounds):
            order = list(range(len(made)))
            for index in order if turn % 2 == 0 else reversed(order):
                reads.append(read_pass.measure())
                times[index].append(_sample(made[index].step))
                bar.update()
    bandwidth += reads
    gbs = statistics.median(reads)
    results = []
    for one, ms in zip(made, times, strict=True):
        kept = case.kv_bytes(one.kept, one.dtype)
        results.append({
            "kernel": one.kernel, "phase": case.phase, "context": case.context, "batch": case.batch, "density": one.density,
            "dtype": one.dtype, "median_ms": statistics.median(ms), "min_ms": min(ms), "all_ms": ms,
            "kept_bytes": kept, "bandwidth_gbs": gbs, "limit_ms": kept / gbs / 1e6,
        })  # fmt: skip
    _print(case, results)
    return results


def _print(case: Any, results: list[dict[str, Any]]) -> None:
    first = results[0]["median_ms"]
    print(f"\n{case.phase}, context {case.context}, batch {case.batch}, {case.heads} query heads, {case.kv_heads} KV heads, "
          f"head_dim {case.head_dim}, {case.threads} threads")  # fmt: skip
    print(f"{'kernel':20} {'density':>7} {'dtype':>5} {'ms':>10} {'limit ms':>9} {'x limit':>8} {'x first':>8}")
    for r in results:
        limit = f"{r['limit_ms']:9.2f} {r['median_ms'] / r['limit_ms']:8.2f}" if case.phase == "decode" else f"{'-':>9} {'-':>8}"
        print(f"{r['kernel']:20} {r['density']:7g} {r['dtype']:>5} {r['median_ms']:10.3f} {limit} {r['median_ms'] / first:8.2f}")

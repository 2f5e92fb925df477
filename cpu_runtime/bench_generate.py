"""`attnspan bench generate`: time to first token, time per token and memory of artefacts, side by side."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError

if TYPE_CHECKING:
    from attnspan.cpu_runtime.bench_worker import Worker
    from attnspan.runtime.artefact import Artefact

__all__ = ["register"]

_WARM_UP_TOKENS = 32


def register(subparsers: Any) -> None:
    """Add `generate` to the benchmarks."""
    parser = subparsers.add_parser(
        "generate",
        help="time to first token, time per token and memory of artefacts",
        description="Measure artefacts in turns, each in a process of its own; medians, and the share of the "
        "memory bandwidth measured in the same run.",
        allow_abbrev=False,
    )
    parser.add_argument("artefacts", metavar="DIR", type=Path, nargs="+", help="artefact folders; the first is the baseline")
    parser.add_argument("--prompt-tokens", metavar="N", type=int, default=1024, help="tokens of the prompt (1024)")
    parser.add_argument("--new-tokens", metavar="M", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--repeat", metavar="R", type=int, default=3, help="rounds (3)")
    parser.add_argument("--batch", metavar="B", type=int, default=1, help="rows, each with a prompt of its own (1)")
    parser.add_argument("--threads", metavar="T", type=int, help="threads (default: physical cores, on a GPU one less)")
    parser.add_argument("--no-library", action="store_true", help="run attention as standard ONNX: slow")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="hybrid: where all but the sampling runs (cpu)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="of one artefact, and in place of the measurement: where the time of the prompt and of a few steps goes, as a "
        "table, a Chrome trace in FILE (.json) and a picture beside it (.png)",
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="with --trace, hybrid on device cpu: near and far parts at the same time, as with a GPU; slower where cores are few",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from attnspan.cpu_runtime.bandwidth import ReadPass
    from attnspan.cpu_runtime.bench_trace import STEPS
    from attnspan.cpu_runtime.bench_worker import Worker
    from attnspan.cpu_runtime.loading import default_threads
    from attnspan.planner.files import write_whole
    from attnspan.runtime.artefact import Artefact

    _check(args)
    artefacts = [Artefact.load(folder) for folder in args.artefacts]
    new_tokens = args.new_tokens if args.trace is None else STEPS
    tokens = args.prompt_tokens + new_tokens
    for artefact in artefacts:
        if tokens > artefact.n_max:
            raise UserError(
                f"{args.prompt_tokens} prompt and {new_tokens} new tokens make {tokens}: "
                f"{artefact.folder} was built for n_max = {artefact.n_max}; change --prompt-tokens"
            )
    prompts = _prompts(args.batch, args.prompt_tokens, min(artefact.vocab_size for artefact in artefacts))
    threads = args.threads or default_threads(args.device)
    options = {"batch": args.batch, "threads": threads, "use_library": not args.no_library, "device": args.device}
    if args.trace is not None:
        if args.overlap and artefacts[0].target != "hybrid":
            raise UserError(f"{artefacts[0].folder} is of target {artefacts[0].target!r}: only 'hybrid' has near and far parts; "
                            "drop --overlap")  # fmt: skip
        return _trace(args, artefacts[0], prompts, options | {"overlap": args.overlap})
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(folder, options)) for folder in args.artefacts]
        read_pass = ReadPass(threads)
        for worker in workers:
            worker.measure([prompt[:_WARM_UP_TOKENS] for prompt in prompts], 4)
        bandwidth, runs = _measure(args, workers, prompts, read_pass)
    gbs = statistics.median(bandwidth)
    results = [
        _result(artefact, worker, mine, args, gbs) for artefact, worker, mine in zip(artefacts, workers, runs, strict=True)
    ]
    print(_table(results, gbs, threads))
    if args.json is not None:
        settings = {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "repeat", "batch")}
        report = {"settings": {**settings, "threads": threads}, "bandwidth_gbs": gbs, "results": results}
        write_whole(args.json, (json.dumps(report, indent=1) + "\n").encode("utf-8"))
    return 0


def _trace(args: argparse.Namespace, artefact: Artefact, prompts: list[list[int]], options: dict[str, Any]) -> int:
    from attnspan.cpu_runtime.bench_trace import chrome_trace, record, table
    from attnspan.cpu_runtime.bench_trace_picture import check_matplotlib, draw
    from attnspan.planner.files import write_whole

    check_matplotlib()
    runs = record(artefact, prompts, options)
    label = f"{artefact.folder}: {args.batch} x {args.prompt_tokens} tokens, {options['threads']} threads, device {args.device}"
    label += ", near and far parts in streams of their own" * args.overlap
    write_whole(args.trace, json.dumps(chrome_trace(runs, label)).encode("utf-8"))
    picture = args.trace.with_suffix(".png")
    draw(runs, picture, label)
    print(f"{table(runs)}\n{args.trace}: open it in chrome://tracing or ui.perfetto.dev; {picture}")
    return 0


def _check(args: argparse.Namespace) -> None:
    from attnspan.planner.files import check_output
    from attnspan.planner.rules import check_int

    for name, low in (("prompt_tokens", 1), ("new_tokens", 2), ("repeat", 1), ("batch", 1)):
        check_int(name, getattr(args, name), low, 2**30, f"; change --{name.replace('_', '-')}")
    if args.threads is not None:
        check_int("threads", args.threads, 1, 4096, "; change --threads")
    check_output(args.json, "--json")
    check_output(args.trace, "--trace")
    if args.overlap and (args.trace is None or args.device != "cpu" or args.no_library):
        raise UserError("--overlap is for --trace, on device cpu and with the op library: add --trace FILE, or drop --overlap")
    if args.trace is None:
        return
    if args.trace.suffix != ".json":
        raise UserError(f"the trace is {args.trace}: its name must end in .json; change --trace")
    if len(args.artefacts) != 1 or args.json is not None:
        raise UserError(f"--trace takes one artefact, and no --json: {len(args.artefacts)} artefacts are given")


def _prompts(batch: int, tokens: int, vocab_size: int) -> list[list[int]]:
    import numpy as np

    ids: list[list[int]] = np.random.default_rng(0).integers(0, vocab_size, (batch, tokens)).tolist()
    return ids


def _measure(
    args: argparse.Namespace, workers: list[Worker], prompts: list[list[int]], read_pass: Any
) -> tuple[list[float], list[list[dict[str, Any]]]]:
    """Rounds: every artefact once, every other round in reverse, a read pass before each."""
    from tqdm import tqdm

    bandwidth: list[float] = []
    runs: list[list[dict[str, Any]]] = [[] for _ in workers]
    total = args.repeat * len(workers)
    with tqdm(total=total, desc="measuring", file=sys.stderr, leave=False, disable=not sys.stderr.isatty()) as bar:
        for turn in range(args.repeat):
            order = range(len(workers)) if turn % 2 == 0 else reversed(range(len(workers)))
            for index in order:
                bandwidth.append(read_pass.measure())
                runs[index].append(workers[index].measure(prompts, args.new_tokens))
                bar.update()
    return bandwidth, runs


def _result(
    artefact: Artefact, worker: Worker, runs: list[dict[str, Any]], args: argparse.Namespace, gbs: float
) -> dict[str, Any]:
    tpot = [statistics.median(run["token_seconds"]) for run in runs]
    median_tpot = statistics.median(tpot)
    middle = args.prompt_tokens + args.new_tokens // 2
    # What sampled heads read depends on what they draw.
    kv_read = None if artefact.may_sample(middle) else args.batch * artefact.kv_bytes_in_force(middle)
    moved = None if kv_read is None else _weight_bytes(artefact) + kv_read
    return {
        "artefact": str(artefact.folder),
        "op_library": runs[0]["library"],
        "density_at_n_max": artefact.plan.density(),
        "cache_dtype": artefact.cache_dtype,
        "load_seconds": worker.load_seconds,
        "ttft_seconds": statistics.median(run["ttft"] for run in runs),
        "ttft_seconds_all": [run["ttft"] for run in runs],
        "tpot_seconds": median_tpot,
        "tpot_seconds_all": tpot,
        "tokens_per_second": args.batch / median_tpot,
        "kv_bytes": artefact.kv_bytes(args.batch),
        "dense_kv_bytes": artefact.dense_kv_bytes(args.batch),
        "index_bytes": artefact.state_bytes(args.batch),
        "kv_bytes_read_per_step": kv_read,
        "bytes_read_per_step": moved,
        "bandwidth_share": None if moved is None else moved / median_tpot / (gbs * 1e9),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def _weight_bytes(artefact: Artefact) -> int:
    """Bytes of weights that a decode step reads: the whole file, less an embedding table of its own."""
    weights = sum(int(artefact.info["files"].get(name, {}).get("bytes", 0)) for name in ("model.onnx", "model.onnx.data"))
    config = artefact.config
    if not config.get("tie_word_embeddings", True) and isinstance(config.get("hidden_size"), int):
        weights -= artefact.vocab_size * int(config["hidden_size"]) * (4 if artefact.dtype == "float32" else 2)
    return weights


def _table(results: list[dict[str, Any]], gbs: float, threads: int) -> str:
    head = [
        "artefact",
        "first token s",
        "ms/token",
        "tokens/s",
        "against first",
        "KV MB",
        "dense KV MB",
        "index MB",
        "peak RSS MB",
        "bandwidth",
    ]
    rows = [
        [
            result["artefact"],
            f"{result['ttft_seconds']:.3f}",
            f"{result['tpot_seconds'] * 1e3:.2f}",
            f"{result['tokens_per_second']:.1f}",
            f"{results[0]['tpot_seconds'] / result['tpot_seconds']:.2f}x",
            f"{result['kv_bytes'] / 1e6:.1f}",
            f"{result['dense_kv_bytes'] / 1e6:.1f}",
            f"{result['index_bytes'] / 1e6:.1f}",
            f"{result['peak_rss_bytes'] / 1e6:.0f}",
            "-" if result["bandwidth_share"] is None else f"{result['bandwidth_share']:.0%}",
        ]
        for result in results
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in [head, *rows]
    ]
    note = (
        f"medians; bandwidth: share that reading the weights and the KV in force once a step has of "
        f"{gbs:.1f} GB/s, measured with {threads} threads; -: sampled heads, which read what they draw"
    )
    return "\n".join([*lines, note])

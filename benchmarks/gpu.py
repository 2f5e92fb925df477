"""Checks every GPU kernel against an fp32 reference, then measures it beside PyTorch's, on a machine with an NVIDIA GPU.

    python benchmarks/gpu.py [--plan plan.json] [--hybrid DIR] [--budget 480] [-o DIR]
    python benchmarks/gpu.py --dry-run      the same on tiny shapes, on a CPU under Triton's interpreter: times mean nothing

Runs from a checkout: needs torch, triton and numpy, no installation; --hybrid needs onnxruntime-gpu and the op library for it
(ATTNSPAN_ORT_CUDA), too, and says so where they are missing. Writes gpu-<name of the GPU>.json, after every case, so that
a run that is cut short leaves what it measured, and prints the tables. Exit status: 0; 1 when a kernel is wrong or fails; 2 for a
mistake; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import gpu_env

if TYPE_CHECKING:
    from gpu_cases import Case

BUDGET = 480.0
KERNELS = {
    "span_prefill": "span_prefill",
    "span_decode": "span_decode",
    "ring_update": "ring_update",
    "lsh_hash": "lsh_hash",
    "merge": "merge",
}
PACKAGE = "attnspan.plugins.trt_sparse_attn.kernels"


class MistakeError(Exception):
    """Of the user: one line, exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MistakeError(f"{message}; see --help")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = _Parser(prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, under Triton's interpreter")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="start nothing that would not fit (480)")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a plan.json: measure its layer of median size, too")
    parser.add_argument("--hybrid", type=Path, metavar="DIR", help="an artefact of target hybrid: compare CUDA with the CPU, too")
    parser.add_argument("--only", metavar="PHASES", help="of checks, hybrid, decode, prefill, chunk, small, with commas (all)")
    parser.add_argument("--seed", type=int, default=0, help="of tensors and made-up plans (0)")
    parser.add_argument("-o", "--output", type=Path, default=Path("."), metavar="DIR", help="folder of the results (.)")
    args = parser.parse_args(argv)
    phases = ("checks", "hybrid", "decode", "prefill", "chunk", "small")
    args.only = set(phases if args.only is None else args.only.split(","))
    for word in sorted(args.only - set(phases)):
        raise MistakeError(f"--only holds '{word}'; allowed are {', '.join(phases)}")
    if not args.budget > 0:
        raise MistakeError(f"--budget is {args.budget:g}; allowed are seconds above 0")
    if args.seed < 0:
        raise MistakeError(f"--seed is {args.seed}; allowed is 0 or more")
    if not args.output.is_dir():
        raise MistakeError(f"-o is {args.output}; allowed is a folder that exists")
    return args


def plan_spans(path: Path, contexts: tuple[int, ...]) -> tuple[dict[int, Any], int, int]:
    """Spans of the plan's layer of median size at each context that it reaches: ({context: [kv_heads]}, heads, head_dim)."""
    from attnspan.planner.errors import UserError
    from attnspan.planner.plan import Plan

    try:
        plan = Plan.load(path)
    except UserError as error:
        raise MistakeError(str(error)) from None
    found = {}
    for context in contexts:
        if context <= plan.n_max:
            spans = plan.spans(context)
            found[context] = spans[spans.sum(1).argsort()[len(spans) // 2]]
    if not found:
        raise MistakeError(f"--plan has n_max {plan.n_max}; allowed is {min(contexts)} at least")
    return found, plan.model.heads, plan.model.head_dim or 128


class Run:
    """One run: what is left of its time, what it found, and the file that holds it."""

    def __init__(self, args: argparse.Namespace, machine: dict[str, Any]) -> None:
        self.args, self.started = args, time.monotonic()
        self.path = args.output / f"gpu-{machine['name']}.json"
        self.longest: dict[str, float] = {}
        self.result: dict[str, Any] = {
            "machine": machine, "budget_seconds": args.budget, "seed": args.seed, "seconds": 0.0, "copy_bytes_per_second": None,
            "checks": [], "hybrid": None, "records": [], "targets": [], "notes": [],
            "failed": [], "not_run": [],
        }  # fmt: skip

    def item(self, phase: str, name: str, work: Callable[[], None]) -> None:
        """Do `work` unless it would not fit: it is taken to last as long as the longest of its phase so far."""
        if phase not in self.args.only:
            return
        began = time.monotonic()
        if began - self.started + self.longest.get(phase, 0.0) > self.args.budget:
            self.result["not_run"].append(name)
            return
        print(f"{began - self.started:6.1f} s  {name}", file=sys.stderr, flush=True)
        try:
            work()
        except Exception as error:  # one kernel that does not launch must not cost the rest of a rented machine's time
            lines = str(error).splitlines() or [""]
            self.result["failed"].append(f"{name}: {type(error).__name__}: {lines[0][:300]}")
        self.longest[phase] = max(self.longest.get(phase, 0.0), time.monotonic() - began)
        self.save()

    def save(self) -> None:
        """Write the results so far, whole."""
        from attnspan.planner.files import write_whole

        self.result["seconds"] = time.monotonic() - self.started
        write_whole(self.path, (json.dumps(self.result, indent=1) + "\n").encode())


def run(args: argparse.Namespace) -> int:
    """Everything, in order: checks, copy bandwidth, the cases that matter most, the small kernels, the rest."""
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    gpu_env.make_importable()
    try:
        import gpu_cases
        import gpu_checks
        import gpu_measure
        import gpu_report
        import gpu_timing
        import torch
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        raise MistakeError(f"{error.name} is not installed; torch, triton and numpy are needed") from None
    if not args.dry_run and not torch.cuda.is_available():
        raise MistakeError("no NVIDIA GPU here; run on a machine that has one, or add --dry-run")
    device = torch.device("cpu" if args.dry_run else "cuda")
    cases: list[Case] = gpu_cases.cases(args.dry_run)
    if args.plan is not None:
        spans, heads, dim = plan_spans(args.plan, (256,) if args.dry_run else (4096, 32768, 131072))
        cases = gpu_cases.plan_cases(spans, heads, dim, (1,) if args.dry_run else (8, 1)) + cases
    kernels = SimpleNamespace(
        **{name: getattr(importlib.import_module(f"{PACKAGE}.{module}"), name) for name, module in KERNELS.items()}
    )
    this = Run(args, gpu_env.machine(device))
    result = this.result

    def check(work: Callable[[], list[dict[str, Any]]]) -> None:
        result["checks"] += work()

    for name, work in gpu_checks.checks(device, kernels, args.dry_run):
        this.item("checks", f"check {name}", partial(check, work))
    if args.hybrid is not None:
        this.item("hybrid", f"hybrid {args.hybrid}", lambda: hybrid(args, result))
    watch = gpu_timing.Stopwatch(device)
    size = 1 << 20 if args.dry_run else min(2 << 30, torch.cuda.get_device_properties(device).total_memory // 8)
    copy = result["copy_bytes_per_second"] = gpu_timing.copy_bandwidth(watch, size)

    def measure(case: Case) -> None:
        try:
            records, missing = gpu_measure.measure(case, watch, kernels, copy, args.seed)
        except (gpu_measure.MemoryShortageError, torch.OutOfMemoryError) as error:
            result["notes"].append(f"not measured: {case.label()}: {str(error).splitlines()[0]}")
            return
        finally:
            if watch.cuda:
                torch.cuda.empty_cache()
        result["records"] += records
        result["notes"] += [note for note in missing if note not in result["notes"]]
        result["targets"] = gpu_report.targets(result["records"]) if watch.cuda else []

    def small() -> None:
        result["records"] += gpu_measure.measure_small(watch, kernels, copy, args.dry_run)

    this.item("small", "ring_update, merge, lsh_hash", small)
    for case in cases:
        this.item(case.phase, case.label(), partial(measure, case))
    this.save()
    print(gpu_report.markdown(result), end="")
    print(f"\n{this.path}", file=sys.stderr)
    return 0 if all(c["ok"] for c in result["checks"]) and not result["failed"] else 1


def hybrid(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Compare an artefact's tokens, or note why they cannot be compared here."""
    import gpu_hybrid

    from attnspan.planner.errors import UserError

    try:
        found = gpu_hybrid.check(args.hybrid, args.output)
    except UserError as error:
        result["notes"].append(f"not compared: {args.hybrid}: {error}")
        return
    result["hybrid"] = found
    result["checks"].append({name: found[name] for name in ("kernel", "case", "error", "limit", "ok")})


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    try:
        return run(arguments(argv))
    except MistakeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

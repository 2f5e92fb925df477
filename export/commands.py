"""The verb `attnspan export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError

if TYPE_CHECKING:
    from attnspan.export.pipeline import Exported

TARGETS = ("cpu",)
VERIFY_TOKENS = 3072


def register(subparsers: Any) -> None:
    """Add the verb to the command line `attnspan`."""
    parser = subparsers.add_parser(
        "export",
        help="turn a model and a plan into an artefact that runs",
        description="Write an artefact folder: ONNX model, weights, plan, tokenizer, op library; verified against PyTorch.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder, .gguf file or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="artefact folder to write")
    parser.add_argument("--target", default="cpu", help="where it will run: cpu (default)")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="what each head keeps (see `attnspan plan`)")
    parser.add_argument("--density", type=float, help="without --plan: every head keeps this share of the text (default 0.5)")
    parser.add_argument("--n-max", type=int, metavar="N", help="longest text in tokens (default: the plan's, else at most 8192)")
    parser.add_argument("--cache-dtype", default="bf16", help="type of the KV cache: bf16 (default), fp16 or fp32")
    parser.add_argument("--dtype", default="fp32", help="type the model computes in: fp32 (default)")
    parser.add_argument("--num-layers", type=int, metavar="N", help="the first N layers only, for a trial")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it is an artefact")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the artefact with PyTorch")
    parser.add_argument(
        "--verify-tokens",
        type=int,
        default=VERIFY_TOKENS,
        metavar="N",
        help=f"length of the longest text to compare (default {VERIFY_TOKENS})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, then print the files, the size of the KV cache and the cost of each stage."""
    from attnspan.cpu_runtime.library import library_path
    from attnspan.export.pipeline import Options, export_model

    if args.target not in TARGETS:
        raise UserError(f"--target is {args.target!r}; must be one of {', '.join(TARGETS)}")
    if args.dtype != "fp32":
        raise UserError(f"--dtype is {args.dtype!r}; target cpu computes in fp32")
    done = export_model(
        Options(
            model=args.model,
            out=args.out,
            plan=args.plan,
            density=args.density,
            n_max=args.n_max,
            cache_dtype=args.cache_dtype,
            num_layers=args.num_layers,
            library=library_path(),
            overwrite=args.overwrite,
            verify_tokens=None if args.no_verify else args.verify_tokens,
        )
    )
    print(summary(done, args.cache_dtype))
    return 0


def summary(done: Exported, cache_dtype: str) -> str:
    """What was written, what it costs and how long it took, as text."""
    from attnspan.export.verify import text
    from attnspan.planner.cost import allocated_bytes, dense_slots, format_bytes, slot_bytes, state_bytes

    plan = done.plan
    each = slot_bytes(plan, cache_dtype)
    dense = None if each is None else each * dense_slots(plan, plan.n_max)
    kept = allocated_bytes(plan, cache_dtype)
    lines = [f"{done.folder}: {plan.model.id} for {done.description['target']}, up to {plan.n_max} tokens"]
    lines += [f"  {name:24} {format_bytes(file['bytes']):>10}" for name, file in done.description["files"].items()]
    lines += [f"KV cache of one text of {plan.n_max} tokens ({cache_dtype}): {format_bytes(kept)}, dense {format_bytes(dense)}"]
    if state_bytes(plan) != 0:
        lines.append(f"indexes of sampled heads of one text of {plan.n_max} tokens: {format_bytes(state_bytes(plan))}")
    if "verify" in done.description:
        lines.append(text(done.description["verify"]))
    lines += [f"{'stage':14} {'seconds':>8} {'peak memory':>12}"]
    lines += [f"{x.name:14} {x.seconds:8.1f} {format_bytes(x.peak_rss):>12}" for x in done.stages]
    return "\n".join(lines)

"""The verbs `attnspan plan` (uniform, lsh, import) and `attnspan inspect`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from attnspan.planner.errors import UserError
from attnspan.planner.shape import ModelShape

if TYPE_CHECKING:
    from attnspan.planner.plan import Plan

Subparsers = argparse._SubParsersAction  # argparse has no public name for it
N_MAX = 8192


def _read_config(model: str) -> tuple[ModelShape, int | None]:
    return ModelShape.from_config(model), None


def register(
    subparsers: Subparsers[argparse.ArgumentParser],
    read_model: Callable[[str], tuple[ModelShape, int | None]] = _read_config,
) -> Subparsers[argparse.ArgumentParser]:
    """Add the verbs of the planner to a command line; each sets `run`, a function of the parsed arguments.

    `read_model` reads the shape of what `--model` names, and the longest text it was made for in tokens, if known; a program that
    knows more formats than config.json passes its own. Returns the subparsers of `plan`, for kinds of plans that need a model.
    """
    plan = subparsers.add_parser("plan", help="make a plan: what every KV head keeps", allow_abbrev=False, description=_PLAN)
    kinds = plan.add_subparsers(dest="kind", metavar="KIND", required=True)
    from attnspan.planner import lsh_command

    for parser in (_register_uniform(kinds), lsh_command.register(kinds), _register_import(kinds)):
        parser.set_defaults(read_model=read_model)
    _register_inspect(subparsers)
    return kinds


_PLAN = "Make a plan file: one rule per KV head that says how many tokens it keeps at each sequence length."


def _register_uniform(kinds: Subparsers[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        "uniform",
        help="the same density for every head, no calibration",
        description="Write a plan where every KV head keeps the same share of the sequence.",
        allow_abbrev=False,
    )
    parser.add_argument("--density", type=float, required=True, help="share of tokens kept, in (0, 1]")
    parser.add_argument(
        "--spread",
        type=float,
        default=0.0,
        help="space the KV heads of each layer evenly over density - SPREAD to density + SPREAD (default 0)",
    )
    add_shape(parser, layers=True)
    parser.set_defaults(run=run_uniform)
    return parser


def _register_import(kinds: Subparsers[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        "import",
        help="a plan published with MoA (alphas and betas per query head)",
        description="Read a published MoA plan (moa_alpha_beta.json) and fold its query heads to KV heads.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="moa_alpha_beta.json or alike")
    parser.add_argument(
        "--fold",
        default="max",
        metavar="{max,mean}",
        help="rule of a group of query heads: that of the member that keeps most, or the mean (default max)",
    )
    add_shape(parser)
    parser.set_defaults(run=run_import)
    return parser


def add_shape(parser: argparse.ArgumentParser, layers: bool = False) -> None:
    """Add the options that say what model a plan is for, how long its texts get and where the plan goes."""
    if layers:
        parser.add_argument("--layers", type=int, help="layers of the model, when there is no --model")
    parser.add_argument("--model", metavar="MODEL", help="take the shape from this Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--heads", type=int, help="query heads a layer")
    parser.add_argument("--kv-heads", type=int, help="KV heads a layer")
    parser.add_argument("--head-dim", type=int, help="size of a head; without it no bytes are known")
    parser.add_argument("--n-max", type=int, help=f"longest sequence (default {N_MAX}, or what the model was made for if less)")
    parser.add_argument("-o", "--output", type=Path, default=Path("plan.json"), metavar="FILE", help="default plan.json")


def _register_inspect(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what a plan keeps: table, density by length, heat map",
        description="Print what a plan keeps and costs, and draw the span of every KV head as a PNG.",
        allow_abbrev=False,
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan.json, or the folder that holds it")
    parser.add_argument("--n", type=int, nargs="+", metavar="N", help="context lengths (default 2048, 4096 ...)")
    parser.add_argument("--cache-dtype", help="fp32, fp16, bf16 or int8 (default: what the plan was made for, else bf16)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    png = parser.add_mutually_exclusive_group()
    png.add_argument("--png", type=Path, metavar="FILE", help="heat map (default: beside the plan, plan.png)")
    png.add_argument("--no-png", action="store_true", help="draw no heat map")
    parser.set_defaults(run=run_inspect)


def _shape_from_model(args: argparse.Namespace) -> ModelShape | None:
    """The shape of `--model`, None without one; `--n-max` gets its default."""
    shape: ModelShape
    limit: int | None = None
    if args.model is not None:
        shape, limit = args.read_model(args.model)
    if args.n_max is None:
        args.n_max = min(N_MAX, limit or N_MAX)
    if args.model is None:
        return None
    for name in ("layers", "heads", "kv_heads", "head_dim"):
        given, real = getattr(args, name, None), getattr(shape, name)
        if given is not None and given != real:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is {given}: {args.model} has {real}; drop {option}, or change --model")
    return shape


def read_shape(args: argparse.Namespace) -> ModelShape:
    """The shape that the options of `add_shape` with layers describe; `--n-max` gets its default."""
    shape = _shape_from_model(args)
    if shape is None:
        _need(args, "layers", "heads", "kv_heads")
        shape = ModelShape("unknown", args.layers, args.heads, args.kv_heads, args.head_dim)
    return shape


def _need(args: argparse.Namespace, *names: str) -> None:
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is None]
    if missing:
        raise UserError(f"the shape of the model is unknown: give --model DIR, or {' '.join(missing)}")


def run_uniform(args: argparse.Namespace) -> int:
    """`attnspan plan uniform`: write a plan with the same density for every head."""
    from attnspan.planner.uniform import uniform

    return write(uniform(read_shape(args), args.density, args.n_max, args.spread), args.output)


def run_import(args: argparse.Namespace) -> int:
    """`attnspan plan import`: write the plan that a published MoA file means, and say what folding cost."""
    from attnspan.planner.importers import import_moa

    shape = _shape_from_model(args)
    if shape is None:
        _need(args, "heads", "kv_heads")
        plan, report = import_moa(args.file, args.heads, args.kv_heads, args.fold, args.n_max, head_dim=args.head_dim)
    else:
        plan, report = import_moa(
            args.file,
            shape.heads,
            shape.kv_heads,
            args.fold,
            args.n_max,
            head_dim=shape.head_dim,
            model_id=shape.id,
            config_hash=shape.config_hash,
        )
        plan.check_model(shape)
    print("\n".join(report.lines()))
    return write(plan, args.output)


def write(plan: Plan, output: Path) -> int:
    """Save a plan and print what it keeps; the exit status."""
    from attnspan.planner.cost import allocated_bytes, dense_slots, format_bytes, index_table, slot_bytes, state_bytes

    plan.save(output)
    print(f"{output}: {plan.model.id}, {plan.model.layers} layers, {plan.model.kv_heads} KV heads", end=", ")
    print(f"density {plan.density():.3f} at {plan.n_max} tokens")
    each = slot_bytes(plan, "bf16")
    if each is not None:
        kept, dense = allocated_bytes(plan, "bf16"), each * dense_slots(plan, plan.n_max)
        print(f"KV cache of one sequence (bf16): {format_bytes(kept)}, dense {format_bytes(dense)}")
    for index in index_table(plan):
        size = index["bytes_per_token"]
        shown = "bytes unknown without --head-dim" if size is None else f"{size:g} B a token and KV head"
        print(f"index {index['index']}: {index['kv_heads']} KV heads, {shown}")
    if state_bytes(plan):
        print(f"indexes of one sequence: {format_bytes(state_bytes(plan))}")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """`attnspan inspect`: print what a plan keeps and draw its heat map."""
    from attnspan.planner.heatmap import heat_map
    from attnspan.planner.inspect import summarise, table
    from attnspan.planner.plan import Plan

    file = args.plan / "plan.json" if args.plan.is_dir() else args.plan
    plan = Plan.load(file)
    summary = summarise(plan, args.n, args.cache_dtype)
    png = None if args.no_png else args.png or file.with_suffix(".png")
    if png is not None:
        heat_map(plan, png)
    if args.json:
        print(json.dumps(summary | {"png": None if png is None else str(png)}, indent=2))
        return 0
    print(table(summary))
    if png is not None:
        print(f"\nheat map: {png}")
    return 0

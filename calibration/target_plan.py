"""`attnspan plan CALIBRATION --target hybrid`: each KV head a span, dense or sampled, under memory, reads and time."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole
from attnspan.planner.limits import TARGETS
from attnspan.planner.lsh_grid import FRACTIONS, INDEXES
from attnspan.planner.rules import MODES, check_int

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnspan.calibration.folder import Calibration
    from attnspan.planner.choices import Choices
    from attnspan.planner.limits import Limits
    from attnspan.planner.plan import Plan
    from attnspan.planner.rules import HeadRule, LshParams

__all__ = ["OPTIONS", "register_target", "run_target"]

ITEMS = 6
"""Of each length that sampling is measured on."""
OPTIONS = ("gpu_kv", "cpu_kv", "kv", "read", "ms_per_token", "other_ms", "lsh_cost_table", "kinds", "index", "fractions",
           "sampling_items")  # fmt: skip
"""Options that only a target gives a meaning."""
LONGEST = 200
"""Bytes of a folder's name; file systems allow some 255."""


def register_target(parser: argparse.ArgumentParser) -> None:
    """Add the options of plans with sampled heads."""
    group = parser.add_argument_group("spans, dense and sampled heads (one or more bounds; they hold together)")
    group.add_argument("--target", help=f"{' or '.join(TARGETS)}: choose a kind for each KV head; without it, spans only")
    group.add_argument("--gpu-kv", metavar="SIZE", help="hybrid: caches of one sequence on the GPU, such as 2GiB")
    group.add_argument("--cpu-kv", metavar="SIZE", help="hybrid: caches and indexes of sampled heads on the CPU")
    group.add_argument("--kv", metavar="SIZE", help="cpu: caches and indexes of one sequence")
    group.add_argument(
        "--read", metavar="SHARE[@N]", help="bytes of keys, values and indexes a token reads, of dense ones, such as 5%%@8192"
    )
    group.add_argument(
        "--ms-per-token",
        metavar="T[@N]",
        help="time of a token at N tokens (default n_max); needs --cost-table, --lsh-cost-table",
    )
    group.add_argument("--other-ms", type=float, metavar="T", help="of it, what is not attention (default 0)")
    group.add_argument("--lsh-cost-table", metavar="FILE", help="figures of attnspan bench lsh --json FILE")
    group.add_argument("--kinds", help=f"kinds that heads may have: {','.join(MODES)} (default)")
    group.add_argument("--index", help=f"kinds of index: {','.join(INDEXES)} (default)")
    shown = ",".join(f"{f:g}" for f in FRACTIONS)
    group.add_argument("--fractions", help=f"of sketches (default {shown})")
    group.add_argument(
        "--sampling-items", type=int, metavar="N", help=f"documents of each length that sampling is measured on (default {ITEMS})"
    )


def run_target(args: argparse.Namespace, cal: Calibration, n_max: int, spans: Sequence[HeadRule], max_rules: int | None) -> int:
    """Measure what is not measured yet, choose, and write the plan."""
    from attnspan.planner.choices import check_kinds
    from attnspan.planner.lsh_grid import lsh_grid
    from attnspan.planner.unified import plans_by_kinds

    kinds = check_kinds(MODES if args.kinds is None else args.kinds.split(","))
    indexes = INDEXES if args.index is None else tuple(args.index.split(","))
    _check_meaning(args, kinds, indexes)
    limits = _limits(args, n_max)
    limits.check_lengths(n_max)  # before anything is measured
    candidates: tuple[LshParams, ...] = ()
    if "lsh" in kinds:
        fractions = FRACTIONS if args.fractions is None else _numbers(args.fractions, "--fractions")
        candidates = _timed(lsh_grid(indexes, fractions), limits, args)
    choices = _choices(args, cal, n_max, spans, candidates)
    plans = plans_by_kinds(choices, limits, None if args.kinds is None else kinds, max_rules)
    options = {k: v for k, v in vars(args).items() if isinstance(v, str | int | float) and k not in ("verb", "kind")}
    told = cal.provenance() | {"options": options}
    _write(args, cal, {name: replace(p, provenance=told | dict(p.provenance)) for name, p in plans.items()})
    return 0


def _check_meaning(args: argparse.Namespace, kinds: Sequence[str], indexes: Sequence[str]) -> None:
    """UserError for an option that others leave without a meaning."""
    needs = [
        ("lsh among --kinds", "lsh" in kinds, ("index", "fractions", "sampling_items", "lsh_cost_table")),
        ("sketch among --index", "sketch" in indexes, ("fractions",)),
        ("--ms-per-token", args.ms_per_token is not None, ("other_ms", "cost_table", "lsh_cost_table")),
    ]
    for what, there, options in needs:
        for name in options:
            value = getattr(args, name)
            if value is not None and not there:
                raise UserError(f"--{name.replace('_', '-')} is {value}, which needs {what}; add it, or drop the option")


def _limits(args: argparse.Namespace, n_max: int) -> Limits:
    from attnspan.planner.decode_cost import DecodeCost
    from attnspan.planner.limits import Limits
    from attnspan.planner.lsh_cost import LshCost

    sizes = {name: read_size(getattr(args, name), f"--{name.replace('_', '-')}") for name in ("gpu_kv", "cpu_kv", "kv")}
    read = {} if args.read is None else dict([at_length(args.read, n_max, "--read", _share, "5%@8192")])
    ms = {} if args.ms_per_token is None else dict([at_length(args.ms_per_token, n_max, "--ms-per-token", float, "60@8192")])
    decode = None if args.cost_table is None else DecodeCost.load(args.cost_table, args.cache_dtype)
    threads = None if decode is None else decode.threads
    return Limits(
        **sizes,
        read=read,
        milliseconds=ms,
        other_ms=args.other_ms or 0.0,
        target=args.target,
        cache_dtype=args.cache_dtype,
        decode_cost=decode,
        lsh_cost={} if args.lsh_cost_table is None else LshCost.load(args.lsh_cost_table, args.cache_dtype, threads),
    )


def _timed(candidates: tuple[LshParams, ...], limits: Limits, args: argparse.Namespace) -> tuple[LshParams, ...]:
    """Those whose times are known, where time is bounded. UserError when none is, or none of an index that was asked for."""
    from attnspan.planner.lsh_cost import timed_as

    if not limits.milliseconds:
        return candidates
    if args.lsh_cost_table is None:
        raise UserError(
            "--ms-per-token bounds sampled heads, too: give --lsh-cost-table, or leave them out with --kinds span,dense"
        )
    timed = tuple(each for each in candidates if timed_as(each) in limits.lsh_cost)
    wanted = {each.index for each in candidates} if args.index is not None else set()
    if not timed or wanted - {each.index for each in timed}:
        known, needed = ", ".join(limits.lsh_cost), ", ".join(dict.fromkeys(timed_as(each) for each in candidates))
        raise UserError(
            f"{args.lsh_cost_table} has times of {known}: of each index it must have some of {needed}; measure them with "
            "bench lsh, or change --index"
        )
    return timed


def _choices(
    args: argparse.Namespace, cal: Calibration, n_max: int, spans: Sequence[HeadRule], candidates: Sequence[LshParams]
) -> Choices:
    from attnspan.calibration.choices import FOLDER, load_choices
    from attnspan.calibration.sampling_profile import ItemSampling

    if candidates:
        items = _items(cal, ITEMS if args.sampling_items is None else args.sampling_items)
        files = [cal.folder / FOLDER / f"{item.id}.npz" for item in items]
        if any(ItemSampling.missing(file, candidates) for file in files):
            _measure(args, cal, items, candidates)
        items_known = [item.id for item in items]
    else:
        items_known = []
    return load_choices(cal.folder, n_max, spans, candidates, items_known)


def _items(cal: Calibration, count: int) -> list[Any]:
    """The first items of every length at which a step samples; of the longest, if there is none."""
    from attnspan.planner.lsh_grid import DENSE_BELOW

    check_int("sampling items", count, 1, 10**6, "; change --sampling-items")
    lengths = [n for n in cal.lengths if n > min(DENSE_BELOW.values())] or [max(cal.lengths)]
    items = cal.calibration_items()
    return [item for n in lengths for item in [each for each in items if each.length == n][:count]]


def _measure(args: argparse.Namespace, cal: Calibration, items: Sequence[Any], candidates: Sequence[LshParams]) -> None:
    import torch

    from attnspan.calibration.choices import FOLDER
    from attnspan.calibration.loading import load_model, read_shape
    from attnspan.calibration.sampling import sample_items

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if read_shape(cal.model).config_hash != cal.shape.config_hash:
        raise UserError(f"{cal.model} has changed since {cal.folder} was made; calibrate again")
    model, _ = load_model(cal.model, cal.dtype, args.device)
    sample_items(model, items, candidates, cal.folder / FOLDER, cal.seed)


def _write(args: argparse.Namespace, cal: Calibration, plans: dict[str, Plan]) -> None:
    """The plan of all kinds, and those of fewer beside the other candidates of the folder."""
    from attnspan.planner.unified_text import lines

    name, plan = list(plans.items())[-1]
    folder = cal.folder / "plans" / folder_name(args)
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(args.output)
    rows = []
    for each, p in plans.items():
        p.save(folder / f"{each}.json")
        rows.append({"name": each, "predicted_loss": {str(n): x for n, x in p.predicted_loss.items()}, "gap": p.solver_gap})
    write_whole(folder / "candidates.json", (json.dumps(rows, indent=2) + "\n").encode())
    lengths = list(plan.predicted_loss)
    print(f"{'kinds':16}" + "".join(f"{f'loss@{n}':>12}" for n in lengths) + f"{'gap':>8}   nats a token, predicted")
    for each, p in plans.items():
        print(f"{each:16}" + "".join(f"{p.predicted_loss[n]:12.4g}" for n in lengths) + f"{p.solver_gap or 0:8.2%}"
              + ("  <- written" if each == name else ""))  # fmt: skip
    print("\n".join(f"{args.output}: {line}" for line in lines(plan)))
    if args.target == "hybrid" and args.ms_per_token is not None:
        print(
            "--ms-per-token counts all attention as target cpu computes it, which both tables time: a GPU's share was not timed"
        )


def folder_name(args: argparse.Namespace) -> str:
    """Of a set of candidates: a hash of all options that make it, and those of them that are short, which reports tell."""
    names = ("target", *OPTIONS, "n_max", "cache_dtype", "grid", "alphas", "betas")
    made_of = {each: str(getattr(args, each)) for each in (*names, "cost_table", "max_rules_per_layer")}
    out = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    for word in (f"_{each}={made_of[each]}".replace("/", "_") for each in names if getattr(args, each) is not None):
        out += word if len(os.fsencode(out + word)) <= LONGEST else ""
    return out


def read_size(text: str | None, option: str) -> float | None:
    """Bytes of 512MB, 2GiB ...; UserError when it is no size."""
    if text is None:
        return None
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "B": 1}
    try:
        for unit, size in units.items():
            if text.endswith(unit):
                return float(text[: -len(unit)]) * size
        return float(text)
    except ValueError:
        raise UserError(f"{option} is {text!r}: must be a size such as 512MB or 2GiB") from None


def at_length(text: str, n_max: int, option: str, read: Any, example: str) -> tuple[int, float]:
    """`VALUE[@N]`, N being n_max without one."""
    value, _, n = text.partition("@")
    try:
        return (int(n) if n else n_max), read(value)
    except ValueError:
        raise UserError(f"{option} is {text!r}: must be a value, perhaps with @ and a length, such as {example}") from None


def _share(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {text!r}: must be numbers with commas between") from None

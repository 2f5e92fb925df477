"""`attnspan plan CALIBRATION`: candidates from the optimiser and from rounds with a plan in force, validated, the best kept."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.calibration import target_plan
from attnspan.calibration.target_plan import at_length, read_size
from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole
from attnspan.planner.rules import check_int, check_number

if TYPE_CHECKING:
    from attnspan.calibration.candidates import Maker
    from attnspan.calibration.folder import Calibration
    from attnspan.calibration.item_profile import ItemProfile
    from attnspan.calibration.validate import Scores
    from attnspan.planner.budget import Budget
    from attnspan.planner.plan import Plan
    from attnspan.planner.rules import HeadRule

KIND = "calibrated"
GRIDS = ("reference", "fine", "proportional")
_SEARCH = {"points": 3, "rounds": 2, "ablate": 0, "search": 0}
"""Options of the search among spans, and their defaults."""
SHORT = 16384
"""Contexts below this get the fine grid by default: the reference's steps of 1024 tokens are half of 2k."""


def register_plan(kinds: Any) -> None:
    """Add the kind to `attnspan plan`; the program takes a folder there for this kind."""
    parser = kinds.add_parser(
        KIND,
        help="from a calibration folder; the word may be left out",
        description="Choose one rule per KV head under a budget, from a calibration folder. Candidates are validated on held-out "
        "documents and the best is written; an interrupted run goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("calibration", type=Path, metavar="DIR", help="folder of attnspan calibrate")
    budget = parser.add_argument_group("budget (one or more; bounds hold together)")
    budget.add_argument("--density", type=float, help="share of the cache kept, at every profiled length and at n_max")
    budget.add_argument(
        "--kv-bytes", metavar="SIZE[@N]", help="KV cache of one sequence of N tokens (default n_max), such as 512MB@32768"
    )
    budget.add_argument(
        "--milliseconds", metavar="T[@N]", help="attention of one generated token at N tokens; needs --cost-table"
    )
    budget.add_argument("--cost-table", type=Path, metavar="FILE", help="figures of attnspan bench attention --json FILE")
    budget.add_argument("--cache-dtype", default="bf16", help="fp32, fp16, bf16 (default) or int8")
    target_plan.register_target(parser)
    rules = parser.add_argument_group("rules")
    rules.add_argument("--n-max", type=int, help="longest sequence (default: what the model was made for)")
    rules.add_argument("--grid", help=f"{', '.join(GRIDS)} (default: fine below {SHORT} tokens, else reference)")
    rules.add_argument("--alphas", help="own grid: tokens, with commas")
    rules.add_argument("--betas", help="own grid: shares of the length, with commas")
    rules.add_argument(
        "--max-rules-per-layer", metavar="K", help="distinct rules of a layer, or none (default 2; none with --target)"
    )
    search = parser.add_argument_group("search")
    search.add_argument("--estimator", default=None, help="entry, joint, joint_positive or joint_absolute (default)")
    search.add_argument("--points", type=int, help="points of the Pareto front per length (default 3)")
    search.add_argument("--rounds", type=int, help="profiles with the plan in force (default 2)")
    search.add_argument("--ablate", type=int, metavar="HEADS", help="measure so many of the most sensitive heads (default 0)")
    search.add_argument("--search", type=int, metavar="TRIALS", help="swaps tried on the measured answer loss (default 0)")
    search.add_argument(
        "--no-validate", action="store_true", help="take the balanced plan; the model is not needed without rounds"
    )
    search.add_argument("--seed", type=int, default=0, help="of the search (default 0)")
    search.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    search.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("-o", "--output", type=Path, default=Path("plan.json"), metavar="FILE", help="default plan.json")
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    """Make a plan from a calibration folder."""
    from attnspan.calibration.estimators import DEFAULT, ESTIMATORS
    from attnspan.calibration.folder import Calibration
    from attnspan.calibration.item_profile import ItemProfile

    if args.threads is not None:
        check_int("threads", args.threads, 1, 4096, "; change --threads")
    if args.target is not None:
        return _run_target(args)
    for name in target_plan.OPTIONS:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} needs --target: hybrid or cpu; add it, or drop the option")
    for name, value in _SEARCH.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.max_rules_per_layer = args.max_rules_per_layer or "2"
    for name, most in (("rounds", 100), ("ablate", 2**20), ("search", 10**6)):
        check_int(f"--{name}", getattr(args, name), 0, most)
    args.estimator = args.estimator or DEFAULT
    if args.estimator not in ESTIMATORS:
        raise UserError(f"estimator is {args.estimator!r}: must be one of {', '.join(ESTIMATORS)}; change --estimator")
    cal = Calibration.load(args.calibration)
    maker = _maker(args, cal)
    maker.rows()  # an infeasible budget is found before anything is run
    dense = [ItemProfile.load(file) for file in cal.profiles()]
    return _write(args, cal, maker, _candidates(args, cal, maker, dense))


def _run_target(args: argparse.Namespace) -> int:
    """Spans, dense and sampled heads under one budget."""
    from attnspan.calibration.folder import Calibration

    for name in ("density", "kv_bytes", "milliseconds", "estimator", *_SEARCH):
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} does not go with --target {args.target}: bounds are --gpu-kv, --cpu-kv, --kv, "
                "--read and --ms-per-token, and nothing is searched; drop it"
            )
    args.max_rules_per_layer = args.max_rules_per_layer or "none"
    cal = Calibration.load(args.calibration)
    n_max, limit = _n_max(args, cal), _limit(args)
    cal.profiles()  # an unfinished calibration is found before anything is measured
    return target_plan.run_target(args, cal, n_max, _rules(args, sorted({*cal.lengths, n_max})), limit)


def _n_max(args: argparse.Namespace, cal: Calibration) -> int:
    n_max = cal.limit if args.n_max is None else args.n_max
    if n_max is None:
        raise UserError("the model's config does not tell how long a text it was made for; give --n-max")
    least = max(*cal.lengths, cal.held_out_length)
    return check_int(
        "n_max", n_max, least, cal.limit or 2**30, ": the longest text of the calibration to the model's limit; change --n-max"
    )


def _limit(args: argparse.Namespace) -> int | None:
    if args.max_rules_per_layer == "none":
        return None
    return _whole("rules per layer", args.max_rules_per_layer, "--max-rules-per-layer")


def _maker(args: argparse.Namespace, cal: Calibration) -> Maker:
    from attnspan.calibration.candidates import Maker

    n_max, limit = _n_max(args, cal), _limit(args)
    rules = _rules(args, sorted({*cal.lengths, n_max}))
    return Maker(cal.shape, n_max, rules, _budget(args, cal, n_max), limit, args.estimator)


def _rules(args: argparse.Namespace, lengths: list[int]) -> tuple[HeadRule, ...]:
    from attnspan.planner.grid import fine_grid, reference_grid, rule_grid

    if (args.alphas is None) != (args.betas is None):
        raise UserError("an own grid needs both --alphas and --betas")
    if args.alphas is not None:
        if args.grid is not None:
            raise UserError("--grid does not go with --alphas and --betas; drop it")
        return rule_grid(_numbers(args.alphas, "--alphas"), _numbers(args.betas, "--betas"), lengths)
    grid = args.grid or ("fine" if lengths[-1] < SHORT else "reference")
    if grid == "reference":
        return reference_grid()
    if grid == "fine":
        return fine_grid(lengths)
    if grid == "proportional":
        return rule_grid([0.0], [k / 16 for k in range(17)], lengths)
    raise UserError(f"grid is {grid!r}: must be one of {', '.join(GRIDS)}; change --grid")


def _budget(args: argparse.Namespace, cal: Calibration, n_max: int) -> Budget:
    from attnspan.planner.budget import Budget
    from attnspan.planner.decode_cost import DecodeCost

    density = {}
    if args.density is not None:
        check_number("density", args.density, 0.0, 1.0, "; change --density")
        density = dict.fromkeys(sorted({*cal.lengths, n_max}), args.density)
    kv = dict([at_length(args.kv_bytes, n_max, "--kv-bytes", _size, "512MB@8192")]) if args.kv_bytes else {}
    ms = dict([at_length(args.milliseconds, n_max, "--milliseconds", float, "3@8192")]) if args.milliseconds else {}
    cost = None if args.cost_table is None else DecodeCost.load(args.cost_table)
    return Budget(density, kv, ms, args.cache_dtype, cost)


def _candidates(
    args: argparse.Namespace, cal: Calibration, maker: Maker, dense: list[ItemProfile]
) -> tuple[dict[str, Plan], dict[str, Scores]]:
    """Plans by name in the order they were made, and their validation (empty with --no-validate)."""
    from attnspan.planner.choose import plan_from

    table = maker.table([dense])
    plans = {"dense profile": maker.balanced(table)}
    needs_model = args.rounds or args.ablate or args.search or not args.no_validate
    if not needs_model:
        return plans, {}
    import torch

    from attnspan.calibration import refine
    from attnspan.calibration.loading import load_model, read_shape
    from attnspan.calibration.validate import validate

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if read_shape(cal.model).config_hash != cal.shape.config_hash:
        raise UserError(f"{cal.model} has changed since {cal.folder} was made; calibrate again")
    model, _ = load_model(cal.model, cal.dtype, args.device)
    items = cal.calibration_items()
    if args.ablate:
        losses = {p.item: p.loss for p in dense}
        from attnspan.calibration.estimators import curves

        measured = refine.ablate(model, items, curves([dense], maker.estimator), losses, args.ablate, (1 / 8, 1 / 4, 1 / 2))
        plans["ablation"] = maker.balanced(maker.table_of(measured))
    if args.rounds:

        def make(history: Any, share: float) -> Plan:
            return maker.balanced(maker.table(history), share)

        history = refine.rounds(model, items, dense, make, args.rounds, cal.folder / "plans" / _tag(args))
        for number in range(2, len(history) + 1):
            plans[f"round {number - 1}"] = maker.balanced(maker.table(history[:number]))
        table = maker.table(history)
    for number, plan in enumerate(plan_from(table, maker.budget, maker.shape, maker.n_max, maker.max_rules, args.points), 1):
        plans[f"front {number}"] = plan
    if args.search:
        best = next(reversed(plans.values())) if not args.rounds else plans[f"round {args.rounds}"]
        from attnspan.calibration.candidates import Neighbours

        found, trail = refine.search(model, items, best, Neighbours(maker, table), args.search, args.seed)
        print(f"search: {len(trail) - 1} improvements, measured loss {trail[0][1]:.4f} -> {trail[-1][1]:.4f}")
        plans["search"] = found
    # All predictions from the last profiles, so that candidates compare.
    plans = {name: replace(plan, predicted_loss=table.of(plan)) for name, plan in _distinct(plans).items()}
    return plans, {} if args.no_validate else validate(model, cal.held_out_items(), plans)


def _distinct(plans: dict[str, Plan]) -> dict[str, Plan]:
    out: dict[str, Plan] = {}
    for name, plan in plans.items():
        if all(plan.rules != other.rules for other in out.values()):
            out[name] = plan
    return out


def _write(args: argparse.Namespace, cal: Calibration, maker: Maker, made: tuple[dict[str, Plan], dict[str, Scores]]) -> int:
    plans, scores = made
    # KL sees the whole distribution: with few documents it is less noisy than the loss of the answer tokens.
    name = min(scores, key=lambda n: scores[n].kl) if scores else list(plans)[-1]
    rows: list[dict[str, Any]] = []
    for n, p in plans.items():
        rows.append({"name": n, "predicted_loss": {str(k): v for k, v in p.predicted_loss.items()}, "gap": p.solver_gap})
        rows[-1].update(scores[n].to_dict() if n in scores else {})
    validation: dict[str, Any] = {}
    if scores:
        validation = {"length": cal.held_out_length, "items": cal.held_out, "chosen": name, "candidates": rows}
    options = {k: v for k, v in vars(args).items() if isinstance(v, str | int | float) and k not in ("verb", "kind")}
    plan = replace(plans[name], provenance=cal.provenance() | {"options": options}, validation=validation)
    plan.save(args.output)
    folder = cal.folder / "plans" / _tag(args)
    folder.mkdir(parents=True, exist_ok=True)
    for n, p in plans.items():
        p.save(folder / f"{n.replace(' ', '-')}.json")
    write_whole(folder / "candidates.json", (json.dumps(rows, indent=2) + "\n").encode())
    _print(args, plans, scores, name)
    return 0


def _print(args: argparse.Namespace, plans: dict[str, Plan], scores: dict[str, Scores], chosen: str) -> None:
    lengths = list(plans[chosen].predicted_loss)
    print(f"{'candidate':16}" + "".join(f"{f'loss@{n}':>12}" for n in lengths) + f"{'gap':>8}", end="")
    print(f"{'answer loss':>13}{'dense':>9}{'KL':>9}{'top-1':>8}" if scores else "")
    for name, plan in plans.items():
        print(f"{name:16}" + "".join(f"{plan.predicted_loss[n]:12.4g}" for n in lengths) + f"{plan.solver_gap or 0:8.2%}", end="")
        s = scores.get(name)
        print(f"{s.loss:13.4f}{s.dense_loss:9.4f}{s.kl:9.4f}{s.top1:8.1%}" if s else "", end="")
        print("  <- written" if name == chosen else "")
    best = plans[chosen]
    print(f"{args.output}: density " + ", ".join(f"{best.density(n):.3f} at {n}" for n in sorted({*lengths, best.n_max})))


def _tag(args: argparse.Namespace) -> str:
    """Folder of one budget and grid."""
    words = [
        f"{k}={getattr(args, k)}"
        for k in ("density", "kv_bytes", "milliseconds", "grid", "alphas", "betas", "n_max", "estimator")
    ]
    words = [w.replace("/", "_") for w in words if not w.endswith("=None")]
    return "_".join([*words, f"rules={args.max_rules_per_layer}"])


def _whole(name: str, text: str, option: str) -> int:
    try:
        return check_int(name, int(text), 1, 65536, f"; change {option}")
    except ValueError:
        raise UserError(f"{name} is {text!r}: must be a whole number or none; change {option}") from None


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {text!r}: must be numbers with commas between") from None


def _size(text: str) -> float:
    size = read_size(text, "--kv-bytes")
    assert size is not None
    return size

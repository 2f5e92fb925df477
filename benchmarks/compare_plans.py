"""Which estimator, which kind of rule: plans made in every way from one calibration folder, measured on its held-out documents.

    python benchmarks/compare_plans.py CALIB [--densities 0.25,0.5] [--rounds 2] [--ablate 12] [--search 30] [-o results.json]

Estimators: the paper's |E| (`entry`, needs attnspan calibrate --entries), the joint estimate signed, positive and absolute, the
default with rounds of re-profiling, with the most sensitive heads measured, and with a local search on the measured answer loss
of the calibration documents. Kinds of rule, as in the paper's ablation, all with the default estimator on the dense profile:
uniform (one span), layer-wise (one proportional rule a layer), head-wise (a proportional rule a head), elastic (alpha + beta N a
head).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attnspan.calibration import refine
from attnspan.calibration.candidates import Maker, Neighbours
from attnspan.calibration.estimators import DEFAULT, curves
from attnspan.calibration.folder import Calibration
from attnspan.calibration.item_profile import ItemProfile
from attnspan.calibration.loading import load_model
from attnspan.calibration.validate import validate
from attnspan.planner.budget import Budget
from attnspan.planner.files import write_whole
from attnspan.planner.grid import fine_grid, rule_grid
from attnspan.planner.losses import LossTable
from attnspan.planner.plan import Plan
from attnspan.planner.uniform import uniform


def maker(cal: Calibration, density: float, **changes: Any) -> Maker:
    """The maker of `attnspan plan CALIB --density D`, with changes."""
    n_max = cal.limit or max(cal.lengths)
    lengths = sorted({*cal.lengths, n_max})
    made = Maker(cal.shape, n_max, fine_grid(lengths), Budget.of_density(density, cal.lengths, n_max), 2, DEFAULT)
    return replace(made, **changes)


def plans(cal: Calibration, model: Any, density: float, rounds: int, ablate: int, search: int) -> dict[str, Plan]:
    """All plans of one density by the way they were made."""
    items = cal.calibration_items()
    dense = [ItemProfile.load(cal.folder / "profile" / f"{item.id}.npz") for item in items]
    best = maker(cal, density)
    proportional = rule_grid([0.0], [k / 16 for k in range(17)], sorted({*cal.lengths, best.n_max}))
    out = {"uniform": uniform(cal.shape, density, best.n_max)}

    def add(name: str, made: Maker, table: LossTable | None = None) -> None:
        out[name] = made.balanced(made.table([dense]) if table is None else table)

    add("layer-wise", replace(best, rules=proportional, max_rules=1))
    add("head-wise", replace(best, rules=proportional))
    add("elastic", best)
    add("elastic, any number of rules", replace(best, max_rules=None))
    for name in ("entry", "joint", "joint_positive", "joint_absolute"):
        if name != "entry" or all(p.entry is not None for p in dense):
            add(f"estimator {name}", replace(best, estimator=name))
    if ablate:
        losses = {p.item: p.loss for p in dense}
        measured = refine.ablate(model, items, curves([dense], DEFAULT), losses, ablate, (1 / 8, 1 / 4, 1 / 2))
        add(f"{ablate} heads measured", best, best.table_of(measured))
    history: list[Any] = [dense]
    if rounds:
        make: Callable[[Any, float], Plan] = lambda past, share: best.balanced(best.table(past), share)  # noqa: E731
        history = refine.rounds(model, items, dense, make, rounds, cal.folder / "plans" / f"compare-{density:g}")
        for number in range(2, len(history) + 1):
            add(f"round {number - 1}", best, best.table(history[:number]))
    if search:
        table = best.table(history)
        start = out[f"round {rounds}"] if rounds else out["elastic"]
        out[f"search of {search}"], _ = refine.search(model, items, start, Neighbours(best, table), search)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--densities", default="0.25,0.5")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ablate", type=int, default=0)
    parser.add_argument("--search", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, default=Path("compare_plans.json"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cal = Calibration.load(args.calibration)
    model, _ = load_model(cal.model, cal.dtype)
    results: dict[str, Any] = {}
    for density in [float(word) for word in args.densities.split(",")]:
        made = plans(cal, model, density, args.rounds, args.ablate, args.search)
        scores = validate(model, cal.held_out_items(), made)
        print(f"\ndensity {density:g}, {cal.held_out} held-out documents of {cal.held_out_length} tokens\n")
        print("| plan | answer loss | dense | KL | top-1 | density |\n|---|---|---|---|---|---|")
        for name, s in scores.items():
            at = made[name].density(cal.held_out_length)
            print(f"| {name} | {s.loss:.4f} | {s.dense_loss:.4f} | {s.kl:.4f} | {s.top1:.1%} | {at:.3f} |")
        results[f"{density:g}"] = {
            name: s.to_dict() | {"density": made[name].density(cal.held_out_length)} for name, s in scores.items()
        }
        for name, plan in made.items():
            plan.save(args.calibration / "plans" / f"compare-{density:g}" / f"{name.replace(' ', '-').replace(',', '')}.json")
        write_whole(args.output, (json.dumps(results, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()

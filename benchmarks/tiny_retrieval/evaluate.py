"""Calibrated plans against uniform windows on the retrieval model of `train.py`.

    python benchmarks/tiny_retrieval/train.py MODEL                  once: 20 minutes on one thread
    python benchmarks/tiny_retrieval/evaluate.py MODEL CALIB         some minutes
    python benchmarks/compare_plans.py CALIB --densities 0.25,0.5    estimators and kinds of rule, on held-out documents

Documents of the same task with other seeds calibrate, validate and test. Accuracy: share of questions whose value is the most
likely token; 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from task import document

from attnspan.calibration.folder import Calibration
from attnspan.calibration.items import Item, save_items
from attnspan.calibration.loading import load_model, model_limit
from attnspan.calibration.profile import profile_items
from attnspan.calibration.scorer import TorchScorer
from attnspan.calibration.scores import wilson
from attnspan.planner.files import write_whole
from attnspan.planner.plan import Plan
from attnspan.planner.uniform import uniform

LENGTHS, HELD_OUT, TESTED = (1024, 2048), 3072, (1024, 2048, 4096)
QUESTIONS, FILLER = 32, 8
CALIBRATION_SEED, HELD_OUT_SEED, TEST_SEED = 1000, 2000, 3000


def items(length: int, count: int, seed: int) -> list[Item]:
    """Documents of a length, 32 questions each."""
    rng = np.random.default_rng([seed, length])
    return [Item(*document(rng, length, QUESTIONS, FILLER), "retrieval", length) for _ in range(count)]


def calibrate(model_path: Path, folder: Path, count: int) -> Calibration:
    """The folder that attnspan calibrate makes of a text model."""
    model, shape = load_model(model_path, "fp32")
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("attnspan", "torch", "transformers", "numpy")}
    cal = Calibration(
        folder,
        str(model_path.resolve()),
        shape,
        model_limit(model_path),
        LENGTHS,
        count,
        HELD_OUT,
        count,
        CALIBRATION_SEED,
        dtype="fp32",
        answers="given",
        data="benchmarks/tiny_retrieval",
        plain=True,
        entries=True,
        versions=versions,
    )
    made = [item for n in LENGTHS for item in items(n, count, CALIBRATION_SEED)]
    save_items(made, folder / "items.jsonl")
    save_items(items(HELD_OUT, count, HELD_OUT_SEED), folder / "held_out.jsonl")
    cal.save()
    profile_items(model, made, folder / "profile", entries=True)
    return cal


def accuracy(model: Any, plan: Plan | None, length: int, count: int) -> tuple[int, int]:
    """Right answers and questions."""
    scorer = TorchScorer(model, plan)
    right = 0
    for item in items(length, count, TEST_SEED):
        logits = scorer.logits(item.tokens, item.first)
        right += int((logits[item.targets - 1 - item.first].argmax(-1) == item.tokens[item.targets]).sum())
    return right, count * QUESTIONS


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--densities", default="0.25,0.5")
    parser.add_argument("--items", type=int, default=8, help="calibration documents a length (default 8)")
    parser.add_argument("--test", type=int, default=16, help="test documents a length, 32 questions each (default 16)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--search", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    cal = calibrate(args.model, args.calibration, args.items)
    model, shape = load_model(args.model, "fp32")
    n_max = cal.limit or max(TESTED)
    made: dict[str, Plan | None] = {"dense": None}
    for density in [float(word) for word in args.densities.split(",")]:
        file = args.calibration / f"plan-{density:g}.json"
        options = f"--density {density:g} --n-max {n_max} --rounds {args.rounds} --search {args.search}"
        options += f" --threads {torch.get_num_threads()}"
        attnspan = str(Path(sys.executable).with_name("attnspan"))
        subprocess.run([attnspan, "plan", str(args.calibration), *options.split(), "-o", str(file)], check=True)
        made[f"uniform {density:g}"] = uniform(shape, density, n_max)
        made[f"plan {density:g}"] = Plan.load(file)
    results: dict[str, Any] = {}
    print("\n| accuracy | " + " | ".join(f"{n} tokens" for n in TESTED) + " |\n|---|" + "---|" * len(TESTED))
    for name, plan in made.items():
        row = {}
        for n in TESTED:
            right, of = accuracy(model, plan, n, args.test)
            low, high = wilson(right, of)
            density = 1.0 if plan is None else plan.density(n)
            row[str(n)] = {"accuracy": right / of, "low": low, "high": high, "n": of, "density": density}
        results[name] = row
        cells = [f"{c['accuracy']:.3f} [{c['low']:.3f}, {c['high']:.3f}] at {c['density']:.2f}" for c in row.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if args.output:
        write_whole(args.output, (json.dumps(results, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()

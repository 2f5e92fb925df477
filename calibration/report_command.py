"""`attnspan report DIR`: everything about a plan on one page, from a calibration folder or from a plan alone."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json, write_whole
from attnspan.planner.plan import MAX_TOKENS, Plan, ladder
from attnspan.planner.rules import check_int, check_number

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from attnspan.calibration.folder import Calibration
    from attnspan.calibration.report import Candidate, Report

_OPTIONS = re.compile(
    r"(?:^|_)(density|kv_bytes|milliseconds|grid|alphas|betas|n_max|estimator|rules|target|gpu_kv|cpu_kv|kv|read|ms_per_token|"
    r"other_ms|lsh_cost_table|kinds|index|fractions|sampling_items|cache_dtype)="
)
"""Words in the name of a set of candidates, as `attnspan plan` gives it."""


def register_report(subparsers: Any) -> None:
    """Add the verb to a command line."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page about a plan: spans, candidates, memory, influence",
        description="Write one self-contained HTML page about a plan. From a calibration folder: the candidates made last, and "
        "the best of them. From a plan, or an artefact folder: what the plan says.",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="DIR", help="calibration folder, artefact folder or plan.json")
    parser.add_argument(
        "--plan", metavar="NAME", help="candidates of a calibration folder: a name under DIR/plans (default: newest)"
    )
    parser.add_argument("--eval", type=Path, metavar="FILE", help="results.json of attnspan eval, for a table of accuracies")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="default report.html")
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> int:
    """Write the report."""
    from attnspan.calibration.report import page

    content = page(read(args.source, args.plan, args.eval)).encode()
    write_whole(args.output, content)
    print(f"{args.output}: {len(content) / 1024:.0f} KiB")
    return 0


def read(source: Path, name: str | None = None, evaluation: Path | None = None) -> Report:
    """What there is to report. UserError when there is nothing, or something that is damaged."""
    results = None if evaluation is None else _evaluation(evaluation)
    if (source / "calibration.json").is_file():
        return _calibrated(source, name, results)
    if name is not None:
        raise UserError(f"{source} is no calibration folder: --plan {name} has no meaning there; drop it")
    if not source.exists() or (source.is_dir() and not (source / "plan.json").is_file()):
        state = "holds neither calibration.json nor plan.json" if source.is_dir() else "does not exist"
        raise UserError(f"{source} {state}: must be a calibration folder, an artefact folder or a plan file; change DIR")
    return _alone(Plan.load(source), results)


def _alone(plan: Plan, results: Mapping[str, Any] | None) -> Report:
    """What a plan says of itself."""
    from attnspan.calibration.report import Report

    validation, provenance = plan.validation, plan.provenance
    candidates: tuple[Candidate, ...] = ()
    chosen = held_out = None
    if validation:
        candidates = _candidates(validation.get("candidates"), "validation of the plan", {})
        chosen = str(validation.get("chosen"))
        if chosen not in {c.name for c in candidates}:
            raise UserError(f"validation of the plan has chosen {chosen!r}, which is none of its candidates; make the plan again")
        length, items = (check_int(f"validation: {key}", validation.get(key), 1, MAX_TOKENS) for key in ("length", "items"))
        held_out = (length, items)
    options = provenance.get("options")
    budget = _budget(options if isinstance(options, Mapping) else {})
    return Report(plan, chosen, candidates, held_out, budget, _lengths(plan), None, results, provenance)


def _calibrated(folder: Path, name: str | None, results: Mapping[str, Any] | None) -> Report:
    """A set of candidates of a calibration folder."""
    from attnspan.calibration.folder import Calibration
    from attnspan.calibration.report import Report

    cal = Calibration.load(folder)
    where = _newest(folder, name)
    file = where / "candidates.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} ({error}); run attnspan plan again") from None
    names = [str(row["name"]) for row in rows if isinstance(row, Mapping) and "name" in row] if isinstance(rows, list) else []
    plans = {name: Plan.load(where / f"{name.replace(' ', '-')}.json") for name in names}
    candidates = _candidates(rows, str(file), plans)
    scored = [c for c in candidates if c.loss is not None]
    # As attnspan plan chooses: the least KL from the dense model, or without measurements the last that was made.
    chosen = min(scored, key=lambda c: c.kl or 0.0) if scored else candidates[-1]
    plan = plans[chosen.name]
    words = _OPTIONS.split(where.name)[1:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    provenance = {"model": cal.model, **cal.provenance(), "answers": cal.answers, "plain": cal.plain, "options": options}
    held_out = (cal.held_out_length, cal.held_out) if scored else None
    curves = _curves(cal, options.get("estimator"))
    return Report(plan, chosen.name, candidates, held_out, _budget(options), _lengths(plan), curves, results, provenance)


def _newest(folder: Path, name: str | None) -> Path:
    found = sorted((folder / "plans").glob("*/candidates.json"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise UserError(f"{folder} has no candidates yet: make some with attnspan plan {folder} --density D")
    names = [path.parent.name for path in found]
    if name is not None and name not in names:
        raise UserError(f"{folder} has no candidates {name!r}: must be one of {', '.join(names)}; change --plan")
    return found[-1 if name is None else names.index(name)].parent


def _candidates(rows: Any, where: str, plans: Mapping[str, Plan]) -> tuple[Candidate, ...]:
    """Candidates as `attnspan plan` writes them; plans: those whose files are at hand."""
    from attnspan.calibration.report import Candidate

    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(f"{where} holds {rows!r:.60}: must be a list of candidates; make the plan again")
    out = []
    for row in rows:
        predicted, name = row.get("predicted_loss"), row.get("name")
        if not isinstance(predicted, Mapping) or not isinstance(name, str) or not all(str(n).isdecimal() for n in predicted):
            raise UserError(f"{where} has the candidate {row!r:.60}: must have a name and a predicted_loss; make the plan again")
        losses = {int(n): check_number(f"{where}: predicted_loss of {name}", x, -1e30, 1e30) for n, x in predicted.items()}
        measured = {
            key: None if row.get(key) is None else check_number(f"{where}: {key} of {name}", row[key], -1e30, 1e30)
            for key in ("gap", "loss", "dense_loss", "kl", "top1")
        }
        out.append(Candidate(name, dict(sorted(losses.items())), plans[name].density() if name in plans else None, **measured))
    return tuple(out)


def _budget(options: Mapping[str, Any]) -> str:
    """The budget in words; empty when it is not known."""
    names = {
        "density": "density {}", "kv_bytes": "KV cache of {}", "milliseconds": "{} ms of attention a token",
        "gpu_kv": "{} on the GPU", "cpu_kv": "{} on the CPU", "kv": "KV caches and indexes of {}",
        "read": "{} of dense reads a token", "ms_per_token": "{} ms a token",
    }  # fmt: skip
    return ", ".join(text.format(options[key]) for key, text in names.items() if key in options)


def _lengths(plan: Plan) -> tuple[int, ...]:
    """Lengths to show: those profiled, or some below n_max, and n_max; rising."""
    profiled = [n for n in plan.predicted_loss if n <= plan.n_max] or ladder(plan.n_max)[-4:]
    return tuple(sorted({*profiled, plan.n_max}))


def _curves(cal: Calibration, estimator: str | None) -> dict[int, npt.NDArray[np.float64]] | None:
    """Loss curves of the dense model; None when no profile is there."""
    files = [cal.folder / "profile" / f"{item.id}.npz" for item in cal.calibration_items()]
    files = [file for file in files if file.is_file()]
    if not files:
        return None
    from attnspan.calibration.estimators import DEFAULT, curves
    from attnspan.calibration.item_profile import ItemProfile

    return curves([[ItemProfile.load(file) for file in files]], estimator or DEFAULT)


def _evaluation(path: Path) -> Mapping[str, Any]:
    file = path / "results.json" if path.is_dir() else path
    data = read_json(file)
    needed = {"task", "length", "method", "n", "accuracy", "low", "high", "ppl"}
    totals = data.get("totals")
    if not isinstance(totals, list) or not totals or not all(isinstance(x, dict) and needed <= x.keys() for x in totals):
        raise UserError(f"{file} holds no results of attnspan eval; change --eval")
    return data

"""What `attnspan eval` compares: a checkpoint in PyTorch under plans and uniform windows, or artefacts."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.rules import BLOCK, HeadRule
from attnspan.planner.shape import ModelShape
from attnspan.planner.uniform import uniform
from attnspan.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from attnspan.calibration.prompts import Coder
    from attnspan.calibration.scorer import Scorer
    from attnspan.runtime.artefact import Artefact

__all__ = ["BASELINES", "DENSITY", "Methods", "methods_of", "numbers"]

BASELINES = ("dense", "uniform")
DENSITY = 0.5


@dataclass(frozen=True)
class Methods:
    """What is compared: scorers, what each is (for the results), and the density of each by length."""

    scorers: dict[str, Scorer]
    describe: dict[str, Any]
    plans: dict[str, Callable[[int], Plan] | None]

    def densities(self, lengths: list[int]) -> dict[str, dict[str, float]]:
        """Density by method and length; keys are text, as JSON wants them."""
        found = {}
        for name, plan in self.plans.items():
            found[name] = {str(n): 1.0 if plan is None else round(plan(n).density(n), 4) for n in lengths}
        return found


def methods_of(args: argparse.Namespace, lengths: list[int], scratch: Path) -> tuple[Coder, Methods]:
    """What the arguments name, and the tokenizer that items are coded with. UserError before any weights are read."""
    return _artefacts(args, lengths) if _is_artefact(args.models[0]) else _checkpoint(args, lengths, scratch)


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """A list of the command line."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{name} is {text!r}: must be numbers with commas between; change --{name}") from None


def _is_artefact(path: str) -> bool:
    return (Path(path) / "attnspan.json").is_file()


def _baselines(text: str | None) -> list[str]:
    chosen = list(BASELINES) if text is None else [] if text == "none" else [word.strip() for word in text.split(",")]
    for name in chosen:
        if name not in BASELINES:
            raise UserError(f"baseline is {name!r}: must be dense, uniform, dense,uniform or none; change --baselines")
    return chosen


def _checkpoint(args: argparse.Namespace, lengths: list[int], scratch: Path) -> tuple[Coder, Methods]:
    """A model in PyTorch: dense, under each plan, and under uniform windows of the plans' densities."""
    if len(args.models) > 1:
        raise UserError(f"{len(args.models)} models: must be one checkpoint, or artefact folders; several plans go into --plan")
    baselines = _baselines(args.baselines)
    plans = _load_plans(args.plan)
    if args.density is not None and plans:
        raise UserError("--density is for uniform windows without --plan, which get the densities of the plans; drop one of them")
    import torch

    from attnspan.calibration.loading import load_model, load_tokenizer, model_limit, read_shape, weights_id
    from attnspan.calibration.scorer import TorchScorer

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    path, dtype = args.models[0], args.dtype or "bf16"
    _check_lengths(lengths, [model_limit(path), *(plan.n_max for plan in plans.values())])
    for plan in plans.values():
        plan.check_model(read_shape(path))
    coder = load_tokenizer(path, scratch)
    model, shape = load_model(path, dtype, args.device or "cpu")
    what = {"model": shape.id, "config": shape.config_hash, "weights": weights_id(path), "dtype": dtype}
    out = Methods({}, {}, {})
    if "dense" in baselines:
        _add(out, "dense", TorchScorer(model), what, None)
    for name, plan in plans.items():
        _add(out, name, TorchScorer(model, plan), what | {"plan": _hash(plan)}, lambda n, plan=plan: plan)  # type: ignore[misc]
    if "uniform" in baselines:
        for name, density in _uniform_densities(plans, args.density, lengths).items():
            choose = _Uniform(shape, density)
            _add(out, name, _ByLength(model, choose), what | {"uniform": choose.describe()}, choose)
    if not out.scorers:
        raise UserError("nothing to evaluate: give --plan, or --baselines")
    return coder, out


def _check_lengths(lengths: list[int], limits: list[int | None]) -> None:
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is not None and lengths[-1] > limit:
        raise UserError(f"length {lengths[-1]} is beyond the {limit} tokens of the model or plan; change --lengths")


def _add(out: Methods, name: str, scorer: Scorer, what: Any, plan: Callable[[int], Plan] | None) -> None:
    out.scorers[name], out.describe[name], out.plans[name] = scorer, what, plan


def _load_plans(paths: list[Path]) -> dict[str, Plan]:
    """Plans by the names of their files, or of their folders where the files are all called plan.json."""
    files = [path / "plan.json" if path.is_dir() else path for path in paths]
    out: dict[str, Plan] = {}
    for file in files:
        name = file.stem if file.stem != "plan" or len(files) == 1 else file.resolve().parent.name
        while name in out or name in BASELINES:
            name += "'"
        out[name] = Plan.load(file)
        if any(rule.lsh for layer in out[name].rules for rule in layer):
            raise UserError(
                f"{file} has sampled heads, which PyTorch cannot run: attnspan export MODEL OUT --plan {file}, then "
                "attnspan eval DENSE OUT, where DENSE is the model exported with --density 1"
            )
    return out


def _hash(plan: Plan) -> str:
    """What a plan keeps and samples, as 16 hex digits; where it comes from does not matter."""
    rules = [[_content(rule) for rule in layer] for layer in plan.rules]
    return hashlib.sha256(json.dumps([plan.n_max, rules]).encode()).hexdigest()[:16]


def _content(rule: HeadRule) -> list[Any]:
    return [rule.mode, rule.alpha, rule.beta, *([] if rule.lsh is None else [asdict(rule.lsh)])]


class _Uniform:
    """Uniform windows: of a density, or of as many blocks as another plan keeps at each length."""

    def __init__(self, shape: ModelShape, like: Plan | float) -> None:
        self._shape, self._like = shape, like

    def __call__(self, n: int) -> Plan:
        """The plan for sequences of n tokens. Where the blocks of the other plan do not part evenly, some heads have one more."""
        n_max = max(n, 128)
        if isinstance(self._like, float):
            return uniform(self._shape, self._like, n_max)
        heads = self._shape.layers * self._shape.kv_heads
        blocks = int((-(-self._like.spans(n) // BLOCK)).sum())
        ends = [i * blocks // heads for i in range(heads + 1)]
        rules = [HeadRule("span", float(BLOCK * (end - start)), 0.0) for start, end in pairwise(ends)]
        width = self._shape.kv_heads
        return Plan(self._shape, n_max, [rules[i : i + width] for i in range(0, heads, width)])

    def describe(self) -> Any:
        """As JSON."""
        return self._like if isinstance(self._like, float) else _hash(self._like)


class _ByLength:
    """A PyTorch model under the plan that `choose` gives for each length."""

    def __init__(self, model: Any, choose: Callable[[int], Plan]) -> None:
        self._model, self._choose = model, choose

    def logits(self, tokens: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.float32]:
        """See `Scorer`."""
        from attnspan.calibration.scorer import TorchScorer

        return TorchScorer(self._model, self._choose(len(tokens))).logits(tokens, first)


def _uniform_densities(plans: Mapping[str, Plan], text: str | None, lengths: list[int]) -> dict[str, Plan | float]:
    """Uniform methods by name: one for each plan, but one for those of the same density at all lengths."""
    if not plans:
        densities = numbers("density", text or str(DENSITY), float)
        return {"uniform" if len(densities) == 1 else f"uniform {density:g}": density for density in densities}
    seen: dict[tuple[float, ...], tuple[str, Plan]] = {}
    for name, plan in plans.items():
        seen.setdefault(tuple(round(plan.density(n), 3) for n in lengths), (name, plan))
    if len(seen) == 1:
        return {"uniform": next(iter(seen.values()))[1]}
    return {f"uniform as {name}": plan for name, plan in seen.values()}


def _artefacts(args: argparse.Namespace, lengths: list[int]) -> tuple[Coder, Methods]:
    """Exported artefacts through their runtime; one that keeps everything is the dense model of the comparison."""
    from attnspan.calibration.session_scorer import SessionScorer
    from attnspan.runtime.artefact import Artefact

    for option in ("plan", "baselines", "density"):
        if getattr(args, option):
            raise UserError(f"--{option} is for checkpoints: an artefact has its plan; name more artefacts to compare with")
    for option in ("dtype", "device"):
        if getattr(args, option):
            raise UserError(f"--{option} is for checkpoints: an artefact has its types, and is evaluated on the CPU; drop it")
    for path in args.models:
        if not _is_artefact(path):
            raise UserError(f"{path} is no artefact, {args.models[0]} is one: give artefacts only, or one checkpoint")
    artefacts = [Artefact.load(path) for path in args.models]
    for artefact in artefacts[1:]:
        _check_same_model(artefacts[0], artefact)
    _check_lengths(lengths, [artefact.plan.n_max for artefact in artefacts])
    out = Methods({}, {}, {})
    for artefact in artefacts:
        plan = artefact.plan
        name = artefact.folder.resolve().name
        if "dense" not in out.scorers and all(rule.mode == "dense" for layer in plan.rules for rule in layer):
            name = "dense"
        elif name in BASELINES:
            name += "'"
        while name in out.scorers:
            name += "'"
        what = {"model": artefact.model_id, "plan": _hash(plan), "cache": artefact.cache_dtype, "artefact": artefact.fingerprint}
        _add(out, name, SessionScorer(artefact, args.threads), what, lambda n, plan=plan: plan)  # type: ignore[misc]
    return Tokenizer(artefacts[0].folder), out


def _check_same_model(first: Artefact, other: Artefact) -> None:
    """Answers are compared token by token."""
    for what, a, b in (
        ("configuration", first.plan.model.config_hash, other.plan.model.config_hash),
        ("tokenizer", *(artefact.info["files"].get("tokenizer.json", {}).get("sha256") for artefact in (first, other))),
        ("vocabulary", first.vocab_size, other.vocab_size),
    ):
        if a != b and None not in (a, b):
            raise UserError(
                f"{first.folder} and {other.folder} have another {what}: must be artefacts of one model; evaluate them apart"
            )

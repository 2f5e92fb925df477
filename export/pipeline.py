"""From MODEL to a verified artefact: the stages of `attnspan export`, in order."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from attnspan.export import artefact
from attnspan.export.folder import check_destination
from attnspan.export.frontends.build import build
from attnspan.export.rewrite.cpu import rewrite_cpu
from attnspan.export.source import Source, open_source
from attnspan.export.stages import Stages
from attnspan.export.verify import require_torch, verify
from attnspan.planner.cost import allocated_bytes, state_bytes
from attnspan.planner.errors import UserError
from attnspan.planner.files import whole_folder
from attnspan.planner.plan import Plan
from attnspan.planner.uniform import uniform
from attnspan.runtime.memory import check_indexes_fit

CACHE_DTYPES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}
DEFAULT_N_MAX = 8192


@dataclass(frozen=True)
class Options:
    """What `attnspan export` was asked for. Without `plan`, every head keeps `density` of the text."""

    model: str
    out: Path
    plan: Path | None = None
    density: float | None = None
    n_max: int | None = None
    cache_dtype: str = "bf16"
    num_layers: int | None = None
    library: Path | None = None
    overwrite: bool = False
    verify_tokens: int | None = None  # None: do not verify


@dataclass(frozen=True)
class Exported:
    """A finished artefact: its description (attnspan.json), its plan and the cost of each stage."""

    folder: Path
    description: dict[str, Any]
    plan: Plan
    stages: Stages


def export_model(options: Options) -> Exported:
    """Write the artefact. UserError, before any weight is read, for anything that cannot work.

    VerificationError when the artefact does not compute what the model does. On any error nothing is left in OUT.
    """
    stages = Stages()
    with stages.measure("build graph"):
        cache_dtype = CACHE_DTYPES.get(options.cache_dtype)
        if cache_dtype is None:
            raise UserError(f"--cache-dtype is {options.cache_dtype!r}; must be one of {', '.join(CACHE_DTYPES)}")
        source = first_layers(open_source(options.model), options.num_layers)
        plan = choose_plan(source, options.plan, options.density, options.n_max)
        model = build(source.config, source.weights, plan.n_max)
        rewrite_cpu(model, plan, cache_dtype, source.shape)
        if options.verify_tokens is not None:
            whole = dataclasses.replace(plan, model=source.shape)  # plans need not know the size of a head
            kv, states = allocated_bytes(whole, options.cache_dtype), state_bytes(whole)
            fix = "add --no-verify when it will run on another machine, or"
            check_indexes_fit(kv or 0, states or 0, f"one row of {plan.n_max} tokens", fix)
        check_destination(options.out, options.overwrite, artefact.disk_bytes(model, options.library))
        if options.verify_tokens is not None:
            require_torch()
            if options.verify_tokens < 1:
                raise UserError(f"--verify-tokens is {options.verify_tokens}; must be 1 or more, or --no-verify")
    with whole_folder(options.out) as folder:
        with stages.measure("write files"):
            artefact.write_model(model, folder)
            artefact.write_companions(folder, source, plan, options.library)
            description = artefact.describe(folder, source, plan, cache_dtype, options.library)
            artefact.write_description(folder, description)
        if options.verify_tokens is not None:
            with stages.measure("verify", child=True):
                dtype = description["cache_dtype"]
                description["verify"] = verify(folder, source.path, options.verify_tokens, dtype)
                artefact.write_description(folder, description)
    return Exported(options.out, description, plan, stages)


def choose_plan(source: Source, file: Path | None, density: float | None, n_max: int | None) -> Plan:
    """The plan in `file`, or a uniform one of `density`; for `n_max` tokens when that is given.

    UserError when it does not fit the model or asks for more tokens than the model was made for.
    """
    limit = source.config.get("max_position_embeddings")
    if file is not None:
        if density is not None:
            raise UserError("--plan and --density exclude each other; drop one")
        plan = Plan.load(file)
        plan.check_model(source.shape)
        if n_max is not None:
            plan = dataclasses.replace(plan, n_max=n_max)
    else:
        n_max = n_max if n_max is not None else min(limit or DEFAULT_N_MAX, DEFAULT_N_MAX)
        plan = uniform(source.shape, 0.5 if density is None else density, n_max)
    if limit is not None and plan.n_max > limit:
        raise UserError(f"n_max is {plan.n_max}; MODEL allows up to {limit} (max_position_embeddings); change --n-max")
    return plan


def first_layers(source: Source, count: int | None) -> Source:
    """The model cut to its first `count` layers: for trials, not for use."""
    total = source.shape.layers
    if count is None:
        return source
    if not 1 <= count <= total:
        raise UserError(f"--num-layers is {count}; MODEL allows 1 to {total}")
    config = source.config | {"num_hidden_layers": count}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:count]
    cut = tuple(f"model.layers.{i}." for i in range(count, total))
    weights = {name: tensor for name, tensor in source.weights.items() if not name.startswith(cut)}
    return dataclasses.replace(source, config=config, weights=weights)

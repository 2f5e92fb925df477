"""From MODEL to a verified artefact: the stages of `attnspan export`, in order."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from attnspan.export import artefact, genai
from attnspan.export.folder import check_destination
from attnspan.export.frontends.choose import is_traced, layer_windows, normal_form
from attnspan.export.frontends.foreign.open import is_onnx, open_onnx
from attnspan.export.source import Source, open_source
from attnspan.export.stages import Stages
from attnspan.export.targets import Form, choose_form, onnx_type
from attnspan.export.verify import require_torch, verify
from attnspan.planner.cost import state_bytes
from attnspan.planner.errors import UserError
from attnspan.planner.files import whole_folder
from attnspan.planner.plan import Plan
from attnspan.planner.uniform import uniform
from attnspan.planner.windows import limit_plan
from attnspan.runtime.memory import check_indexes_fit

DEFAULT_N_MAX = 8192


@dataclass(frozen=True)
class Options:
    """What `attnspan export` was asked for. Without `plan`, every head keeps `density` of the text.

    dtype, cache_dtype, chunk: None for the target's own. weights: what matrices are quantised to, None: they are not.
    """

    model: str
    out: Path
    target: str = "cpu"
    dtype: str | None = None
    weights: str | None = None
    plan: Path | None = None
    density: float | None = None
    n_max: int | None = None
    cache_dtype: str | None = None
    chunk: int | None = None
    num_layers: int | None = None
    library: Path | None = None
    overwrite: bool = False
    verify_tokens: int | None = None  # None: do not verify
    genai: bool = False  # also write what onnxruntime-genai loads


@dataclass(frozen=True)
class Exported:
    """A finished artefact: its form, its description (attnspan.json), its plan and the cost of each stage."""

    folder: Path
    form: Form
    description: dict[str, Any]
    plan: Plan
    stages: Stages


def export_model(options: Options) -> Exported:
    """Write the artefact. UserError, before any weight is read, for anything that cannot work.

    VerificationError when the artefact does not compute what the model does. On any error nothing is left in OUT.
    """
    stages = Stages()
    with stages.measure("build graph"):
        work = prepare(options)
    form, plan, source = work.form, work.plan, work.given.source
    assert work.model is not None  # no dry run
    with whole_folder(options.out) as folder:
        with stages.measure("write files"):
            known = artefact.write_model(work.model, folder)
            if form.dtype != "fp32":
                from attnspan.export.rewrite.surgery import compute_norms_in_fp32

                compute_norms_in_fp32(folder / artefact.MODEL, onnx_type(form.dtype))
            artefact.write_companions(folder, source, plan, options.library)
            if form.cache_dtype == "int8":
                from attnspan.export.cache_scales import measure_scales, write_scales

                write_scales(folder, measure_scales(folder, plan, source.config["vocab_size"], options.library))
            if options.genai:
                assert options.library is not None  # target cpu has one
                genai.write_genai(folder, plan, source.config, options.library.name)
            description = artefact.describe(source, plan, form, options.library, artefact.fingerprints(folder, known))
            artefact.write_description(folder, description)
        if options.verify_tokens is not None:
            with stages.measure("verify", child=True):
                description["verify"] = verify(folder, work.given.original, options.verify_tokens)
                artefact.write_description(folder, description)
    return Exported(options.out, form, description, plan, stages)


@dataclass(frozen=True)
class Work:
    """An export that was checked and can begin.

    model: the graph to write, its weights not read; None: a dry run cannot know it. files: sizes as of `planned_files`.
    """

    options: Options
    form: Form
    given: Given
    plan: Plan
    model: ir.Model | None
    files: Mapping[str, int | None]


def prepare(options: Options, dry: bool = False) -> Work:
    """Check everything that can be checked, and build the graph; no weight is read, nothing written. UserError as `export_model`.

    dry: leave out a graph that needs the weights, of a family that is traced.
    """
    form = choose_form(options.target, options.dtype, options.cache_dtype, options.chunk, options.weights)
    if form.dtype != "fp32" and importlib.util.find_spec("onnx_graphsurgeon") is None:
        raise UserError(f"onnx-graphsurgeon is not installed, which --dtype {form.dtype} needs; install attnspan[export]")
    given = open_model(options.model, options.num_layers, form)
    source, dtype = given.source, onnx_type(form.dtype)
    plan = limit_plan(choose_plan(source, options.plan, options.density, options.n_max), given.windows)
    if options.genai:
        genai.check_genai(options.target, plan)
    model = given.lifted
    if model is None and not (dry and dtype == ir.DataType.FLOAT and is_traced(source.config)):
        model = normal_form(source, plan.n_max, dtype)
    if model is not None:
        form.rewrite(model, plan, source.shape)
    if options.verify_tokens is not None:
        assert source.shape.head_dim is not None  # a config has it; a plan need not
        kv, states = form.cache_bytes(plan, source.shape.head_dim), state_bytes(dataclasses.replace(plan, model=source.shape))
        fix = "add --no-verify when it will run on another machine, or"
        check_indexes_fit(kv, states or 0, f"one row of {plan.n_max} tokens", fix)
    files = artefact.planned_files(model, source, plan, form, options.library)
    if options.genai:
        files |= dict.fromkeys((genai.CONFIG, genai.GRAPH))
    check_destination(options.out, options.overwrite, artefact.disk_bytes(files))
    if options.verify_tokens is not None:
        require_torch()
        if options.verify_tokens < 1:
            raise UserError(f"--verify-tokens is {options.verify_tokens}; must be 1 or more, or --no-verify")
    return Work(options, form, given, plan, model, files)


@dataclass(frozen=True)
class Given:
    """MODEL, opened. windows: of each layer, None where all tokens are seen. lifted: the normal form of an ONNX file.

    original: what verification compares with.
    """

    source: Source
    windows: Sequence[int | None]
    original: Path
    lifted: ir.Model | None = None


def open_model(model: str, num_layers: int | None, form: Form) -> Given:
    """Open MODEL, its first `num_layers` layers if that is given. UserError for what cannot be exported in this form."""
    if not is_onnx(model):
        source = first_layers(open_source(model), num_layers)
        return Given(source, layer_windows(source.config), source.path)
    if num_layers is not None:
        raise UserError(f"--num-layers is {num_layers}, MODEL an ONNX file, which is taken whole; drop it")
    if form.dtype != "fp32":
        fix = "give --dtype fp32" if "fp32" in form.target.types else "change --target or MODEL"
        raise UserError(
            f"target {form.target.name} would compute in {form.dtype}; MODEL is an ONNX file, which can be in fp32 only; {fix}"
        )
    source, lifted = open_onnx(model)
    return Given(source, lifted.windows, source.file, lifted.model)


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
            plan = _with_n_max(plan, n_max)
    else:
        n_max = n_max if n_max is not None else min(limit or DEFAULT_N_MAX, DEFAULT_N_MAX)
        plan = uniform(source.shape, 0.5 if density is None else density, n_max)
    if limit is not None and plan.n_max > limit:
        raise UserError(f"n_max is {plan.n_max}; MODEL allows up to {limit} (max_position_embeddings); change --n-max")
    return plan


def _with_n_max(plan: Plan, n_max: int) -> Plan:
    """The plan for another n_max. One that was chosen under budgets says no more what it takes of them: that was at its own."""
    made = plan.provenance
    if made.get("method") == "unified" and n_max != plan.n_max:
        made = {key: value for key, value in made.items() if key not in ("bounds", "memory", "read", "options")}
        print(f"warning: the budgets of --plan are for its n_max, {plan.n_max}; at {n_max} it may break them", file=sys.stderr)
    return dataclasses.replace(plan, n_max=n_max, provenance=made)


def first_layers(source: Source, count: int | None) -> Source:
    """The model cut to its first `count` layers: for trials, not for use."""
    total = source.shape.layers
    if count is None:
        return source
    if not 1 <= count <= total:
        raise UserError(f"--num-layers is {count}; MODEL allows 1 to {total}")
    config = source.config | {"num_hidden_layers": count}
    for by_layer in ("layer_types", "no_rope_layers"):
        if config.get(by_layer):
            config[by_layer] = config[by_layer][:count]
    cut = tuple(f"model.layers.{i}." for i in range(count, total))
    weights = {name: tensor for name, tensor in source.weights.items() if not name.startswith(cut)}
    return dataclasses.replace(source, config=config, weights=weights)

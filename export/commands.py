"""The verb `attnspan export`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attnspan.export.targets import TARGETS, choose_form

VERIFY_TOKENS = 3072
DEFAULTS: Mapping[str, Any] = {
    "target": "cpu", "overwrite": False, "verify": True, "verify_tokens": VERIFY_TOKENS, "build": True
}  # fmt: skip
"""Of options that no config file and no command line gives; those of others are None."""


def register(subparsers: Any) -> None:
    """Add the verb to the command line `attnspan`."""
    parser = subparsers.add_parser(
        "export",
        help="turn a model and a plan into an artefact that runs",
        description="Write an artefact folder: ONNX model, weights, plan, tokenizer, op library; verified against the model.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that what was given can be told from what was not
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder, .gguf or .onnx file, or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="artefact folder to write")
    where = ", ".join(f"{name} ({target.runs_on})" for name, target in TARGETS.items())
    parser.add_argument("--target", help=f"where it will run: {where}; default cpu")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="what each head keeps (see `attnspan plan`)")
    parser.add_argument("--density", type=float, help="without --plan: every head keeps this share of the text (default 0.5)")
    parser.add_argument("--n-max", type=int, metavar="N", help="longest text in tokens (default: the plan's, else at most 8192)")
    computes = ", ".join(f"{name}: {' or '.join(target.types)}" for name, target in TARGETS.items())
    parser.add_argument("--dtype", help=f"type the model computes in ({computes}; firsts are defaults)")
    caches = "bf16 (default), fp16, fp32 or int8 for cpu; for others that of --dtype"
    parser.add_argument("--cache-dtype", help=f"type of the KV cache: {caches}")
    parser.add_argument("--weights", help="cpu, portable: store matrices in int4 or int8 (default: as --dtype)")
    parser.add_argument("--chunk", type=int, metavar="N", help="portable: most tokens that one call takes (default 256)")
    parser.add_argument("--genai", action=flag, help="cpu: also write what onnxruntime-genai loads (default: no)")
    parser.add_argument("--num-layers", type=int, metavar="N", help="the first N layers only, for a trial")
    parser.add_argument("--overwrite", action=flag, help="replace OUT when it is an artefact (default: no)")
    parser.add_argument("--verify", action=flag, help="compare the artefact with the model (default: yes)")
    parser.add_argument(
        "--verify-tokens", type=int, metavar="N", help=f"length of the longest text to compare (default {VERIFY_TOKENS})"
    )
    parser.add_argument("--build", action=flag, help="tensorrt: build the engine, if this machine can (default: yes)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and what it takes, and write nothing")
    parser.add_argument("--config", type=Path, metavar="FILE", help="options in YAML or JSON; those given here win")
    parser.add_argument("--save-config", type=Path, metavar="FILE", help="keep the options, .yaml or .json, for --config")
    parser.set_defaults(run=partial(run, parser))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Export, build the engine, if there is one, and print what was written and what it took; or print what would be done."""
    from attnspan.export.config_file import check_writable, read_config, write_config

    given = vars(args)
    config, save, dry = given.pop("config", None), given.pop("save_config", None), given.pop("dry_run", False)
    if config is not None:
        given = read_config(config, parser) | given
    if save is not None:
        check_writable(save)
    _run(given, dry)
    if save is not None:
        write_config(save, given, parser)
    return 0


def _run(given: Mapping[str, Any], dry: bool) -> None:
    from attnspan.cpu_runtime.library import library_path
    from attnspan.export.pipeline import Options, export_model, prepare

    values = {**DEFAULTS, **given}
    form = choose_form(values["target"], *(values.get(name) for name in ("dtype", "cache_dtype", "chunk", "weights")))
    known = {field.name: values[field.name] for field in dataclasses.fields(Options) if field.name in values}
    known |= {"library": library_path() if form.target.library else None}
    known |= {"verify_tokens": values["verify_tokens"] if values["verify"] else None}
    options = Options(**known)
    if dry:
        from attnspan.export.dry_run import describe

        print(describe(prepare(options, dry=True)))
        return
    from attnspan.export.report import summary

    done, engine = export_model(options), None
    try:
        if form.target.engine and values["build"]:
            with done.stages.measure("build engine"):
                engine = build_engine(done.folder)
    finally:  # the artefact stands whatever becomes of the engine
        print(summary(done))
    if engine:
        print(engine)


def build_engine(folder: Path) -> str:
    """Build the engine of an artefact if this machine can. A line that says where it is, or what to run on a machine that can."""
    from attnspan.plugins.trt_sparse_attn import engine

    reason = engine.why_not_here()
    if reason is not None:
        return f"no engine was built: {reason}; on the machine with the GPU run: attnspan build {folder}"
    return f"engine: {engine.build_engine(folder)}"

"""The verb `attnspan calibrate`: corpus, the dense model's answers, the influence profile."""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError
from attnspan.planner.grid import check_profiled
from attnspan.planner.rules import check_int

if TYPE_CHECKING:
    from attnspan.calibration.folder import Calibration
    from attnspan.calibration.items import Item

LIBRARIES = ("attnspan", "torch", "transformers", "numpy")
LENGTHS = (2048, 4096, 8192)


def register_calibrate(subparsers: Any) -> None:
    """Add the verb to a command line."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure how far every KV head of a model looks back",
        description="Build a corpus of long documents with the dense model's own answers, and profile what cutting the span of "
        "each KV head does to them. Interrupted, the same command goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder or .gguf file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="calibration folder")
    parser.add_argument("--lengths", default=None, help="tokens, with commas (default 2048,4096,8192, as far as the model goes)")
    parser.add_argument("--items", type=int, default=8, help="documents of each length (default 8)")
    parser.add_argument("--held-out", type=int, default=8, metavar="N", help="documents that plans are validated on (default 8)")
    parser.add_argument(
        "--held-out-length", type=int, metavar="TOKENS", help="their length (default 1.5 times the longest, if possible)"
    )
    parser.add_argument("--data", type=Path, metavar="FILE.jsonl", help="your documents: {context, question[, answer]} a line")
    parser.add_argument("--answers", default="model", help="model (default): the dense model's own; given: those of the data")
    parser.add_argument("--plain", action="store_true", help="no chat template")
    parser.add_argument("--entries", action="store_true", help="also the influence of single entries, the paper's estimator")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus (default 0)")
    parser.add_argument("--dtype", default="bf16", help="fp32, bf16 (default) or fp16")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.set_defaults(run=run_calibrate)


def run_calibrate(args: argparse.Namespace) -> int:
    """Make or finish a calibration folder."""
    lengths = sorted({check_profiled(n) for n in _integers(args.lengths)}) if args.lengths else None
    check_int("items", args.items, 1, 100000, "; change --items")
    check_int("held-out items", args.held_out, 1, 100000, "; change --held-out")
    data = None
    from attnspan.calibration.corpus import ANSWERS, read_data

    if args.answers not in ANSWERS:
        raise UserError(f"answers is {args.answers!r}: must be one of {', '.join(ANSWERS)}; change --answers")
    if args.data is not None:
        data = read_data(args.data)

    import torch

    from attnspan.calibration.loading import load_model, model_limit
    from attnspan.calibration.profile import profile_items
    from attnspan.runtime.memory import peak_rss_bytes

    if args.threads:
        torch.set_num_threads(check_int("threads", args.threads, 1, 4096, "; change --threads"))
    limit = model_limit(args.model)
    lengths = _fit(lengths, limit)
    held_out = _held_out_length(args.held_out_length, lengths, limit)
    start = time.monotonic()
    model, shape = load_model(args.model, args.dtype, args.device)
    loaded = peak_rss_bytes()
    from attnspan.calibration.folder import Calibration

    wanted = Calibration(
        folder=args.output,
        model=str(Path(args.model).resolve()),
        shape=shape,
        limit=limit,
        lengths=tuple(lengths),
        items=args.items,
        held_out_length=held_out,
        held_out=args.held_out,
        seed=args.seed,
        dtype=args.dtype,
        answers=args.answers,
        data=None if args.data is None else str(args.data),
        plain=args.plain,
        entries=args.entries,
        versions={name: importlib.metadata.version(name) for name in LIBRARIES},
    )
    items = _prepare(wanted, model, data)
    profiles = profile_items(model, items, args.output / "profile", entries=args.entries)
    print(
        f"{args.output}: {len(profiles)} items of {', '.join(map(str, lengths))} tokens, {args.held_out} held out at {held_out}"
    )
    for n in lengths:
        losses = [p.loss for p in profiles if p.length == n]
        print(f"  {n:6} tokens: {len(losses)} items, dense answer loss {sum(losses) / len(losses):.4f}")
    peak = peak_rss_bytes()
    seconds = time.monotonic() - start
    print(f"peak memory {peak / 1e6:.0f} MB, {(peak - loaded) / 1e6:.0f} MB above the loaded model; {seconds:.0f} s")
    print(f"next: attnspan plan {args.output} --density 0.5 -o plan.json")
    return 0


def _integers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"lengths is {text!r}: must be whole numbers with commas between; change --lengths") from None


def _fit(lengths: list[int] | None, limit: int | None) -> list[int]:
    if lengths is None:
        fitting = [n for n in LENGTHS if limit is None or n <= limit]
        if not fitting:
            raise UserError(f"the model was made for {limit} tokens, less than {LENGTHS[0]}: choose --lengths")
        return fitting
    if limit is not None and lengths[-1] > limit:
        raise UserError(f"length {lengths[-1]} is beyond the {limit} tokens the model was made for; change --lengths")
    return lengths


def _held_out_length(given: int | None, lengths: list[int], limit: int | None) -> int:
    if given is None:
        longer = lengths[-1] * 3 // 2 // 64 * 64
        return longer if limit is None else min(longer, limit // 64 * 64)
    check_profiled(given)
    if limit is not None and given > limit:
        raise UserError(f"held-out length {given} is beyond the {limit} tokens the model was made for; change --held-out-length")
    return given


def _prepare(wanted: Calibration, model: Any, data: Any) -> list[Item]:
    """The corpus: from the folder when it was made by the same command, else built."""
    from attnspan.calibration.corpus import build_corpus
    from attnspan.calibration.folder import Calibration
    from attnspan.calibration.greedy import GreedyAnswers
    from attnspan.calibration.items import save_items
    from attnspan.calibration.loading import load_tokenizer
    from attnspan.calibration.texts import HELD_OUT, TextSource

    folder = wanted.folder
    if (folder / "calibration.json").is_file():
        there = Calibration.load(folder)
        other = [
            name for name in there.__dataclass_fields__ if name != "versions" and getattr(there, name) != getattr(wanted, name)
        ]
        if replace(there, versions=wanted.versions) != wanted:
            raise UserError(f"{folder} was made with another {', '.join(other)}; use the same options to go on, or another -o")
        return there.calibration_items()
    folder.mkdir(parents=True, exist_ok=True)
    coder = load_tokenizer(Path(wanted.model), folder / "tokenizer")
    answer = GreedyAnswers(model) if wanted.answers == "model" else None
    build = partial(build_corpus, coder, answer, answers=wanted.answers, plain=wanted.plain)
    if data is not None:
        cut = max(1, len(data) // 4)
        if len(data) < 2:
            raise UserError(f"{wanted.data} holds {len(data)} document: must be 2 or more, a quarter is held out; change --data")
        held = build([wanted.held_out_length], wanted.held_out, wanted.seed + 1, data=data[:cut])
        items = build(wanted.lengths, wanted.items, wanted.seed, data=data[cut:])
    else:
        source = TextSource.named(lambda text: coder.encode(text, special=False), HELD_OUT)
        held = build([wanted.held_out_length], wanted.held_out, wanted.seed + 1, source=source)
        items = build(wanted.lengths, wanted.items, wanted.seed)
    save_items(items, folder / "items.jsonl")
    save_items(held, folder / "held_out.jsonl")
    wanted.save()
    return items

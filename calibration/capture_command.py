"""The verb `attnspan capture`: real queries, keys and values for benchmarks."""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError
from attnspan.planner.files import check_output
from attnspan.planner.rules import check_int

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_BUILTIN = "moby_dick"
_LEAST = 128
"""Tokens: below that there is nothing to sample."""


def register_capture(subparsers: Any) -> None:
    """Add the verb to a command line."""
    parser = subparsers.add_parser(
        "capture",
        help="queries, keys and values of a model over a long text, for attnspan bench lsh",
        description="Run a model over a text once, dense, and write what the attention of some layers is given, after RoPE: keys "
        "and values of all tokens, queries of the last ones.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder or .gguf file")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, metavar="FILE", help="the text (UTF-8)")
    text.add_argument("--builtin", nargs="?", const=_BUILTIN, metavar="NAME", help=f"a text of the package ({_BUILTIN})")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="the first N tokens of it (16384)")
    parser.add_argument("--layers", help="with commas, from 0 (the middle one)")
    parser.add_argument("--queries", type=int, default=256, metavar="N", help="queries of the last N tokens (256)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.npz", help="file to write")
    parser.add_argument("--dtype", default="bf16", help="fp32, bf16 (default) or fp16: of the model; fp32 is written as bf16")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.set_defaults(run=run_capture)


def run_capture(args: argparse.Namespace) -> int:
    """Capture and write; all that can be wrong is found before the weights are read."""
    check_int("tokens", args.tokens, _LEAST, 2**30, "; change --tokens")
    check_int("queries", args.queries, 1, args.tokens, "; change --queries")
    if args.threads is not None:
        check_int("threads", args.threads, 1, 4096, "; change --threads")
    check_output(args.output, "-o")
    text, source = _text(args)

    import torch

    from attnspan.calibration.capture import capture, rope_of, save_capture
    from attnspan.calibration.loading import load_model, load_tokenizer, model_limit, read_shape

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    layers = _layers(args.layers, read_shape(args.model).layers)
    limit = model_limit(args.model)
    if limit is not None and args.tokens > limit:
        raise UserError(f"tokens is {args.tokens}: the model was made for {limit}; change --tokens")
    with tempfile.TemporaryDirectory() as scratch:
        tokens = _tokens(load_tokenizer(args.model, Path(scratch)).encode(text), args.tokens, source["name"])
    model, shape = load_model(args.model, args.dtype, args.device)
    arrays = capture(model, tokens, layers, args.queries)
    save_capture(args.output, shape, layers, arrays, rope_of(model.config.get_text_config()), source)
    shown, size = ", ".join(map(str, layers)), args.output.stat().st_size / 1e6
    print(f"{args.output}: {shape.id}, layers {shown}, {len(tokens)} tokens of {source['name']}, {size:.1f} MB")
    print(f"next: attnspan bench lsh --keys {args.output} --context {len(tokens)}")
    return 0


def _text(args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The text, and what to remember of where it is from."""
    if args.builtin is not None:
        from attnspan.calibration.texts import load

        text, name = load(args.builtin), args.builtin
    else:
        try:
            text, name = args.text.read_text(encoding="utf-8"), args.text.name
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {args.text}: {getattr(error, 'strerror', None) or error}; change --text") from None
    return text, {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _layers(text: str | None, count: int) -> list[int]:
    if text is None:
        return [count // 2]
    try:
        layers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise UserError(f"layers is {text!r}: must be whole numbers with commas between; change --layers") from None
    for layer in layers:
        check_int("layer", layer, 0, count - 1, "; change --layers")
    return layers


def _tokens(ids: list[int], wanted: int, name: str) -> npt.NDArray[np.int64]:
    import numpy as np

    if len(ids) < wanted:
        raise UserError(f"tokens is {wanted}: the text {name} has {len(ids)}; change --tokens, or give a longer --text")
    return np.array(ids[:wanted], np.int64)

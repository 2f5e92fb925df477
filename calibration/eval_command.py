"""The verb `attnspan eval`: dense, uniform and plans side by side on retrieval tasks, loss and KL."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from attnspan.calibration.eval_methods import DENSITY, methods_of, numbers
from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole
from attnspan.planner.rules import check_int


def register_eval(subparsers: Any) -> None:
    """Add the verb to a command line."""
    parser = subparsers.add_parser(
        "eval",
        help="what a plan costs in quality: retrieval, perplexity, KL, against dense and uniform",
        description="Score methods side by side on the same items: a checkpoint in PyTorch, dense, under plans and under uniform "
        "windows of the same density; or exported artefacts, which may have sampled heads: their answers are decoded token by "
        "token. Interrupted, the same command goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="Hugging Face folder or .gguf file; or artefact folders, one or more"
    )
    parser.add_argument("--plan", type=Path, action="append", default=[], metavar="FILE", help="a plan; may be repeated")
    parser.add_argument("--baselines", help="dense,uniform (default), one of them, or none")
    parser.add_argument("--density", help=f"without --plan: densities of uniform windows, with commas (default {DENSITY})")
    parser.add_argument(
        "--tasks", default="passkey,multikey", help="passkey, needle, multikey, lines, variables, frequency, perplexity; with "
        "commas, or all (default passkey,multikey)",
    )  # fmt: skip
    parser.add_argument("--lengths", default="2048,4096", help="tokens, with commas (default 2048,4096)")
    parser.add_argument("--depths", type=int, default=5, help="places of the answer, from start to end (default 5)")
    parser.add_argument("--n", type=int, default=20, help="items of every task, length and depth (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the items (default 0)")
    parser.add_argument("--plain", action="store_true", help="no chat template")
    parser.add_argument("--dtype", help="fp32, bf16 (default) or fp16; of a checkpoint")
    parser.add_argument("--device", help="cpu (default) or cuda; of a checkpoint")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("-o", "--output", type=Path, default=Path("eval"), metavar="DIR", help="default eval")
    parser.set_defaults(run=run_eval)


def run_eval(args: argparse.Namespace) -> int:
    """Evaluate, write results.json, table.txt and PNGs, print the table."""
    from attnspan.calibration.evaluate import depths_of, evaluate
    from attnspan.calibration.figures import draw
    from attnspan.calibration.tables import table

    tasks = _tasks(args.tasks)
    lengths = sorted(set(numbers("lengths", args.lengths, int)))
    for n in lengths:
        check_int("length", n, 64, 2**30, "; change --lengths")
    check_int("depths", args.depths, 1, 1000, "; change --depths")
    check_int("n", args.n, 1, 10**6, "; change --n")
    check_int("seed", args.seed, 0, 2**63, "; change --seed")
    if args.threads is not None:
        check_int("threads", args.threads, 1, 4096, "; change --threads")
    with tempfile.TemporaryDirectory() as scratch:
        coder, methods = methods_of(args, lengths, Path(scratch))
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {args.output}: {error.strerror}; change -o") from None
        results = evaluate(
            methods.scorers,
            coder,
            tasks,
            lengths,
            depths_of(args.depths),
            args.n,
            args.seed,
            plain=args.plain,
            describe=methods.describe,
            folder=args.output,
        )
    content = results.to_dict() | {"densities": methods.densities(lengths)}
    shown = table(content)
    write_whole(args.output / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    write_whole(args.output / "table.txt", (shown + "\n").encode())
    pictures = draw(content, args.output)
    print(shown)
    print("\n" + "\n".join(str(path) for path in [args.output / "results.json", *pictures]))
    return 0


def _tasks(text: str) -> list[str]:
    from attnspan.calibration.tasks import TASKS, task_named

    return list(TASKS) if text == "all" else list(dict.fromkeys(task_named(name.strip()).name for name in text.split(",")))

"""A chat on a machine with CPUs alone and little memory: int4 weights, an int8 KV cache, and a cap on memory that is kept.

    python samples/edge/edge.py prepare FOLDER --memory 350MB     # on any machine: plan and export what fits
    python samples/edge/edge.py chat FOLDER --memory 350MB        # on the small one: converse

FOLDER/artefact is what the small machine needs. The model is SmolLM2-135M-Instruct, fetched as `make demo` does, with the plan
that was calibrated for it; --model takes another.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))
import fit

from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.rules import check_int
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.generate import Generation
from attnspan.runtime.memory import peak_rss_bytes

SAMPLES = Path(__file__).parents[1]
PLAN = SAMPLES / "data" / "smollm2_135m_plan.json"
WORD = 80
"""Bytes of tokenizer.json for a word of the vocabulary, where the file is not written yet."""
LENGTH = 8192
"""Longest context when the model does not say what it was made for."""


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    make = verbs.add_parser("prepare", help="choose the context and what it keeps, and export", allow_abbrev=False)
    make.add_argument("--model", help="Hugging Face folder, .gguf file or hub id (default: SmolLM2-135M-Instruct)")
    make.add_argument("--plan", type=Path, metavar="FILE", help="a calibrated plan for --model (default: uniform densities)")
    make.add_argument("--context", type=int, metavar="N", help="longest conversation in tokens (default: all the model takes)")
    make.add_argument("--no-verify", action="store_true", help="do not compare the artefact with the model")
    make.add_argument("--dry-run", action="store_true", help="print what would be chosen, and write nothing")
    talk = verbs.add_parser("chat", help="converse, one message a line", allow_abbrev=False)
    talk.add_argument("--threads", type=int, metavar="N", help="threads (default: physical cores)")
    talk.add_argument("--max-new-tokens", type=int, metavar="N", default=256, help="at most N tokens an answer (default 256)")
    for verb in (make, talk):
        verb.add_argument("folder", type=Path, metavar="FOLDER", help="where everything is")
        verb.add_argument("--memory", required=True, metavar="SIZE", help="most memory the chat may take: 350MB, 1.5GB, 1GiB")
    try:
        args = parser.parse_args()
        cap = fit.read_size(args.memory)
        return prepare(args, cap) if args.verb == "prepare" else chat(args, cap)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def prepare(args: argparse.Namespace, cap: int) -> int:
    """Choose the plan that the cap leaves room for, and export it; nothing is written where none fits."""
    given = args.model or str(demo().fetch_model(args.folder))
    calibrated = args.plan or (None if args.model else PLAN)
    model, source, limit = describe(given, args.folder)
    if args.context is not None:
        limit = check_int("--context", args.context, fit.LEAST, limit, f" (what {given} was made for)")
    plan = fit.choose(cap, model, source.shape, limit, None if calibrated is None else Plan.load(calibrated))
    print(f"{plan.n_max} tokens at density {plan.density():.2f}; takes at most {model.need(plan)}")
    if args.dry_run:
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    plan.save(args.folder / "plan.json")
    words = ["export", given, args.folder / "artefact", "--plan", args.folder / "plan.json", "--weights", "int4"]
    words += ["--cache-dtype", fit.CACHE, "--overwrite"]
    words += ["--no-verify"] if args.no_verify else ["--verify-tokens", min(1024, plan.n_max // 2)]
    print(f"\n$ {shlex.join(['attnspan', *map(str, words)])}", flush=True)
    # A process of its own: exporting takes more memory than the chat, and a chat may follow in this one.
    return subprocess.run([Path(sys.executable).with_name("attnspan"), *map(str, words)], check=False).returncode


def describe(given: str, folder: Path) -> tuple[fit.Model, Any, int]:
    """What the arithmetic needs of a model that is not exported yet; its source; the longest text it was made for."""
    from attnspan.export.pipeline import Options, prepare
    from attnspan.export.source import open_source

    source = open_source(given)
    limit = source.config.get("max_position_embeddings") or LENGTH
    # Weights do not depend on the plan; a dry run tells their size to the byte.
    out = folder.absolute().parent / f".{folder.name}.none"
    files = prepare(Options(given, out, weights="int4", cache_dtype=fit.CACHE, n_max=min(limit, LENGTH)), dry=True).files
    tokenizer = files.get("tokenizer.json") or WORD * int(source.config["vocab_size"])
    return _model(int(files["model.onnx.data"] or 0), tokenizer, source.config), source, limit


def _model(weights: int, tokenizer: int, config: Any) -> fit.Model:
    return fit.Model(weights, tokenizer, config["hidden_size"], config["intermediate_size"], config["vocab_size"])


def chat(args: argparse.Namespace, cap: int) -> int:
    """Converse until the end of the input or of the context. UserError, before weights are read, where the cap is too small."""
    if args.threads is not None:
        check_int("--threads", args.threads, 1, 4096)
    artefact = Artefact.load(args.folder / "artefact")
    sizes = {name: entry["bytes"] for name, entry in artefact.info["files"].items()}
    if artefact.cache_dtype != fit.CACHE or "tokenizer.json" not in sizes:
        raise UserError(f"{artefact.folder} is not of this sample: make it with prepare {args.folder} --memory {args.memory}")
    need = _model(sizes["model.onnx.data"], sizes["tokenizer.json"], artefact.config).need(artefact.plan)
    if need.total > cap:
        raise UserError(
            f"--memory is {fit.megabytes(cap)}: {artefact.folder}, for {artefact.n_max} tokens at density "
            f"{artefact.plan.density():.2f}, takes {need}; give --memory {need.total // 10**6 + 1}MB or more, or make it again "
            f"for less: prepare {args.folder} --memory {args.memory}"
        )
    from attnspan.cpu_runtime import Session

    session = Session(artefact, threads=args.threads, chunk=fit.CHUNK)
    session.tokenizer.encode("")  # read it now
    loaded, grows = rss_bytes(), need.caches + need.working + int(fit.ROWS * sizes["model.onnx.data"])
    if loaded + grows > cap:
        raise UserError(
            f"--memory is {fit.megabytes(cap)}: loaded, the model takes {fit.megabytes(loaded)} here, and "
            f"{fit.megabytes(grows)} may come on top; give --memory {(loaded + grows) // 10**6 + 1}MB or more"
        )
    kept = f"{artefact.n_max} tokens, density {artefact.plan.density():.2f}"
    print(f"[{kept}; at most {need} of {fit.megabytes(cap)}]", file=sys.stderr)
    return converse(session, args, cap)


def rss_bytes() -> int:
    """Resident set of this process now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def converse(session: Any, args: argparse.Namespace, cap: int) -> int:
    """One message a line. Ends with a message where the context does."""
    messages: list[dict[str, str]] = []
    n_max = session.artefact.n_max
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        tokens = len(session.tokenizer.encode(session.tokenizer.render(messages), special=False))
        if tokens >= n_max:
            print(f"[the conversation has {tokens} tokens, the context takes {n_max}: it ends here]", file=sys.stderr)
            return 0
        result = session.generate(
            messages,
            min(args.max_new_tokens, n_max - tokens),
            continue_=True,
            on_text=lambda _, piece: print(piece, end="", flush=True),
        )[0]
        print(flush=True)
        messages.append({"role": "assistant", "content": result.text or ""})
        if report(session, result, cap):
            return 1
        if result.finish_reason == "context":
            print(f"[the context of {n_max} tokens is full: the conversation ends here]", file=sys.stderr)
            return 0


def report(session: Any, result: Generation, cap: int) -> bool:
    """Print figures of an answer; whether the cap was broken."""
    peak = peak_rss_bytes()
    print(
        f"[{result.prompt_tokens} tokens read, first after {result.ttft:.2f} s, {len(result.tokens)} new at "
        f"{result.tokens_per_second:.1f} tokens/s, {int(session.lengths[0])} of {session.artefact.n_max} tokens, "
        f"peak RSS {fit.megabytes(peak)} of {fit.megabytes(cap)}]",
        file=sys.stderr,
        flush=True,
    )
    return peak > cap


def demo() -> ModuleType:
    """samples/demo.py, which knows where the model is."""
    spec = importlib.util.spec_from_file_location("demo", SAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())

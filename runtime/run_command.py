"""The verb `run`: text by an artefact, whatever runs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError

if TYPE_CHECKING:
    from attnspan.runtime.artefact import Artefact
    from attnspan.runtime.generate import Generation
    from attnspan.runtime.sampling import Sampling
    from attnspan.runtime.session import RowSession
    from attnspan.runtime.text import Prompt

__all__ = ["Runner", "register"]

_LONG_PROMPT = 512
"""Tokens from which on reading a prompt shows a bar."""


@dataclass(frozen=True)
class Runner:
    """What runs the artefacts of some targets.

    add_options: adds the options that only this runner takes; each is None or False unless given. check: UserError for values of
    them that cannot be, before anything is read. open: a session over an artefact, as the options say.
    """

    targets: tuple[str, ...]
    add_options: Callable[[Any], None]
    check: Callable[[argparse.Namespace], None]
    open: Callable[[Artefact, argparse.Namespace], RowSession]


def register(subparsers: Any, runners: Sequence[Runner]) -> None:
    """Add the verb to the program `attnspan`."""
    parser = subparsers.add_parser(
        "run",
        help="generate text with an artefact",
        description="The answer goes to standard output, one line of figures to standard error.",
        allow_abbrev=False,
    )
    parser.add_argument("artefact", metavar="DIR", type=Path, help="artefact folder, as made by attnspan export")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    source.add_argument("--prompt-file", metavar="FILE", help="file with the prompt (UTF-8); - is standard input")
    source.add_argument("--chat", action="store_true", help="converse: one message a line, until end of input")
    parser.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="at most N new tokens (default 256)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-k", metavar="K", type=int, default=0, help="the K likeliest tokens only (0: all)")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="the likeliest tokens that make up P (1: all)")
    parser.add_argument("--min-p", metavar="P", type=float, default=0.0, help="tokens at least P as likely as the likeliest")
    parser.add_argument("--repetition-penalty", metavar="X", type=float, default=1.0, help="above 1 repeats less")
    parser.add_argument("--seed", metavar="S", type=int, help="makes sampling repeatable")
    parser.add_argument("--load", metavar="FILE", type=Path, help="go on from what --save wrote; needs --raw")
    parser.add_argument("--save", metavar="FILE", type=Path, help="at the end, write caches and indexes to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    own: dict[str, tuple[str, Runner]] = {}
    for runner in runners:
        before = set(parser._option_string_actions)
        runner.add_options(parser.add_argument_group(f"artefacts of target {' or '.join(runner.targets)}"))
        new = {option: action for option, action in parser._option_string_actions.items() if option not in before}
        own |= {action.dest: (option, runner) for option, action in new.items()}
    parser.set_defaults(run=lambda args: _run(args, runners, own))


def _open(args: argparse.Namespace, runners: Sequence[Runner], own: dict[str, tuple[str, Runner]]) -> RowSession:
    """A session by the runner of the artefact's target. UserError for options of another runner."""
    from attnspan.runtime.artefact import Artefact

    given = [entry for dest, entry in own.items() if getattr(args, dest) is not None and getattr(args, dest) is not False]
    for _, runner in given:
        runner.check(args)
    artefact = Artefact.load(args.artefact)
    for runner in runners:
        if artefact.target in runner.targets:
            break
    else:
        known = ", ".join(target for runner in runners for target in runner.targets)
        raise UserError(f"{args.artefact} was exported for target {artefact.target!r}: must be one of {known}")
    for option, of in given:
        if of is not runner:
            targets = " or ".join(of.targets)
            raise UserError(f"{option} is for target {targets}: {args.artefact} is of target {artefact.target}; drop {option}")
    return runner.open(artefact, args)


def _run(args: argparse.Namespace, runners: Sequence[Runner], own: dict[str, tuple[str, Runner]]) -> int:
    from attnspan.runtime.sampling import Sampling

    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    if args.raw and (args.chat or args.system is not None):
        raise UserError("--raw leaves out the chat template: give it without --chat and --system")
    if args.chat and args.json:
        raise UserError("--json prints one answer: give it without --chat")
    if args.load is not None and not args.raw:
        raise UserError("--load goes on with the text as it is: add --raw")
    text = None if args.chat else _prompt(args)
    session = _open(args, runners, own)
    if args.load is not None:
        session.load(args.load)
    if args.chat:
        return _converse(session, args, sampling)
    prompt: Prompt
    if args.raw or not session.tokenizer.has_chat_template:
        if args.system is not None:
            raise UserError(f"{args.artefact} has no chat template: leave out --system")
        prompt = str(text)
    else:
        prompt = [*_system(args), {"role": "user", "content": str(text)}]
    result = _answer(session, prompt, args, sampling, show=not args.json)
    if args.save is not None:
        session.save(args.save)
    figures = _figures(session, result)
    if args.json:
        print(json.dumps({"text": result.text, "tokens": result.tokens, **figures}, ensure_ascii=False))
    else:
        print(flush=True)
        print(_line(figures), file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    if args.prompt_file is None:
        raise UserError("no prompt: give -p TEXT, --prompt-file FILE or --chat")
    try:
        if args.prompt_file == "-":
            return sys.stdin.read()
        return Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {args.prompt_file}: {reason}; change --prompt-file") from None


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _converse(session: RowSession, args: argparse.Namespace, sampling: Sampling) -> int:
    """Read a message a line, answer each; the cache goes on from turn to turn."""
    if not session.tokenizer.has_chat_template:
        raise UserError(f"{args.artefact} has no chat template: --chat needs one; give -p TEXT --raw")
    messages = _system(args)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            if args.save is not None:
                session.save(args.save)
            return 0
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        result = _answer(session, messages, args, sampling, show=True)
        messages.append({"role": "assistant", "content": result.text or ""})
        print(flush=True)
        print(_line(_figures(session, result)), file=sys.stderr)


def _answer(session: RowSession, prompt: Prompt, args: argparse.Namespace, sampling: Sampling, show: bool) -> Generation:
    def on_text(_row: int, piece: str) -> None:
        print(piece, end="", flush=True)

    progress = _Progress()
    try:
        return session.generate(
            prompt,
            args.max_new_tokens,
            sampling,
            continue_=True,  # a new session is empty; a conversation goes on
            on_text=on_text if show else None,
            on_progress=progress,
        )[0]
    except KeyboardInterrupt:
        if show:
            print(flush=True)
        raise
    finally:
        progress.close()


class _Progress:
    """A bar on standard error while a long prompt is read; nothing unless that is a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, _row: int, done: int, total: int) -> None:
        if self._bar is None:
            if total <= _LONG_PROMPT or done >= total or not sys.stderr.isatty():
                return
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc="reading the prompt", unit="token", leave=False, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _figures(session: RowSession, result: Generation) -> dict[str, Any]:
    from attnspan.runtime.memory import peak_rss_bytes

    return {
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.tokens),
        "ttft_seconds": result.ttft,
        "tokens_per_second": result.tokens_per_second,
        "kv_bytes": session.kv_bytes,
        "state_bytes": session.state_bytes,
        "dense_kv_bytes": session.artefact.dense_kv_bytes(session.batch),
        "n_max": session.artefact.n_max,
        "peak_rss_bytes": peak_rss_bytes(),
        **session.backend,
    }


def _line(figures: dict[str, Any]) -> str:
    guarded = ""
    if "guarded_steps" in figures:
        guarded = f"{figures['guarded_steps_exact']} of {figures['guarded_steps']} guarded steps exact, "
    indexes = f"indexes {figures['state_bytes'] / 1e6:.1f} MB, " if figures["state_bytes"] else ""
    speed = f" at {figures['tokens_per_second']:.1f} tokens/s" if figures["new_tokens"] > 1 else ""
    return (
        f"[prompt {figures['prompt_tokens']} tokens, first token after {figures['ttft_seconds']:.2f} s, "
        f"{figures['new_tokens']} new{speed}, "
        f"KV {figures['kv_bytes'] / 1e6:.1f} MB of {figures['dense_kv_bytes'] / 1e6:.1f} MB dense "
        f"for {figures['n_max']} tokens, {indexes}{guarded}"
        f"peak RSS {figures['peak_rss_bytes'] / 1e6:.0f} MB]"
    )

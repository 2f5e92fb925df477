"""The program `attnspan`: one verb for each stage."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib.metadata
import os
import signal
import sys
from typing import Any, NoReturn

from attnspan.export.verify import VerificationError
from attnspan.planner.errors import UserError
from attnspan.planner.shape import ModelShape

FULL = (errno.ENOSPC, errno.EDQUOT)


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        """A wrong command line."""
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each verb sets `run`, a function from arguments to exit status."""
    from attnspan.calibration import commands as calibration
    from attnspan.cpu_runtime import commands as cpu_runtime
    from attnspan.export import commands as export
    from attnspan.export.package import commands as package
    from attnspan.planner import commands as planner
    from attnspan.plugins.trt_sparse_attn import commands as trt
    from attnspan.plugins.trt_sparse_attn.runner import RUNNER
    from attnspan.runtime import run_command

    top = Parser(prog="attnspan", description="Language models with attention cut to what each head needs.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"attnspan {importlib.metadata.version('attnspan')}")
    verbs: Any = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    kinds = planner.register(verbs, _read_model)
    calibration.register(verbs, kinds)
    export.register(verbs)
    package.register(verbs)
    trt.register(verbs)
    run_command.register(verbs, [cpu_runtime.RUNNER, RUNNER])
    cpu_runtime.register(verbs)
    return top


def _read_model(model: str) -> tuple[ModelShape, int | None]:
    from attnspan.export.source import read_model

    return read_model(model)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line. UserError, with the nearest known word, for one that is not understood."""
    top = parser()
    known = _words(top)
    # `attnspan plan DIR` is the kind that needs a calibration folder.
    if argv[:1] == ["plan"] and argv[1:2] and not argv[1].startswith("-") and argv[1] not in known["attnspan plan"]:
        near = _hint(argv[1], known["attnspan plan"])
        if near and not os.path.exists(argv[1]):
            raise UserError(f"{argv[1]!r} is neither a kind of plan nor a calibration folder{near}; see attnspan plan --help")
        argv = ["plan", "calibrated", *argv[1:]]
    try:
        args, unknown = top.parse_known_args(argv)
    except UserError:
        verb = next((x for x in argv if not x.startswith("-")), None)
        if verb is None or verb in known["attnspan"]:
            raise
        raise UserError(f"unknown verb {verb!r}{_hint(verb, known['attnspan'])}; see attnspan --help") from None
    if unknown:
        word = unknown[0].split("=")[0]
        of_verb = [words for program, words in known.items() if f"{program} ".startswith(f"attnspan {args.verb} ")]
        hint = _hint(word, {each for words in of_verb for each in words} - {word})
        raise UserError(f"unknown argument {unknown[0]!r}{hint}; see attnspan {args.verb} --help")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit status is 0, 1 (failed), 2 (a user's mistake), 130 (interrupted) or 143 (terminated)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-written is removed
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: let the exit's flush go nowhere
        return 1
    except OSError as error:
        reason = "the disk is full" if error.errno in FULL else error.strerror or str(error)
        print(f"error: {reason}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return 1


def _words(top: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Options and verbs of every parser below and including `top`, by program name."""
    found = {top.prog: [option for action in top._actions for option in action.option_strings]}
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            found[top.prog] += action.choices
            for below in action.choices.values():
                found |= _words(below)
    return found


def _hint(word: str, known: list[str] | set[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), 1)
    return f", did you mean {near[0]!r}?" if near else ""

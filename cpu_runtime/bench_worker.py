"""A process of its own for each artefact of a benchmark, so that each has its own peak of memory."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError

__all__ = ["Worker"]


class Worker:
    """Holds a session in a process that works only when told to. Use as a context manager.

    options: keyword arguments of `Session`.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, folder, options), daemon=True)
        self._process.start()
        theirs.close()
        self.load_seconds: float = self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.join()

    def measure(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """Generate from empty rows, never stopping early.

        `ttft`: seconds until every row has its first token. `token_seconds`: of each decode step.
        `peak_rss_bytes`: of the process so far. `library`: the op library it runs with.
        """
        self._connection.send((prompts, new_tokens))
        answer: dict[str, Any] = self._answer()
        return answer

    def _answer(self) -> Any:
        try:
            good, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a benchmark process ended by itself, exit code {self._process.exitcode}") from None
        if not good:
            raise UserError(answer)
        return answer


def _serve(connection: Connection, folder: Path, options: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    try:
        from attnspan.cpu_runtime.session import Session
        from attnspan.runtime.memory import peak_rss_bytes

        start = time.perf_counter()
        session = Session(folder, **options)
        connection.send((True, time.perf_counter() - start))
        while True:
            prompts, new_tokens = connection.recv()
            results = session.generate(prompts, new_tokens, stop_tokens=frozenset())
            measured = {
                "ttft": max(result.ttft for result in results),
                "token_seconds": results[0].token_seconds,
                "peak_rss_bytes": peak_rss_bytes(),
                "library": None if session.library is None else str(session.library),
            }
            connection.send((True, measured))
    except UserError as error:
        connection.send((False, str(error)))
    except (EOFError, BrokenPipeError):
        pass  # the parent is done

"""Continuous batching: jobs join and leave between the steps of one batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attnspan.runtime.generate import IDLE, OnProgress
from attnspan.runtime.sampling import Sampler
from attnspan.runtime.tokenizer import StreamDecoder, Tokenizer
from server.admission import Admission
from server.jobs import Job, Update
from server.metrics import Metrics
from server.stops import StopFinder

__all__ = ["STOPPING", "Rows", "Scheduler"]

STOPPING = "the server stops"
"""What jobs are told that are not finished when it does."""
_log = logging.getLogger("attnspan.server")


class Rows(Protocol):
    """What is needed of a session."""

    batch: int
    vocab_size: int

    def prefill(
        self, row: int, tokens: list[int], keep: int = 1, on_progress: OnProgress | None = None
    ) -> npt.NDArray[np.float32]:
        """As `RowSession.prefill`."""

    def decode(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """As `RowSession.decode`."""

    def release(self, row: int) -> None:
        """Empty a row."""


class _LeftError(Exception):
    """A job was cancelled, or the engine is to stop, while its prompt was read."""


@dataclass(eq=False)
class _Running:
    job: Job
    row: int
    sampler: Sampler
    decoder: StreamDecoder
    stops: StopFinder
    token: int = 0
    tokens: int = 0
    at: float = field(default_factory=monotonic)


class Scheduler:
    """One round of work at a time, all by one thread. Prompts are read one at a time in chunks, with a step of those that run
    before each.

    stop_tokens: those that end a text. The tokens of a job depend on its prompt and its sampling alone, as far as rows of a
    step do not influence each other (`BatchSession`). stopping: set by any thread to leave a prompt that is being read.
    """

    def __init__(
        self, session: Rows, tokenizer: Tokenizer, stop_tokens: frozenset[int], admission: Admission, metrics: Metrics
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._stop_tokens = stop_tokens
        self._admission = admission
        self._metrics = metrics
        self.stopping = False
        self._free = list(range(session.batch))
        self._running: list[_Running] = []

    def work(self) -> bool:
        """Read the next prompt that may run, else do one step; False when there is nothing to do."""
        self._drop_cancelled()
        job = self._admission.take()
        if job is not None:
            self._start(job)
        elif self._running:
            self._step()
        else:
            return False
        return True

    def fail(self, reason: str) -> None:
        """Leave all rows; their jobs are told why."""
        for running in list(self._running):
            self._leave(running, Update(tokens=running.tokens, failure=reason))

    def _start(self, job: Job) -> None:
        row = min(self._free)  # steps are as wide as the last row in use
        self._free.remove(row)
        new = _Running(
            job,
            row,
            # Row 0 of any batch: a seed means the same wherever the job runs.
            Sampler(job.sampling, self._session.vocab_size, 0),
            StreamDecoder(self._tokenizer),
            StopFinder(job.stop),
        )

        def between(_: int, done: int, total: int) -> None:
            if job.cancelled or self.stopping:
                raise _LeftError
            self._drop_cancelled()
            if self._running and done < total:
                self._step()

        try:
            logits = self._session.prefill(row, job.prompt, on_progress=between)
        except _LeftError:
            self._leave(new, None if job.cancelled else Update(failure=STOPPING))
            return
        except Exception:
            _log.exception("reading a prompt of %d tokens failed", len(job.prompt))
            self._leave(new, Update(failure="the model failed on this prompt"))
            return
        self._metrics.prompt_tokens.inc(len(job.prompt))
        self._running.append(new)
        new.sampler.observe(job.prompt)
        new.at = job.submitted
        self._accept(new, logits[-1])

    def _step(self) -> None:
        feed = np.full(self._session.batch, IDLE, dtype=np.int64)
        for running in self._running:
            feed[running.row] = running.token
        self._metrics.steps.observe(len(self._running))
        try:
            logits = self._session.decode(feed)
        except Exception:
            _log.exception("a step of %d rows failed", len(self._running))
            self.fail("the model failed")
            return
        for running in list(self._running):
            self._accept(running, logits[running.row])

    def _accept(self, running: _Running, logits: npt.NDArray[np.float32]) -> None:
        """Choose the next token of a row and tell what it spells."""
        job = running.job
        try:
            token = running.sampler.pick(logits)
        except RuntimeError as error:
            _log.error("%s", error)
            self._leave(running, Update(tokens=running.tokens, failure="the model failed"))
            return
        running.sampler.observe([token])
        running.token = token
        running.tokens += 1
        now = monotonic()
        self._metrics.tokens.inc()
        (self._metrics.first_token if running.tokens == 1 else self._metrics.between_tokens).observe(now - running.at)
        running.at = now
        text = running.stops.push(running.decoder.push(token))
        finish = None
        if running.stops.found or token in self._stop_tokens:
            finish = "stop"
        elif running.tokens >= job.max_tokens:
            finish = "length"
        if finish is not None:
            text += running.stops.push(running.decoder.flush())
            if running.stops.found:
                finish = "stop"
            text += running.stops.flush()
            self._leave(running, Update(text, running.tokens, finish))
        else:
            job.publish(Update(text, running.tokens))

    def _leave(self, running: _Running, last: Update | None) -> None:
        """Free the row of a job and tell it how it ended; None: it was cancelled."""
        if running in self._running:
            self._running.remove(running)
        self._session.release(running.row)
        self._free.append(running.row)
        self._admission.finish(running.job)
        self._metrics.finished.labels("cancelled" if last is None else last.finish or "failed").inc()
        if last is not None:
            running.job.publish(last)

    def _drop_cancelled(self) -> None:
        for running in [running for running in self._running if running.job.cancelled]:
            self._leave(running, None)

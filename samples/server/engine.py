"""The thread that computes: takes jobs from the admission and works until told to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from attnspan.planner.errors import UserError
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.memory import available_bytes
from attnspan.runtime.sampling import Sampling
from attnspan.runtime.tokenizer import Tokenizer
from server.admission import Admission
from server.jobs import BusyError, DrainingError, Job, Update
from server.metrics import Metrics
from server.scheduler import STOPPING, Scheduler
from server.session import EXACT_KEPT, BatchSession, kept, kv_bytes
from server.settings import Settings

__all__ = ["Engine"]

_log = logging.getLogger("attnspan.server")
POLL_SECONDS = 1.0
"""Longest sleep of an idle engine."""
CLOSE_SECONDS = 60.0
"""Longest wait for the chunk or step that is being computed when the engine is closed."""
KV_UNKNOWN = 1 << 30
"""Budget where the system does not tell what memory is available."""


class Engine:
    """A session, its queue and its thread. UserError when the folder is no artefact, or has no tokenizer.

    Weights are read by `open`, or else by `start`. The other methods may be called from any thread.
    """

    def __init__(self, settings: Settings) -> None:
        self.artefact = Artefact.load(settings.artefact)
        self.tokenizer = Tokenizer(self.artefact.folder)
        self.metrics = Metrics()
        rows, heads = settings.rows, self.artefact.kv_heads
        full = kv_bytes(self.artefact, self.artefact.n_max)
        budget = settings.kv_bytes or (available_bytes() or 2 * KV_UNKNOWN) // 2
        least = kv_bytes(self.artefact, 1)
        if budget < least:
            raise UserError(f"kv_bytes is {budget}: one row takes {least} at least; change --kv-memory")
        self.admission = Admission(rows, settings.queue, min(budget, rows * full), EXACT_KEPT - 128 * rows * heads)
        self._settings = settings
        self._scheduler: Scheduler | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failed = False
        admission, metrics = self.admission, self.metrics
        metrics.kv_budget.set(admission.kv_budget)
        metrics.running.set_function(lambda: admission.running)
        metrics.waiting.set_function(lambda: admission.waiting)
        metrics.kv_used.set_function(lambda: admission.kv_used)

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused."""
        return self.admission.refusing

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs."""
        return self.admission.idle

    def open(self) -> None:
        """Read the weights and set up the caches. UserError when ONNX Runtime, or memory, is missing."""
        limit, artefact, settings = self.artefact.chunk, self.artefact, self._settings
        chunk = settings.chunk if limit is None else min(settings.chunk, limit)
        session = BatchSession(artefact, batch=settings.rows, threads=settings.threads, chunk=chunk, check_memory=False)
        self._scheduler = Scheduler(session, self.tokenizer, artefact.stop_tokens, self.admission, self.metrics)

    def start(self) -> None:
        """Begin to work."""
        if self._scheduler is None:
            self.open()
        self._thread.start()

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        stop: tuple[str, ...],
        publish: Callable[[Update], None],
    ) -> Job:
        """Queue a text to generate; its updates go to `publish`. BusyError, DrainingError or TooLargeError when it is refused.

        UserError when prompt and new tokens are more than the artefact takes.
        """
        # The last token needs no slot.
        tokens = len(prompt) + max_tokens - 1
        job = Job(
            prompt,
            max_tokens,
            sampling,
            publish,
            stop,
            kv_bytes=kv_bytes(self.artefact, tokens),
            kept=kept(self.artefact, tokens),
        )
        try:
            self.admission.submit(job)
        except (BusyError, DrainingError) as error:
            self.metrics.refused.labels("busy" if isinstance(error, BusyError) else "draining").inc()
            raise
        return job

    def cancel(self, job: Job) -> None:
        """Nobody listens to this job any more: it leaves its row before the next step, or the queue at once."""
        if self.admission.cancel(job):
            self.metrics.finished.labels("cancelled").inc()

    def begin_drain(self) -> None:
        """Take no new jobs; those that wait or run go on."""
        self.admission.refuse()

    def close(self) -> None:
        """Stop at once; jobs that wait or run are told that they failed."""
        self._stopping.set()
        if self._scheduler is not None:
            self._scheduler.stopping = True
        for job in self.admission.clear():
            job.publish(Update(failure=STOPPING))
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        try:
            while not self._stopping.is_set():
                if not scheduler.work():
                    self.admission.wait(POLL_SECONDS)
            scheduler.fail(STOPPING)
        except BaseException:
            _log.exception("the engine failed")
            self.failed = True
            for job in self.admission.clear():
                job.publish(Update(failure="the server failed"))
            scheduler.fail("the server failed")

"""Which jobs wait, which run, and what their caches take."""

from __future__ import annotations

import math
import threading
from collections import deque
from time import monotonic

from server.jobs import BusyError, DrainingError, Job, TooLargeError

__all__ = ["Admission"]

FIRST_GUESS = 2.0
"""Seconds that a job is taken to last before one has finished."""
MAX_RETRY = 60


class Admission:
    """First come, first served, while there are rows and bytes: a job that does not fit yet holds back those after it.

    kv_bytes, kept: what the caches of all running jobs together may take (`Job.kv_bytes`, `Job.kept`).
    Jobs are submitted by any thread, taken and finished by the engine's.
    """

    def __init__(self, rows: int, queue: int, kv_bytes: int, kept: int) -> None:
        self.rows = rows
        self.kv_budget = kv_bytes
        self.kv_used = 0
        self._kept_budget = kept
        self._kept_used = 0
        self._most = rows + queue
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, float] = {}
        self._seconds = FIRST_GUESS
        self._refusing = False
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """Jobs that are accepted and not running."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that have a row."""
        return len(self._running)

    @property
    def refusing(self) -> bool:
        """Whether `refuse` was called."""
        return self._refusing

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs."""
        with self._changed:
            return not self._waiting and not self._running

    def submit(self, job: Job) -> None:
        """Let a job wait. TooLargeError, BusyError or DrainingError when it may not."""
        if job.kv_bytes > self.kv_budget:
            raise TooLargeError(f"it needs {job.kv_bytes} bytes of KV cache: the server has {self.kv_budget}")
        with self._changed:
            if self._refusing:
                raise DrainingError("the server is about to stop")
            if len(self._waiting) + len(self._running) >= self._most:
                raise BusyError(self._retry_after())
            self._waiting.append(job)
            self._changed.notify()

    def take(self) -> Job | None:
        """The next job when it can run now; it counts as running until `finish`."""
        with self._changed:
            if not self._waiting or len(self._running) >= self.rows:
                return None
            job = self._waiting[0]
            # A job alone may keep more than the budget: there is nobody whom it could disturb.
            if self._running and self._kept_used + job.kept > self._kept_budget:
                return None
            if self.kv_used + job.kv_bytes > self.kv_budget:
                return None
            self._waiting.popleft()
            self._running[job] = monotonic()
            self.kv_used += job.kv_bytes
            self._kept_used += job.kept
            return job

    def finish(self, job: Job) -> None:
        """A running job has left its row."""
        with self._changed:
            started = self._running.pop(job)
            self.kv_used -= job.kv_bytes
            self._kept_used -= job.kept
            self._seconds += 0.1 * (monotonic() - started - self._seconds)

    def cancel(self, job: Job) -> bool:
        """Forget a job, and whether it was waiting; one that runs leaves its row before the next step."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            return True

    def refuse(self) -> None:
        """Take no new jobs from now on."""
        with self._changed:
            self._refusing = True
            self._changed.notify()

    def clear(self) -> list[Job]:
        """Refuse new jobs and forget those that wait; returns them."""
        with self._changed:
            self._refusing = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
            return left

    def wait(self, seconds: float) -> None:
        """Return when something has changed, at the latest after some seconds."""
        with self._changed:
            if not self._waiting:
                self._changed.wait(seconds)

    def _retry_after(self) -> int:
        ahead = (len(self._waiting) + 1) / self.rows
        return max(1, min(MAX_RETRY, math.ceil(self._seconds * ahead)))

"""What is asked of the engine and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from attnspan.runtime.sampling import Sampling

__all__ = ["BusyError", "DrainingError", "Job", "TooLargeError", "Update"]


@dataclass(frozen=True)
class Update:
    """What a job has brought forth since the last one.

    text: may be empty. tokens: generated so far. finish: `stop` or `length` in the last update of a job that went well.
    failure: why there will be no more.
    """

    text: str = ""
    tokens: int = 0
    finish: str | None = None
    failure: str | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.failure is not None


@dataclass(eq=False)
class Job:
    """One text to generate.

    prompt: token ids. max_tokens: most tokens to generate. stop: texts at which to end, themselves left out. publish: called
    with each update, by the engine's thread. cancelled: set by any thread when nobody listens any more.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    publish: Callable[[Update], None]
    stop: tuple[str, ...] = ()
    cancelled: bool = False
    submitted: float = field(default_factory=monotonic)
    kv_bytes: int = 0
    """Of its caches at their longest."""
    kept: int = 0
    """Tokens that the heads of a layer keep for it at its longest."""


class BusyError(Exception):
    """The queue is full. retry_after: seconds after which it may be worth asking again."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the server is busy: its queue is full")
        self.retry_after = retry_after


class DrainingError(Exception):
    """The server takes no new jobs: it is about to stop, or has failed."""


class TooLargeError(Exception):
    """The caches of a job are larger than what all jobs together may have."""

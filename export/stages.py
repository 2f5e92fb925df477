"""Time and memory of the stages of a long command."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from attnspan.runtime.memory import peak_rss_bytes


@dataclass(frozen=True)
class Stage:
    """One stage: seconds of wall time, and peak resident memory of its process in bytes."""

    name: str
    seconds: float
    peak_rss: int


class Stages(list[Stage]):
    """The stages so far, in order."""

    @contextmanager
    def measure(self, name: str, child: bool = False) -> Iterator[None]:
        """Measure the body of a `with`; with `child`, the memory is that of the largest child process so far."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak afresh
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 if child else peak_rss_bytes()
        self.append(Stage(name, seconds, peak))

"""The progress of a TensorRT build as bars on the terminal, and the way to stop it."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

__all__ = ["monitor"]


def monitor(trt: Any) -> Any:
    """A progress monitor of TensorRT: one bar a phase; `stopped = True` ends the build at its next step; `close()` clears up."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.bars: dict[str, Any] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.bars[phase] = tqdm(total=steps, desc=phase, position=len(self.bars), leave=False, disable=None, delay=1)

        def step_complete(self, phase: str, step: int) -> bool:
            bar = self.bars.get(phase)
            if bar is not None:
                bar.update(step + 1 - bar.n)
            return not self.stopped

        def phase_finish(self, phase: str) -> None:
            bar = self.bars.pop(phase, None)
            if bar is not None:
                bar.close()

        def close(self) -> None:
            for phase in list(self.bars):
                self.phase_finish(phase)

    return Monitor()

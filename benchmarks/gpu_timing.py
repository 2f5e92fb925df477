"""Time of a GPU kernel: cold second-level cache, CUDA events, all contenders in turns, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], object]

MIN_ROUNDS, MAX_ROUNDS = 5, 60
FLUSH_BYTES = 512 << 20  # several times the largest second-level cache, and long enough to hide the launch of what follows


class Stopwatch:
    """Measures on `device`; on a CPU one round with the wall clock, which says that everything runs and nothing else."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device) if self.cuda else None

    def prepare(self, step: Step) -> tuple[Step, bool]:
        """Runs `step` until it is compiled, and captures it as a CUDA graph: (what to time, whether it is a graph).

        A graph leaves out the time that Python takes to launch, as a serving engine does. What cannot be captured runs as it is.
        """
        if not self.cuda:
            return step, False
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError:
            torch.cuda.synchronize()
            return step, False
        return graph.replay, True

    def quick(self, step: Step) -> float:
        """Seconds of one call, roughly: the least of three after a warm-up. To choose among forms of one baseline."""
        step()
        return min(self._once(step) for _ in range(3))

    def rounds(self, steps: Mapping[str, Step], seconds: float) -> dict[str, float]:
        """Median seconds of each step. Rounds run all of them, every other one in reverse, for about `seconds` in all."""
        names = list(steps)
        times: dict[str, list[float]] = {name: [] for name in names}
        if not self.cuda:
            return {name: self._once(step) for name, step in steps.items()}
        started = time.perf_counter()
        for turn in range(MAX_ROUNDS):
            pairs = []
            for name in names if turn % 2 == 0 else reversed(names):
                pairs.append((name, *self._enqueue(steps[name])))
            torch.cuda.synchronize()
            if turn:  # the first round warms up
                for name, start, end in pairs:
                    times[name].append(start.elapsed_time(end) / 1e3)
            if turn >= MIN_ROUNDS and time.perf_counter() - started > seconds:
                break
        return {name: statistics.median(each) for name, each in times.items()}

    def _once(self, step: Step) -> float:
        if self.cuda:
            start, end = self._enqueue(step)
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    def _enqueue(self, step: Step) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        assert self._flush is not None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.amax()  # read, not written: lines to write back would be charged to the step
        start.record()
        step()
        end.record()
        return start, end


def copy_bandwidth(watch: Stopwatch, size: int) -> float:
    """Bytes a second of a device-to-device copy of `size` bytes, read and written bytes both counted."""
    source = torch.ones(size, dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    seconds = watch.rounds({"copy": lambda: target.copy_(source)}, 1.0)["copy"]
    return 2 * size / seconds

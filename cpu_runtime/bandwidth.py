"""Memory read bandwidth of this machine, measured: what every speed is a share of."""

from __future__ import annotations

import threading
import time

import numpy as np

__all__ = ["ReadPass"]


class ReadPass:
    """A buffer that `measure` reads with a number of threads.

    `size` in bytes, default 1 GiB: well past the last-level cache of most machines. A pass is numpy's maximum
    over fp32, a vector load and a compare per register, which ran as fast as hand-written AVX2 loads where it
    was compared. Speeds move with the load of the machine: measure in the same run as what is compared.
    """

    def __init__(self, threads: int, size: int = 1 << 30) -> None:
        # Ones: pages that were never written all map to one page of zeros, which stays in the cache.
        self._parts = np.array_split(np.ones(size // 4, dtype=np.float32), threads)

    def measure(self, passes: int = 5) -> float:
        """Read the buffer; GB (1e9 bytes) a second of the fastest of some passes, as others use the memory too."""
        return max(self._read() for _ in range(passes))

    def _read(self) -> float:
        workers = [threading.Thread(target=part.max) for part in self._parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(part.nbytes for part in self._parts) / (time.perf_counter() - start) / 1e9

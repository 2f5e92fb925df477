"""Memory of this process: what it has used, what it can still get, and large arrays."""

from __future__ import annotations

import math
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError

__all__ = ["available_bytes", "check_indexes_fit", "peak_rss_bytes", "zeros"]

HUGE_PAGE = 2 << 20
HUGE_FROM = 8 << 20
"""Arrays of so many bytes ask for huge pages; the processor keeps the page tables of smaller ones."""


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of zeros, its memory taken from the system as it is first written, in huge pages where large and where allowed.

    It starts at a page, or at a huge one. MemoryError when the system refuses.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    huge = size >= HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE")
    # Python's default would be shared memory, which huge pages treat differently.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    try:
        memory = mmap.mmap(-1, max(size, 1) + (HUGE_PAGE if huge else 0), **private)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{size} bytes: {error}") from None
    start = 0
    if huge:
        start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            start = 0  # a kernel without them
    return np.frombuffer(memory, dtype, math.prod(shape), start).reshape(shape)


def available_bytes() -> int | None:
    """Bytes that this process can still take without swapping, by the system and by the limit of its container; None: unknown."""
    room = _meminfo()
    for folder, most, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = int((folder / most).read_text())  # "max" where there is none
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            files = int(stat["active_file"]) + int(stat["inactive_file"])  # given back when needed
            left = max(0, limit - max(0, int((folder / used).read_text()) - files))
        except (OSError, ValueError, KeyError):
            continue
        room = left if room is None else min(room, left)
    return room


def check_indexes_fit(kv_bytes: int, state_bytes: int, what: str, fix: str) -> None:
    """UserError when indexes of sampled heads, and the caches that they are of, are larger than the memory that is available.

    Without indexes anything goes: caches take memory as the text grows, and who has less may still run short texts.
    """
    free = available_bytes()
    if state_bytes and free is not None and kv_bytes + state_bytes > free:
        raise UserError(
            f"no memory for indexes of {state_bytes / 1e9:.2f} GB and caches of {kv_bytes / 1e9:.2f} GB ({what}): "
            f"{free / 1e9:.2f} GB are available; {fix} plan with a smaller --n-max, or with --index sketch or signature "
            "in place of tables, and export again"
        )


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes; memory-mapped weights are counted where touched.

    Linux: VmHWM, which starts afresh at exec (ru_maxrss would carry over the peak of the parent).
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""Large arrays, and how much memory there is."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnspan.planner.errors import UserError
from attnspan.runtime import memory
from attnspan.runtime.memory import available_bytes, check_indexes_fit, peak_rss_bytes, zeros


@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 5, 7), (4, 1 << 20)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    array = zeros(shape, dtype)
    assert (array.shape, array.dtype) == (shape, dtype)
    assert array.flags.c_contiguous
    assert array.ctypes.data % (memory.HUGE_PAGE if array.nbytes >= memory.HUGE_FROM else mmap.PAGESIZE) == 0
    assert not array.any()
    array[...] = 1
    assert (array == 1).all()


def test_zeros_take_memory_as_they_are_written() -> None:
    before = peak_rss_bytes()
    array = zeros((1 << 30,), np.uint8)
    array[:100] = 1
    assert peak_rss_bytes() - before < 100 << 20


def test_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no such advice, and where the kernel refuses it."""

    class Refuses(mmap.mmap):
        def madvise(self, *_: Any) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refuses)
    assert not zeros((memory.HUGE_FROM,), np.uint8).any()
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not zeros((memory.HUGE_FROM,), np.uint8).any()


@pytest.mark.parametrize("size", [1 << 60, 1 << 70])
def test_too_much_is_a_memory_error(size: int) -> None:
    with pytest.raises(MemoryError, match=f"{size} bytes"):
        zeros((size,), np.uint8)


def test_available_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of what the system has and what the container may take; what caches of files hold is free."""
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "/sys/fs/cgroup/memory.max": "6000000\n",
        "/sys/fs/cgroup/memory.current": "5000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1000000\nactive_file 1500000\ninactive_file 2500000\n",
    }

    def read(path: Path, **_: Any) -> str:
        if str(path) not in files:
            raise FileNotFoundError(2, "No such file", str(path))
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert available_bytes() == 5_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert available_bytes() == 8000 * 1024
    del files["/proc/meminfo"]
    assert available_bytes() is None


def test_indexes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    words = r"indexes of 0\.60 GB and caches of 0\.50 GB \(2 rows\): 1\.00 GB are available; lower it, or plan with"
    with pytest.raises(UserError, match=words):
        check_indexes_fit(5 * 10**8, 6 * 10**8, "2 rows", "lower it, or")
    check_indexes_fit(5 * 10**8, 5 * 10**8, "2 rows", "")
    check_indexes_fit(10**12, 0, "spans only: their caches grow with the text", "")
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    check_indexes_fit(10**12, 10**12, "unknown", "")

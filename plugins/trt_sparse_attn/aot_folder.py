"""A table of kernel variants compiled for several architectures, as one folder that is whole or absent."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from attnspan.planner.errors import UserError
from attnspan.planner.files import whole_folder
from attnspan.plugins.trt_sparse_attn.aot import PTX_VERSION, Binary, BuildError, KernelVariant, compile_variant, settings, tools
from attnspan.plugins.trt_sparse_attn.aot_c import sources
from attnspan.plugins.trt_sparse_attn.kernels.common import INTERPRET, SHARED_BYTES

__all__ = ["FORMAT", "Table", "build"]

FORMAT = "attnspan-kernels-1"
"""What manifest.json says it is, with the version of its form."""
Table = Callable[[int], Sequence[KernelVariant]]
"""The variants to build for an architecture; a top-level function or a partial of one, so that processes can pass it on."""


def build(table: Table, archs: Sequence[int], out: Path, jobs: int = 1) -> list[Binary]:
    """Compile every variant of `table` for `archs` into the folder `out`, which is replaced as a whole or left alone.

    The files depend on the sources and on the versions of Triton and its ptxas, not on paths, time or `jobs` (processes).
    UserError when `out` is something else than an earlier build or TRITON_INTERPRET is set; BuildError, before anything is
    written, when a kernel does not compile, needs more shared memory than its architecture has, or spills registers in decode.
    """
    _check_destination(out)
    if INTERPRET:
        raise UserError("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    with settings():
        binaries = sorted(_compile_all(table, archs, jobs), key=lambda one: (one.name, one.arch))
        versions = tools()
    problems = [line for one in binaries for line in one.problems()]
    if problems:
        raise BuildError("\n".join(problems))
    manifest = {
        "format": FORMAT,
        "tools": versions,
        "ptx_version": f"{PTX_VERSION // 10}.{PTX_VERSION % 10}",
        "archs": sorted(archs),
        "shared_limit_bytes": {str(arch): SHARED_BYTES[arch] for arch in sorted(archs)},
        "kernels": [one.record() for one in binaries],
    }
    with whole_folder(out) as folder:
        for one in binaries:
            place = folder / f"sm_{one.arch}"
            place.mkdir(exist_ok=True)
            (place / f"{one.name}.cubin").write_bytes(one.cubin)
            (place / f"{one.name}.ptx").write_bytes(one.ptx)
        for name, text in sources(binaries).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return binaries


def _check_destination(out: Path) -> None:
    if out.exists() and not _is_build(out):
        raise UserError(f"{out} exists and is not an earlier build of kernels; allowed is a new folder; change -o")
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write {out}: {parent} is not a writable folder; change -o")


def _is_build(out: Path) -> bool:
    try:
        return bool(json.loads((out / "manifest.json").read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _compile_all(table: Table, archs: Sequence[int], jobs: int) -> list[Binary]:
    from tqdm import tqdm

    work = []
    for arch in archs:
        names = [variant.name for variant in table(arch)]
        if not names:
            raise UserError(
                f"nothing to build for sm_{arch}; allowed are types without fp8 below sm_89; change --dtype or --arch"
            )
        wrong = [name for name in names if not name.isidentifier() or names.count(name) > 1]
        if wrong:
            raise BuildError(f"variant {wrong[0]!r} for sm_{arch}: names must be C identifiers, each once")
        work += [(arch, index) for index in range(len(names))]
    found = []
    with (
        tqdm(total=len(work), desc="kernels", file=sys.stderr, leave=False, disable=not sys.stderr.isatty()) as bar,
        closing(_results(table, work, jobs)) as results,  # so that no worker outlives the scratch folder of `settings`
    ):
        for binary in results:
            bar.update()
            found.append(binary)
    return found


def _results(table: Table, work: Sequence[tuple[int, int]], jobs: int) -> Generator[Binary, None, None]:
    if jobs == 1:
        for item in work:
            with _interrupts_wait():
                binary = _one(table, item)
            yield binary
        return
    # spawn: a fork of a process whose libraries have started threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(work)) or 1, context) as pool:
        try:
            with _interrupts_blocked():
                results = pool.map(partial(_one, table), work)
            yield from results
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM until the end: Triton, interrupted, prints tracebacks of objects that it had half made."""
    caught: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda got, _: caught.append(got)) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which reaches the whole group: their parent, which sees it later, stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one(table: Table, item: tuple[int, int]) -> Binary:
    arch, index = item
    return compile_variant(table(arch)[index], arch)

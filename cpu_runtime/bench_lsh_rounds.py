"""Interleaved rounds of the contenders of one case of `attnspan bench lsh`, and their records."""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime import bench_lsh_contenders as contenders
from attnspan.cpu_runtime.bench_lsh_caches import NUMPY, Caches, Feed
from attnspan.cpu_runtime.bench_lsh_contenders import SINK, Contender, Lsh
from attnspan.cpu_runtime.bench_lsh_draw import (
    Draw,
    SignatureDraw,
    Study,
    TablesDraw,
    relative_error,
    study,
    thresholds,
)
from attnspan.cpu_runtime.bench_lsh_sketch import SketchDraw
from attnspan.cpu_runtime.library import library_path
from attnspan.planner import lsh as plans

if TYPE_CHECKING:
    from attnspan.cpu_runtime.bandwidth import ReadPass
    from attnspan.cpu_runtime.bench_lsh_case import Case, Wanted
    from attnspan.cpu_runtime.lsh_keys import LayerKeys

__all__ = ["measure"]

Record = dict[str, Any]
_MIN_SECONDS = 0.05  # a sample repeats its step until it took this long
_SETTLE_SECONDS = 0.02  # until the threads of what ran before have stopped spinning
_PROFILED = 50  # steps whose time is split
_SPLIT = ("hash", "retrieve", "attend", "update")
_PARAMETERS = {
    "sketch": ("fraction",), "signature": ("signature_bits", "min_inclusion"),
    "tables": ("bits", "tables", "min_collisions", "min_inclusion"),
}  # fmt: skip


def measure(case: Case, passes: Mapping[int, ReadPass]) -> Iterator[list[Record]]:
    """Records of all contenders, for each number of threads."""
    rows = case.rows()
    indexes = _indexes(case, rows)
    studies: dict[int, Study] = {}
    for row in rows:
        if row.context not in studies:
            draws = [_draw(index, row.scale) for index in indexes]
            studies[row.context] = study(row, SINK, case.window, draws, "topk" in case.baselines)
    of_rows = [studies[row.context] for row in rows]
    stores = {
        kind: Caches(rows, case.capacity, kind.removesuffix("-one"), count, kind.endswith("-one"))
        for kind, count in case.copies().items()
    }
    feed = Feed.of(rows, case.room, case.append)
    common: Record = {"phase": "decode", "context": case.context, "contexts": case.contexts, "batch": case.batch,
                      "heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim, "keys": case.keys,
                      "source": rows[0].source}  # fmt: skip
    del rows
    for threads, read_pass in passes.items():
        made = _contenders(case, stores, feed, indexes, threads)
        records, gbs = _rounds(case, made, of_rows, read_pass, threads)
        if "topk" in case.baselines:
            records += [_topk(case, lsh, i, of_rows) for i, lsh in enumerate(indexes)]
        for record in records:
            kept = record["kept_bytes"]
            record |= common | {"threads": threads, "bandwidth_gbs": gbs, "limit_ms": kept and kept / gbs / 1e6}
            record["effective_keys_heads"] = np.mean([one.weighty for one in of_rows], axis=0).tolist()
        yield records


def _indexes(case: Case, rows: list[LayerKeys]) -> list[Lsh]:
    """Those wanted; of several that came out the same, one."""
    found: dict[str, Lsh] = {}
    for wanted in case.indexes:
        lsh = _choose(case, rows, wanted)
        found[f"{lsh.label} {lsh.max_hamming}"] = lsh
    return list(found.values())


def _choose(case: Case, rows: list[LayerKeys], wanted: Wanted) -> Lsh:
    """The projection, and thresholds where they are to be found."""
    params = wanted.params
    projection = plans.projection_of(params, case.head_dim)
    most = [params.max_hamming or 0] * case.kv_heads
    if wanted.choose is not None:
        longest = max(rows, key=lambda row: row.context)
        most = thresholds(longest, SINK, case.window, projection, wanted.share, wanted.choose == "per-head")
        params = dataclasses.replace(params, max_hamming=max(most))
    return Lsh(params, projection, most)


def _draw(lsh: Lsh, scale: float) -> Draw:
    p = lsh.params
    if p.index == "sketch":
        assert p.fraction is not None
        return SketchDraw(lsh.projection, p.fraction, scale)
    if p.index == "signature":
        return SignatureDraw(lsh.projection, lsh.max_hamming)
    assert p.bits is not None
    assert p.tables is not None
    assert p.min_collisions is not None
    return TablesDraw(lsh.projection, p.bits, p.tables, p.min_collisions, plans.SEGMENT)


def _contenders(case: Case, stores: Mapping[str, Caches], feed: Feed, indexes: list[Lsh], threads: int) -> list[Contender]:
    makers: dict[str, Callable[[], Contender]] = {
        "attnspan-dense": lambda: contenders.dense(stores[case.dtype], feed, threads),
        "other-dense": lambda: contenders.dense(stores[case.dtype], feed, threads, case.library),
        "ort-gqa": lambda: contenders.ort_gqa(stores["fp32"], feed, threads),
        "ort-gqa-int8": lambda: contenders.ort_gqa(stores["int8-one"], feed, threads),
        "torch-sdpa": lambda: contenders.torch_sdpa(stores[case.torch_dtype], feed, threads),
    }
    chosen = [make() for name, make in makers.items() if name in case.baselines or (name == "other-dense" and case.library)]
    own = [contenders.sampled(stores[case.dtype], feed, threads, lsh, case.state_bytes(lsh.params)) for lsh in indexes]
    first = sum(one.kernel.endswith("-dense") for one in chosen)
    return chosen[:first] + own + chosen[first:]


def _rounds(
    case: Case, made: list[Contender], rows: list[Study], read_pass: ReadPass, threads: int
) -> tuple[list[Record], float]:
    from tqdm import tqdm

    answers = [one.answers() for one in made]
    for one in made:
        for _ in range(one.caches.copies):  # the first pass over fresh memory is slow
            one.step()
    medians: list[list[float]] = [[] for _ in made]
    steps: list[list[float]] = [[] for _ in made]
    reads: list[float] = []
    with tqdm(total=case.rounds * len(made), leave=False, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for turn in range(case.rounds):
            order = list(range(len(made)))
            for i in order if turn % 2 == 0 else reversed(order):
                reads.append(read_pass.measure())
                each = _sample(made[i].step)
                medians[i].append(statistics.median(each))
                steps[i] += each
                bar.update()
    split = _Profile.open()
    records = []
    index = 0
    for one, ms, each, answer in zip(made, medians, steps, answers, strict=True):
        record = _record(case, one, answer, rows)
        record |= {"median_ms": statistics.median(ms), "min_ms": min(ms), "p99_ms": float(np.percentile(each, 99)), "all_ms": ms}
        if one.lsh is not None:
            record |= _drawn(case, one.lsh, index, rows)
            record |= {"build_seconds": statistics.median(one.build_seconds), "split_ms": split and split.of(one, threads)}
            record |= {"append": _append(one, case.append)} if case.append else {}
            index += 1
        records.append(record)
    return records, statistics.median(reads)


def _sample(step: Callable[[], None]) -> list[float]:
    """Milliseconds of as many steps as fill `_MIN_SECONDS`, after one that wakes the threads."""
    time.sleep(_SETTLE_SECONDS)
    step()
    each: list[float] = []
    while sum(each) < _MIN_SECONDS:
        start = time.perf_counter()
        step()
        each.append(time.perf_counter() - start)
    return [seconds * 1e3 for seconds in each]


def _append(one: Contender, tokens: int) -> Record:
    """Times of so many steps on the first copy, each of which appends a token."""
    back = max(-(one.steps // one.caches.copies), one.feed.last)
    each = []
    for i in range(tokens):
        start = time.perf_counter()
        one.attend(0, i % len(one.feed.query), back - 1 - i)
        each.append((time.perf_counter() - start) * 1e3)
    p50, p99 = np.percentile(each, [50, 99]).tolist()
    return {"tokens": tokens, "p50_ms": p50, "p99_ms": p99, "max_ms": max(each)}


class _Profile:
    """The op library's clock: nanoseconds in each part of its work, summed over threads."""

    def __init__(self, read: Any) -> None:
        self._read = read
        self._spent = (ctypes.c_int64 * len(_SPLIT))()

    @classmethod
    def open(cls) -> _Profile | None:
        """None when the library has none."""
        read = getattr(ctypes.CDLL(str(library_path())), "attnspan_lsh_profile", None)
        return None if read is None else cls(read)

    def of(self, one: Contender, threads: int) -> dict[str, float] | None:
        """Milliseconds of a step in each part, times of the threads averaged; None when the library counts nothing."""
        count = max(_PROFILED, 2 * one.caches.copies)
        self._read(self._spent, ctypes.c_int(1))
        for _ in range(count):
            one.step()
        self._read(self._spent, ctypes.c_int(1))
        if not any(self._spent):
            return None
        return {part: ns / 1e6 / count / threads for part, ns in zip(_SPLIT, self._spent, strict=True)}


def _record(case: Case, one: Contender, answer: npt.NDArray[np.float32], rows: list[Study]) -> Record:
    """What is known of every contender; answer [queries, batch, heads, head_dim]."""
    exact = np.stack([row.exact for row in rows], axis=1)
    errors = relative_error(answer, exact).mean((0, 1))
    row_bytes = 2 * case.kv_heads * case.head_dim * np.dtype(NUMPY[one.caches.dtype]).itemsize
    return {
        "kernel": one.kernel, "label": one.label, "dtype": one.caches.dtype, "density": 1.0,
        "kept_bytes": sum(case.contexts) * row_bytes, "sampled": None, "rel_error": float(errors.mean()),
        "rel_error_heads": errors.tolist(),
    }  # fmt: skip


def _drawn(case: Case, lsh: Lsh, index: int, rows: list[Study]) -> Record:
    """What an index draws, and its size."""
    drawn = [row.drawn[index] for row in rows]
    shares = np.stack([d.counts / n for d, n in zip(drawn, case.contexts, strict=True)])
    fixed = statistics.mean((SINK + case.window) / n for n in case.contexts)
    element = np.dtype(NUMPY[case.dtype]).itemsize
    kept = sum(float(d.bytes.mean() + d.rows.mean() * 2 * case.head_dim * element) for d in drawn)
    p = lsh.params
    parameters = {name: getattr(p, name) for name in (*_PARAMETERS[p.index], "seed", "window")}
    if p.index == "signature":
        parameters["max_hamming"] = lsh.max_hamming
    return {
        "parameters": parameters, "sampled": float(shares.mean()), "sampled_max": float(shares.max()),
        "sampled_heads": shares.mean((0, 1)).tolist(), "density": float(shares.mean()) + fixed, "kept_bytes": round(kept),
        "index_bytes": case.state_bytes(p), "index_bytes_per_token": plans.index_bytes_per_token(p, case.capacity, case.head_dim),
    }  # fmt: skip


def _topk(case: Case, lsh: Lsh, index: int, rows: list[Study]) -> Record:
    """Exact Top-K with as many keys for each query as an index draws. Not timed: finding them is a pass over all keys."""
    errors = np.mean([row.drawn[index].topk_error for row in rows], axis=0)
    found = _drawn(case, lsh, index, rows)
    names = ("sampled", "sampled_max", "sampled_heads", "density")
    return {
        "kernel": "topk", "label": f"topk as {lsh.label}", "dtype": "fp32", "kept_bytes": None, "median_ms": None, "min_ms": None,
        "p99_ms": None, "all_ms": [], "rel_error": float(errors.mean()), "rel_error_heads": errors.tolist(),
    } | {name: found[name] for name in names}  # fmt: skip

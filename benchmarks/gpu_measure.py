"""One case measured: every plan and every baseline in the same rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gpu_baselines as baselines
import numpy as np
import torch
from gpu_cases import TILE, Case, PlanCase, Spans, head_spans, kept_tiles, kept_tokens, pairs
from gpu_timing import Step, Stopwatch
from torch import Tensor

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
SECONDS = 2.0  # of rounds, per case
RESERVE = 4 << 30  # bytes of device memory left to outputs, workspaces and the compiler


class MemoryShortageError(Exception):
    """A case that does not fit the device; its message says what it needs."""


@dataclass
class Contender:
    """Something to time; `spans` is what it keeps, [kv_heads]."""

    name: str
    plan: str
    density: float
    spans: Spans
    step: Step
    graph: bool = False


class Bench:
    """Tensors of a case. All contenders read the same memory: caches are packed views of it, dense keys are another."""

    def __init__(self, case: Case, watch: Stopwatch, kernels: Any, seed: int) -> None:
        self.case, self.watch, self.kernels, self.seed = case, watch, kernels, seed
        device, self.kind = watch.device, TYPES[case.dtype]
        self.fp8 = case.dtype == "fp8"
        elements = case.batch * case.kv_heads * case.context * case.dim
        tokens = {"decode": 1, "prefill": case.context, "chunk": case.chunk}[case.phase]
        if watch.cuda:
            queries = 8 * case.batch * tokens * case.heads * case.dim  # query, outputs, repeated keys
            needed = 2 * elements * (3 if self.fp8 else 2) + queries * 2 + RESERVE
            free = torch.cuda.mem_get_info(device)[0]
            if needed > free:
                raise MemoryShortageError(f"needs {needed / 1e9:.0f} GB of device memory, {free / 1e9:.0f} GB are free")
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.kind, device=device).normal_(generator=generator)

        # Some slack: spans are rounded up to multiples of 64.
        self.keys, self.values = (random(elements + case.batch * case.kv_heads * 64 * case.dim) for _ in range(2))
        self.stored = (self.keys, self.values)
        if self.fp8:
            self.stored = (self.keys.to(torch.float8_e4m3fn), self.values.to(torch.float8_e4m3fn))
        self.query = random(case.batch, tokens, case.heads * case.dim)
        self.key, self.value = (random(case.batch, tokens, case.kv_heads * case.dim) for _ in range(2))
        if case.phase == "prefill":  # the prompt itself
            self.key, self.value = (x[:elements].view(case.batch, case.context, -1) for x in (self.keys, self.values))
        lengths = np.full(case.batch, case.context - tokens)
        if case.ragged:
            lengths = np.random.default_rng(seed).integers(case.context // 8, case.context - tokens, case.batch)
        self.lengths = lengths
        self.length = torch.tensor(lengths, dtype=torch.int32, device=device)

    def ours(self, plan: PlanCase) -> Contender:
        """The kernel of the phase under a plan; a head's capacity is its span."""
        case, device = self.case, self.watch.device
        spans = head_spans(plan, case.context, case.kv_heads, self.seed)
        span = torch.tensor(spans, dtype=torch.int32, device=device).expand(case.batch, -1).contiguous()
        capacity = span[0].contiguous()
        offset = torch.cumsum(capacity, 0, dtype=torch.int32) - capacity
        slots = int(spans.sum())
        caches = [x[: case.batch * slots * case.dim].view(case.batch, slots, case.dim) for x in self.stored]
        scale = torch.full((case.kv_heads,), 1.0, device=device) if self.fp8 else None
        past = (caches[0], caches[1], self.length)
        run = self.kernels.span_decode if case.phase == "decode" else self.kernels.span_prefill
        if case.phase == "prefill":
            past, capacity, offset, scale = (None, None, None), None, None, None

        def step() -> object:
            return run(self.query, self.key, self.value, *past, span, capacity, offset, num_heads=case.heads,
                       key_scale=scale, value_scale=scale)  # fmt: skip

        return Contender("attnspan", plan.kind, plan.density, spans, step)

    def _dense(self) -> tuple[Tensor, Tensor, Tensor]:
        case = self.case
        query = self.query.view(case.batch, -1, case.heads, case.dim).transpose(1, 2).contiguous()
        count = case.batch * case.kv_heads * case.context * case.dim
        shape = (case.batch, case.kv_heads, case.context, case.dim)
        return query, self.keys[:count].view(shape), self.values[:count].view(shape)

    def others(self) -> tuple[list[Contender], list[str]]:
        """Baselines, and why those that are missing are. Ragged rows and chunks have none."""
        case = self.case
        if case.ragged or case.phase == "chunk":
            return [], []
        found, missing = [], []
        dense, full = self._dense(), np.full(case.kv_heads, case.context)
        for make in (baselines.dense_sdpa, baselines.flashinfer):
            try:
                name, step = make(case, *dense, self.watch)
                found.append(Contender(name, "dense", 1.0, full, step))
            except baselines.UnavailableError as error:
                missing.append(str(error))
        # Each compiles for seconds: in decode, where all plans are one kernel to it, the spread ones only.
        wanted = [p for p in case.plans if case.flex and (case.phase == "prefill" or p.kind == "spread")]
        for plan in wanted:
            spans = head_spans(plan, case.context, case.kv_heads, self.seed)
            try:
                each = torch.tensor(spans, dtype=torch.int32, device=self.watch.device)
                name, step = baselines.flex(case, each, *dense, self.watch)
                found.append(Contender(name, plan.kind, plan.density, spans, step))
            except baselines.UnavailableError as error:
                missing.append(str(error))
        return found, list(dict.fromkeys(missing))

    def work(self, one: Contender) -> dict[str, Any]:
        """What a contender has to do: bytes of kept keys and values (decode), visible pairs and kept tiles as flops (prefill)."""
        case = self.case
        heads = [int(s) for s in one.spans]
        if case.phase == "decode":
            size = 1 if self.fp8 and one.name == "attnspan" else 2
            kept = sum(kept_tokens(one.spans, int(n) + 1) for n in self.lengths)
            return {"kept_bytes": 2 * kept * case.dim * size}
        first = case.context - (case.chunk or case.context)
        flops = 4 * case.dim * case.group * case.batch
        return {
            "kept_flops": flops * sum(pairs(s, case.context, first) for s in heads),
            "tile_flops": flops * TILE * TILE * sum(kept_tiles(s, case.context, first) for s in heads),
        }


def measure(case: Case, watch: Stopwatch, kernels: Any, copy: float, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of a case, and notes on what is missing; `copy` is this run's copy bandwidth. MemoryShortageError: no room."""
    bench = Bench(case, watch, kernels, seed)
    contenders = [bench.ours(plan) for plan in case.plans]
    more, missing = bench.others()
    contenders += more
    steps: dict[str, Step] = {}
    for i, one in enumerate(contenders):
        steps[str(i)], one.graph = watch.prepare(one.step) if case.phase == "decode" else (one.step, False)
        if case.phase != "decode" and watch.cuda:
            one.step()  # compiled outside the rounds
    seconds = watch.rounds(steps, SECONDS)
    records = []
    for i, one in enumerate(contenders):
        record: dict[str, Any] = {
            "phase": case.phase, "context": case.context, "batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads,
            "dim": case.dim, "dtype": case.dtype if one.name == "attnspan" else case.dtype.replace("fp8", "bf16"),
            "ragged": case.ragged, "chunk": case.chunk, "kernel": one.name, "plan": one.plan, "density": one.density,
            "spans": [int(s) for s in one.spans], "seconds": seconds[str(i)], "graph": one.graph,
        }  # fmt: skip
        record |= bench.work(one)
        if "kept_bytes" in record:
            record["bytes_per_second"] = record["kept_bytes"] / record["seconds"]
            record["share_of_copy"] = record["bytes_per_second"] / copy
        else:
            record["tile_flops_per_second"] = record["tile_flops"] / record["seconds"]
        records.append(record)
    _ratios(records)
    return records, missing


def _ratios(records: list[dict[str, Any]]) -> None:
    """Adds to each of our records how many times as fast as each baseline it is; flex_attention's under the same plan."""
    ours = [r for r in records if r["kernel"] == "attnspan"]
    for record in ours:
        record["speedup"] = {
            other["kernel"]: other["seconds"] / record["seconds"]
            for other in records
            if other["kernel"] != "attnspan" and (other["plan"] == "dense" or other["spans"] == record["spans"])
        }
        record["speedup"] |= {
            f"{other['plan']} of as many bytes": other["seconds"] / record["seconds"]
            for other in ours
            if other["plan"] == "uniform" != record["plan"] and abs(other["density"] - record["density"]) < 1e-9
        }


def measure_small(watch: Stopwatch, kernels: Any, copy: float, dry: bool) -> list[dict[str, Any]]:
    """ring_update, merge and lsh_hash: bytes that must be read and written, per second."""
    device = watch.device
    batch, tokens, kv_heads, dim, slots = (1, 8, 2, 64, 128) if dry else (8, 2048, 8, 128, 16384)
    kind = torch.float16 if dry else torch.bfloat16

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, device=device).to(kind)

    key, value = random(batch, tokens, kv_heads * dim), random(batch, tokens, kv_heads * dim)
    caches = [random(batch, kv_heads * slots, dim) for _ in range(2)]
    capacity = torch.full((kv_heads,), slots, dtype=torch.int32, device=device)
    offset = torch.cumsum(capacity, 0, dtype=torch.int32) - capacity
    length = torch.full((batch,), slots // 2, dtype=torch.int32, device=device)
    outputs = [random(batch, tokens, 4 * kv_heads * dim) for _ in range(2)]
    lses = [torch.randn(batch, 4 * kv_heads, tokens, device=device) for _ in range(2)]
    projection = torch.randn(dim, 256, device=device).bfloat16().float()
    wide = torch.randn(dim, 80 if dry else 1500, device=device).bfloat16().float()
    size, rows = key.element_size(), batch * tokens * kv_heads
    work: dict[str, tuple[Step, int]] = {
        "ring_update": (lambda: kernels.ring_update(key, value, *caches, length, capacity, offset), 4 * key.numel() * size),
        "merge of two": (lambda: kernels.merge(outputs, lses), 3 * outputs[0].numel() * size + 3 * lses[0].numel() * 4),
        "lsh_hash, signatures of 256 bits": (
            lambda: kernels.lsh_hash(key, projection, num_heads=kv_heads, signature_bits=256),
            key.numel() * size + rows * 32,
        ),
        "lsh_hash, tables of 10 bits": (
            lambda: kernels.lsh_hash(key, wide, num_heads=kv_heads, bits=10, tables=wide.shape[1] // 10),
            key.numel() * size + rows * wide.shape[1] // 10 * 2,
        ),
    }
    prepared = {name: watch.prepare(step) for name, (step, _) in work.items()}
    seconds = watch.rounds({name: step for name, (step, _) in prepared.items()}, SECONDS)
    return [
        {
            "phase": "small",
            "kernel": name,
            "batch": batch,
            "tokens": tokens,
            "kv_heads": kv_heads,
            "dim": dim,
            "seconds": seconds[name],
            "graph": prepared[name][1],
            "bytes": moved,
            "bytes_per_second": moved / seconds[name],
            "share_of_copy": moved / seconds[name] / copy,
        }
        for name, (_, moved) in work.items()
    ]

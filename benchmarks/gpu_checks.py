"""Every kernel against the fp32 reference, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_reference as reference
import torch
from torch import Tensor

LIMITS = {"fp16": 2e-3, "bf16": 1.5e-2, "fp8": 1.5e-2}
"""Largest error of an output vector [dim] relative to its length. fp8: beside bf16, the reference sees the same cache."""
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LSE_LIMIT = 1e-2
SINK = 64
SLACK = 1e-3  # a hash bit may differ where |x . w| is below this share of |x| |w|: sums in another order


@dataclass(frozen=True)
class Setting:
    """One random problem. `lengths` are the cached tokens of each row, `new` the tokens of each row's chunk."""

    dim: int
    dtype: str
    heads: int
    capacity: tuple[int, ...]
    spans: tuple[int, ...]
    lengths: tuple[int, ...]
    new: tuple[int, ...]
    softcap: float = 0.0

    def label(self) -> str:
        """In one line."""
        cap = f", softcap {self.softcap:g}" if self.softcap else ""
        return f"{self.dtype} d{self.dim} {self.heads}/{len(self.capacity)} heads, cached {self.lengths}, new {self.new}{cap}"


def settings(dry: bool) -> list[Setting]:
    """Every head_dim, type and group size; empty, short, full and wrapped rings; ragged chunks; softcap."""
    if dry:
        return [
            Setting(64, "fp16", 4, (192, 128), (192, 128), (0, 300), (1, 1)),
            Setting(80, "bf16", 2, (128,), (128,), (150, 40), (20, 0), 5.0),
            Setting(64, "fp8", 2, (192,), (128,), (401,), (1,)),
        ]
    wide, mixed = (4096, 640, 1024, 2048), (4096, 512, 128, 1984)
    rows, chunk = (0, 63, 5000, 700), (1024, 1, 300, 0)
    every = [
        Setting(d, t, 16, wide, mixed, rows, new) for d in (64, 80, 96, 128, 256) for t in LIMITS for new in (chunk, (1, 1, 1, 1))
    ]
    groups = [Setting(128, "bf16", 4 * g, wide, mixed, rows, new) for g in (1, 2, 8, 16) for new in (chunk, (1, 1, 1, 0))]
    capped = [Setting(128, "bf16", 16, wide, mixed, rows, new, 20.0) for new in (chunk, (1, 1, 1, 1))]
    return every + groups + capped


@dataclass
class Problem:
    """Tensors of a setting on a device."""

    setting: Setting
    query: Tensor
    key: Tensor
    value: Tensor
    caches: tuple[Tensor, Tensor]
    span: Tensor
    capacity: Tensor
    offset: Tensor
    length: Tensor
    new_tokens: Tensor
    scales: tuple[Tensor | None, Tensor | None]


def problem(setting: Setting, device: torch.device) -> Problem:
    """Seeded by the setting's sizes, so that a failure can be repeated."""
    generator = torch.Generator(device).manual_seed(setting.dim * 1000 + setting.heads)
    kind = TYPES.get(setting.dtype, torch.bfloat16)
    batch, tokens, kv_heads = len(setting.lengths), max(setting.new), len(setting.capacity)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def ints(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    slots = (batch, sum(setting.capacity), setting.dim)
    query = random(batch, tokens, setting.heads * setting.dim).to(kind)
    key, value = (random(batch, tokens, kv_heads * setting.dim).to(kind) for _ in range(2))
    caches, scales = [random(*slots).to(kind) for _ in range(2)], [None, None]
    if setting.dtype == "fp8":
        # Powers of two: dividing by them does not round, so that stored bytes can be compared.
        scales = [2.0 ** -torch.arange(first, first + kv_heads, device=device).float() for first in (5, 6)]
        caches = [(c.float() * 32).to(reference.FP8) for c in caches]
    capacity = ints(setting.capacity)
    offset = torch.cumsum(capacity, 0, dtype=torch.int32) - capacity
    span = ints(setting.spans).expand(batch, kv_heads).contiguous()
    return Problem(setting, query, key, value, (caches[0], caches[1]), span, capacity, offset, ints(setting.lengths),
                   ints(setting.new), (scales[0], scales[1]))  # fmt: skip


def vector_error(got: Tensor, want: Tensor, dim: int) -> float:
    """Largest |got - want| / |want| over vectors of `dim`; where want is nothing, |got|. Anything not finite is infinite."""
    a, b = (x.reshape(-1, dim).double() for x in (got, want))
    norm = b.norm(dim=-1)
    error = (a - b).norm(dim=-1) / torch.where(norm > 0, norm, 1.0)
    return float(error.max()) if bool(torch.isfinite(error).all()) else float("inf")


def lse_error(got: Tensor, want: Tensor) -> float:
    """Largest difference; infinite where the two disagree about what is -inf."""
    if not bool((torch.isneginf(got) == torch.isneginf(want)).all()) or bool(got.isnan().any()):
        return float("inf")
    seen = ~torch.isneginf(want)
    return float((got[seen] - want[seen]).abs().max()) if bool(seen.any()) else 0.0


def _record(kernel: str, what: str, error: float, limit: float) -> dict[str, Any]:
    return {"kernel": kernel, "case": what, "error": error, "limit": limit, "ok": error <= limit}


def attention_records(case: Problem, kernels: Any) -> Iterator[dict[str, Any]]:
    """Attention (prefill or decode by the chunk's length) and the write that follows it."""
    s = case.setting
    decode = max(s.new) == 1
    name = "span_decode" if decode else "span_prefill"
    scales = dict(zip(("key_scale", "value_scale"), case.scales, strict=True))
    arguments = (case.query, case.key, case.value, *case.caches, case.length, case.span, case.capacity, case.offset)
    options = dict(num_heads=s.heads, softcap=s.softcap, new_tokens=case.new_tokens, return_lse=True, **scales)
    before = (case.caches[0].clone(), case.caches[1].clone())
    if decode:
        got, lse = kernels.span_decode(*arguments, **options, update=True)
    else:
        got, lse = kernels.span_prefill(*arguments, **options)
        kernels.ring_update(*arguments[1:6], *arguments[7:], new_tokens=case.new_tokens, **scales)
    want, want_lse = reference.attention(
        case.query, case.key, case.value, before, list(s.lengths), case.span, list(s.capacity), s.heads, s.softcap,
        list(s.new), case.scales,
    )  # fmt: skip
    yield _record(name, s.label(), vector_error(got, want, s.dim), LIMITS[s.dtype])
    yield _record(f"{name} lse", s.label(), lse_error(lse, want_lse), LSE_LIMIT)
    expect = reference.update(case.key, case.value, before, list(s.lengths), list(s.capacity), list(s.new), case.scales)
    wrong = sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in zip(case.caches, expect, strict=True))
    yield _record("span_decode update" if decode else "ring_update", f"{s.label()}: bytes that differ", wrong, 0)


def first_chunk_record(case: Problem, kernels: Any) -> dict[str, Any]:
    """Prefill without a cache."""
    s = case.setting
    none = (None, None, None)
    got = kernels.span_prefill(case.query, case.key, case.value, *none, case.span, None, None, num_heads=s.heads)
    tokens, rows = case.query.shape[1], case.query.shape[0]
    want, _ = reference.attention(
        case.query, case.key, case.value, None, [0] * rows, case.span, [], s.heads, 0.0, [tokens] * rows, (None, None)
    )
    return _record("span_prefill", f"{s.label()}: without a cache", vector_error(got, want, s.dim), LIMITS[s.dtype])


def merge_record(device: torch.device, kernels: Any) -> dict[str, Any]:
    """Three parts, of which some rows are empty."""
    generator = torch.Generator(device).manual_seed(1)
    outputs = [torch.randn(2, 3, 4 * 64, generator=generator, device=device).bfloat16() for _ in range(3)]
    lses = [torch.randn(2, 4, 3, generator=generator, device=device) * 3 for _ in range(3)]
    lses[1][:, 2] = float("-inf")
    got, _ = kernels.merge(outputs, lses)
    weight = torch.stack(lses).softmax(0).permute(0, 1, 3, 2)[..., None]
    want = (weight * torch.stack(outputs).view(3, 2, 3, 4, 64).float()).sum(0).view(2, 3, 256)
    return _record("merge", "three parts, bf16", vector_error(got, want, 64), LIMITS["bf16"])


def hash_records(device: torch.device, kernels: Any, tokens: int) -> Iterator[dict[str, Any]]:
    """Codes of tables and signatures: bits that differ although their sign is not a matter of rounding."""
    generator = torch.Generator(device).manual_seed(2)
    heads, dim = 2, 64
    x = torch.randn(2, tokens, heads * dim, generator=generator, device=device).bfloat16()
    mean = torch.randn(heads, dim, generator=generator, device=device)
    for what, columns, options in (
        ("12 tables of 10 bits", 120, {"bits": 10, "tables": 12}),
        ("signatures of 128 bits", 128, {"signature_bits": 128}),
    ):
        projection = torch.randn(dim, columns, generator=generator, device=device).bfloat16().float()
        codes = kernels.lsh_hash(x, projection, num_heads=heads, mean=mean, **options)
        centred = x.view(2, tokens, heads, dim).float() - mean
        products = reference.sign_products(centred, projection)
        bits = (codes[..., None].long() >> torch.arange(options.get("bits", 32), device=device)) & 1
        length = centred.double().norm(dim=-1, keepdim=True) * projection.double().norm(dim=0)
        wrong = (bits.flatten(-2).bool() != (products > 0)) & (products.abs() > SLACK * length)
        yield _record("lsh_hash", f"{what}: bits that differ", int(wrong.sum()), 0)


def checks(device: torch.device, kernels: Any, dry: bool) -> list[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """(name, function that runs it and gives its records), for every kernel."""
    found: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = []

    def attention(one: Setting) -> list[dict[str, Any]]:
        return list(attention_records(problem(one, device), kernels))

    for one in settings(dry):
        found.append((one.label(), partial(attention, one)))
    first = (
        Setting(64, "fp16", 4, (1, 1), (192, 128), (0, 0), (150, 150))
        if dry
        else Setting(128, "bf16", 32, (1,) * 8, (512, 1024) * 4, (0, 0), (2048,) * 2)
    )
    found.append((first.label(), lambda: [first_chunk_record(problem(first, device), kernels)]))
    found.append(("merge", lambda: [merge_record(device, kernels)]))
    found.append(("lsh_hash", lambda: list(hash_records(device, kernels, 40 if dry else 4096))))
    return found

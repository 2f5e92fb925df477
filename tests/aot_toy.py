"""Small kernels that stand for good and bad ones; a program of test_aot_build.py, in a process without the interpreter.

aot_toy.py build OUT JOBS ARCH...     the good kernel into the folder OUT
aot_toy.py problems                   JSON: what each bad kernel's checks say
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from attnspan.plugins.trt_sparse_attn.aot import BuildError, compile_variant, settings
from attnspan.plugins.trt_sparse_attn.aot_folder import build


@triton.jit
def span_decode_scores(query, key, out, rows, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """out [M, N] = sum over `rows` blocks of query @ key, so that loads are staged through shared memory."""
    dims, m, n = tl.arange(0, D), tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for first in tl.range(0, rows * D, D):
        q = tl.load(query + (first + m[:, None]) * D + dims[None, :])
        k = tl.load(key + (first + n[None, :]) * D + dims[:, None])
        total = tl.dot(q, k, total)
    tl.store(out + m[:, None] * N + n[None, :], total)


@triton.jit
def span_prefill_scores(query, key, out, rows, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The same under a name that may spill."""
    span_decode_scores(query, key, out, rows, D, M, N)


@dataclass(frozen=True)
class Variant:
    """As `kernels/variants.py` has it."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    grid: str


GOOD = Variant(
    name="scores_bf16_d64",
    kernel=span_decode_scores,
    signature={
        "query": "*bf16",
        "key": "*bf16",
        "out": "*fp32",
        "rows": "i32",
        "D": "constexpr",
        "M": "constexpr",
        "N": "constexpr",
    },
    constexprs={"D": 64, "M": 16, "N": 32},
    divisible=("query", "key", "out"),
    num_warps=4,
    num_stages=3,
    grid='one block; "x" is 1',
)
SPILLS = replace(GOOD, name="spills", constexprs={"D": 16, "M": 64, "N": 128}, num_warps=1, num_stages=1)
BAD = {
    "spills": SPILLS,
    "may_spill": replace(SPILLS, name="may_spill", kernel=span_prefill_scores),
    "shared": replace(GOOD, name="shared", constexprs={"D": 128, "M": 128, "N": 128}, num_warps=8, num_stages=4),
    "type": replace(GOOD, name="type", signature=GOOD.signature | {"rows": "*i32"}),
}


def good(arch: int) -> list[Variant]:
    """The table of variants of the toy build."""
    return [GOOD]


def _problems() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with settings():
        for name, variant in BAD.items():
            try:
                binary = compile_variant(variant, 86)
                found[name] = {"problems": binary.problems(), "stack": binary.stack, "shared": binary.shared}
            except BuildError as error:
                found[name] = {"error": str(error)}
    return found


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(good, [int(word) for word in sys.argv[4:]], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        print(json.dumps(_problems()))

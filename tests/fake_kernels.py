"""The table of all ahead-of-time kernels with stand-ins for their code: what a launcher is tested with, without compiling any."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attnspan.plugins.trt_sparse_attn.aot import Binary
from attnspan.plugins.trt_sparse_attn.aot_c import sources
from attnspan.plugins.trt_sparse_attn.kernels.common import SHARED_BYTES
from attnspan.plugins.trt_sparse_attn.kernels.variants import Variant, variants

HIDDEN = (("global_scratch", "*i8"), ("profile_scratch", "*i8"))


def shared(variant: Variant, arch: int) -> int:
    """Bytes of shared memory: all that there is for prefill, so that the choice by it is tested."""
    if variant.name.startswith("span_prefill"):
        return SHARED_BYTES[arch]
    return (70 << 10 if SHARED_BYTES[arch] > 200 << 10 else 37 << 10) if variant.name.startswith("span_decode") else 1 << 10


def binary(variant: Variant, arch: int) -> Binary:
    label = f"{variant.name} sm_{arch}".encode().ljust(56, b"\0")
    return Binary(
        name=variant.name,
        arch=arch,
        symbol=variant.kernel.fn.__name__,
        parameters=(*((name, kind) for name, kind in variant.signature.items() if kind != "constexpr"), *HIDDEN),
        constants=dict(variant.constexprs),
        grid=variant.grid,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        shared=shared(variant, arch),
        registers=128,
        stack=0,
        cubin=b"\x7fELF" + label,
        ptx=b"// " + label.rstrip(b"\0"),
    )


def write(folder: Path, archs: Iterable[int] = tuple(SHARED_BYTES)) -> list[Binary]:
    """The C sources that the build writes, into an existing folder."""
    binaries = [binary(variant, arch) for arch in archs for variant in variants(arch)]
    for name, text in sources(binaries).items():
        (folder / name).write_text(text)
    return binaries

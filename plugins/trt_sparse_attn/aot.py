"""One kernel variant compiled for one GPU generation, without a GPU: the code, what it needs, and whether it may ship."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from attnspan.plugins.trt_sparse_attn.kernels.common import OPTIONS, SHARED_BYTES

__all__ = ["ARCHS", "PTX_VERSION", "Binary", "BuildError", "KernelVariant", "compile_variant", "settings", "tools"]

ARCHS = tuple(SHARED_BYTES)
"""Architectures to build for, as compute capability x 10."""
PTX_VERSION = 87
"""PTX ISA of every variant: the first one with sm_120. Drivers of CUDA 12.8 and later translate it."""

_SPILL_FREE = ("span_decode", "merge", "ring_update")  # what runs at the speed of memory; large tiles may trade some registers
_MORE_REGISTERS = 168  # where ptxas spills a few at the 128 that it aims for; 3 blocks of 4 warps still fit a multiprocessor
_HIDDEN = (("global_scratch", "*i8"), ("profile_scratch", "*i8"))  # what Triton appends to every kernel
_ENTRY = re.compile(r"\.visible \.entry \w+\((.*?)\)", re.DOTALL)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


class BuildError(Exception):
    """A kernel that does not compile, or must not ship."""


class KernelVariant(Protocol):
    """What `kernels/variants.py` says about a variant; see `Variant` there."""

    @property
    def name(self) -> str: ...
    @property
    def kernel(self) -> Any: ...
    @property
    def signature(self) -> Mapping[str, str]: ...
    @property
    def constexprs(self) -> Mapping[str, Any]: ...
    @property
    def divisible(self) -> Sequence[str]: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def grid(self) -> str: ...


@dataclass(frozen=True)
class Binary:
    """A compiled variant. `parameters` are (name, Triton type) in launch order, the two hidden pointers last; sizes in bytes."""

    name: str
    arch: int
    symbol: str
    parameters: tuple[tuple[str, str], ...]
    constants: dict[str, Any]
    grid: str
    num_warps: int
    num_stages: int
    shared: int
    registers: int
    stack: int
    cubin: bytes
    ptx: bytes

    @property
    def exact(self) -> bool:
        """Whether it is compiled for one architecture (sm_90a), and therefore loads on this compute capability only."""
        return self.arch >= 90

    @property
    def must_not_spill(self) -> bool:
        """Whether a stack frame keeps it from shipping."""
        return self.symbol.startswith(_SPILL_FREE)

    def problems(self) -> list[str]:
        """What forbids to ship it, one line each. Triton kernels have no arrays: a stack frame holds spilled registers."""
        found = []
        if self.shared > SHARED_BYTES[self.arch]:
            found.append(f"needs {self.shared} bytes of shared memory; allowed are {SHARED_BYTES[self.arch]}")
        if self.must_not_spill and self.stack:
            found.append(f"spills registers to a stack frame of {self.stack} bytes; allowed is none")
        return [f"{self.name} for sm_{self.arch} {line}" for line in found]

    def record(self) -> dict[str, Any]:
        """Its entry in manifest.json."""
        return {
            "name": self.name,
            "arch": self.arch,
            "symbol": self.symbol,
            "parameters": [{"name": name, "type": kind} for name, kind in self.parameters],
            "hidden_parameters": len(_HIDDEN),
            "constants": self.constants,
            "grid": self.grid,
            "warps": self.num_warps,
            "stages": self.num_stages,
            "shared_bytes": self.shared,
            "registers": self.registers,
            "stack_bytes": self.stack,
            "cubin": f"sm_{self.arch}/{self.name}.cubin",
            "cubin_bytes": len(self.cubin),
            "cubin_sha256": hashlib.sha256(self.cubin).hexdigest(),
            "ptx": f"sm_{self.arch}/{self.name}.ptx",
            "ptx_sha256": hashlib.sha256(self.ptx).hexdigest(),
            "loads_on_this_capability_only": self.exact,
        }


def _plain(value: Any) -> Any:
    """A compile-time constant as JSON: numbers, flags and None as they are, types by name."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """The environment in which Triton's output depends on the kernel's source, the variant and Triton's version only.

    No cache is read, no path of this machine is written into the code, and one ptxas, the oldest that Triton carries, assembles
    for every architecture: a driver of CUDA 12 refuses what the ptxas of CUDA 13 wrote.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory(prefix="attnspan-aot-") as scratch:
        wanted: dict[str, str | None] = dict.fromkeys(
            ("TRITON_OVERRIDE_ARCH", "TRITON_KERNEL_OVERRIDE", "TRITON_KERNEL_DUMP", "TRITON_ENABLE_ASAN", "TRITON_DEBUG",
             "TRITON_FORCE_DISABLE_FP_FUSION", "TRITON_F32_DEFAULT", "PTXAS_OPTIONS", "DISABLE_PTXAS_OPT",
             "TRITON_DUMP_PTXAS_LOG", "NVPTX_ENABLE_DUMP", "MLIR_ENABLE_DUMP")
        )  # fmt: skip
        wanted |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DISABLE_LINE_INFO": "1", "TRITON_CACHE_DIR": scratch, "TMPDIR": scratch}
        wanted["TRITON_PTXAS_BLACKWELL_PATH"] = knobs.nvidia.ptxas.path
        before, folder = {name: os.environ.get(name) for name in wanted}, tempfile.tempdir
        _set(wanted)
        tempfile.tempdir = scratch  # Triton leaves the input of an interrupted ptxas behind
        try:
            yield
        finally:
            _set(before)
            tempfile.tempdir = folder


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def tools() -> dict[str, str]:
    """Versions of what compiles."""
    import triton
    from triton import knobs

    return {"triton": triton.__version__, "ptxas": knobs.nvidia.ptxas.version}


def compile_variant(variant: KernelVariant, arch: int) -> Binary:
    """Compile inside `settings()`. BuildError, one line, when Triton or ptxas refuse."""
    binary = _compile(variant, arch, {})
    if binary.must_not_spill and binary.stack:
        binary = _compile(variant, arch, {"maxnreg": _MORE_REGISTERS})
    return binary


def _compile(variant: KernelVariant, arch: int, more: dict[str, Any]) -> Binary:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constexprs),
        attrs={(list(variant.signature).index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    options = more | OPTIONS | {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "ptx_version": PTX_VERSION,
    }
    noise = io.StringIO()  # Triton prints the whole PTX when ptxas refuses it
    try:
        with contextlib.redirect_stdout(noise):
            compiled = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")] or [""]
        reason = next((line for line in lines if "fatal" in line), lines[-1])  # of ptxas; of Triton's front end
        raise BuildError(f"{variant.name} for sm_{arch} does not compile: {type(error).__name__}: {reason}") from error
    return _binary(variant, arch, compiled)


def _binary(variant: KernelVariant, arch: int, compiled: Any) -> Binary:
    meta, ptx, cubin = compiled.metadata, compiled.asm["ptx"], compiled.asm["cubin"]
    parameters = (*((name, kind) for name, kind in variant.signature.items() if kind != "constexpr"), *_HIDDEN)
    entry = _ENTRY.search(ptx)
    count = entry.group(1).count(".param") if entry else 0
    if count != len(parameters):
        raise BuildError(
            f"{variant.name} for sm_{arch} takes {count} parameters; the table of variants makes it {len(parameters)}"
        )
    if meta.global_scratch_size or meta.profile_scratch_size or meta.num_ctas != 1:
        raise BuildError(f"{variant.name} for sm_{arch} needs scratch memory or a cluster; launchers give neither")
    registers, stack = _resources(cubin)
    return Binary(
        name=variant.name,
        arch=arch,
        symbol=meta.name,
        parameters=parameters,
        constants={name: _plain(value) for name, value in variant.constexprs.items()},
        grid=variant.grid,
        num_warps=meta.num_warps,  # of the whole block: warp specialisation adds to the variant's
        num_stages=variant.num_stages,
        shared=meta.shared,
        registers=registers,
        stack=stack,
        cubin=cubin,
        ptx=ptx.encode(),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its stack frame, as Triton's cuobjdump reads them from the cubin."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path], capture_output=True, text=True)
    found = _RESOURCES.findall(done.stdout)
    if done.returncode or len(found) != 1:
        raise BuildError(f"cuobjdump does not tell what the kernel uses: {(done.stderr or done.stdout).strip()[:200]}")
    return int(found[0][0]), int(found[0][1])

"""One case of `attnspan bench lsh`: what is measured together, on which keys, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attnspan.cpu_runtime import lsh_keys
from attnspan.cpu_runtime.bench_lsh_caches import Caches, copies_of
from attnspan.cpu_runtime.bench_lsh_contenders import SINK
from attnspan.planner import lsh as plans
from attnspan.planner.errors import UserError
from attnspan.planner.rules import BLOCK, LshParams

__all__ = ["Case", "Wanted"]

_FIRST_INDEXED = 256  # the op begins an index with so many tokens
_ROOM = 2048  # most tokens that the steps of a copy append
_OTHER_BYTES = 2 << 30  # what the bandwidth is measured on, and what is studied of one head


@dataclass(frozen=True)
class Wanted:
    """An index to measure. choose: how its max_hamming is found, `auto` or `per-head`, so that it draws `share` of the context;
    None: as the parameters say."""

    params: LshParams
    choose: str | None = None
    share: float = 0.0


@dataclass(frozen=True)
class Case:
    """One distribution of keys, context and batch."""

    keys: str
    capture: lsh_keys.Capture | None
    context: int
    batch: int
    ragged: bool
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    indexes: list[Wanted]
    baselines: tuple[str, ...]
    rounds: int
    window: int
    append: int
    seed: int
    library: Path | None = None

    @property
    def contexts(self) -> list[int]:
        """Of the rows."""
        return [self.context * (self.batch - b) // self.batch if self.ragged else self.context for b in range(self.batch)]

    @property
    def room(self) -> int:
        """Tokens that may be appended to a row."""
        return min(_ROOM, max(64, self.context // 8)) + self.append

    @property
    def capacity(self) -> int:
        """Slots of a KV head."""
        return -(-(self.context + self.room) // BLOCK) * BLOCK

    def copies(self) -> dict[str, int]:
        """Copies of the caches by kind: a type, or int8 with one scale."""
        kinds = {self.dtype}
        kinds |= {"fp32"} if "ort-gqa" in self.baselines else set()
        kinds |= {"int8-one"} if "ort-gqa-int8" in self.baselines else set()
        kinds |= {self.torch_dtype} if "torch-sdpa" in self.baselines else set()
        return {kind: copies_of(self._bytes(kind)) for kind in sorted(kinds)}

    @property
    def torch_dtype(self) -> str:
        """PyTorch attends to no int8."""
        return "bf16" if self.dtype == "int8" else self.dtype

    def _bytes(self, kind: str) -> int:
        return Caches.bytes_each(self.batch, self.kv_heads, self.capacity, self.head_dim, kind.removesuffix("-one"))

    def state_bytes(self, params: LshParams) -> int:
        """Of one row's index."""
        return plans.state_bytes(params, self.kv_heads, self.head_dim, self.capacity)

    def check(self) -> None:
        """UserError when contexts are too short for an index, or all this does not fit into memory."""
        least = SINK + self.window + _FIRST_INDEXED + lsh_keys.QUERIES
        if self.capture is not None:
            least = -(-least * 8 // 7)
        if min(self.contexts) < least:
            shown = self.contexts if self.ragged else self.context
            raise UserError(f"--context makes rows of {shown} tokens; an index needs at least {least}")
        copies = self.copies()
        need = (
            sum(self._bytes(kind) * count for kind, count in copies.items())
            + self._bytes(self.dtype) * copies[self.dtype] * bool(self.indexes)
            + 2 * self._bytes("bf16") // self.batch
            + _OTHER_BYTES
        )
        need += sum(self.batch * self.state_bytes(index.params) * copies[self.dtype] for index in self.indexes)
        free = _available()
        if need > free:
            raise UserError(
                f"the caches and indexes of context {self.context}, batch {self.batch} take {need / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free: lower --context or --batch, or compare less"
            )

    def rows(self) -> list[lsh_keys.LayerKeys]:
        """Keys of each row; those of a length share theirs."""
        lengths = set(self.contexts)
        if self.capture is not None:
            made = {n: lsh_keys.captured(self.capture, n, self.room, self.kv_heads, min(lengths)) for n in lengths}
        else:
            generate = {"random": lsh_keys.random, "clustered": lsh_keys.clustered}[self.keys]
            longest = generate(self.context, self.room, self.heads, self.kv_heads, self.head_dim, self.seed)
            made = {n: longest.cut(n) for n in lengths}
        return [made[n] for n in self.contexts]


def _available() -> float:
    """Bytes of memory that can be had."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")

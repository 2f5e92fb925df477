"""An artefact of target `cpu`, `portable` or `hybrid`, ready to generate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from attnspan.cpu_runtime.binding import Caches, StepBuffers
from attnspan.cpu_runtime.device_caches import DeviceCaches
from attnspan.cpu_runtime.library import guarded_steps
from attnspan.cpu_runtime.loading import check_device, default_threads, open_session
from attnspan.planner.errors import UserError
from attnspan.planner.rules import check_int
from attnspan.runtime.artefact import CACHE_BYTES, Artefact
from attnspan.runtime.memory import check_indexes_fit
from attnspan.runtime.session import CHUNK, RowSession

__all__ = ["Session"]

_CHUNK_WITHOUT_LIBRARY = 64
"""The function bodies keep the scores of a chunk against the whole cache in memory."""

NO_MEMORY = "Failed to allocate memory"
"""What ONNX Runtime's arenas say."""


class Session(RowSession):
    """Runs an artefact with ONNX Runtime; `batch` rows, each with a length of its own.

    Prompts are prefilled row by row in chunks, decode steps take all rows together. Caches are allocated
    once and updated in place. threads None: the physical cores this process may use, on a GPU one less.
    library: path of the op library, None for the installed one or the artefact's; use_library False runs the ops as standard
    ONNX (slow); target `portable` has no use for it. chunk: most tokens of a prompt computed at a time, for
    `portable` at most what it was exported for. check_memory False: allow sampled heads whose caches and
    indexes, for n_max tokens in every row, are larger than the memory that is available; texts are to stay
    short. device `cuda`, target `hybrid` only: all but the sampling runs on the first GPU, with the rings in its memory; a
    prompt for an empty row is then computed in one piece, unless it is longer than a chunk that was given. profile: ONNX Runtime
    writes one, in a file whose name starts so; see `end_profile`. overlap, target `hybrid` on device `cpu`: near and far parts at
    the same time, to measure. Not to be used by two threads at once. UserError: not an artefact for this runtime, no memory,
    ONNX Runtime too old or without the device.
    """

    def __init__(
        self,
        folder: str | Path | Artefact,
        *,
        batch: int = 1,
        threads: int | None = None,
        use_library: bool = True,
        library: str | Path | None = None,
        chunk: int | None = None,
        check_memory: bool = True,
        device: str = "cpu",
        profile: Path | None = None,
        overlap: bool = False,
    ) -> None:
        check_device(device)
        artefact = folder if isinstance(folder, Artefact) else Artefact.load(folder)
        if artefact.target not in ("cpu", "portable", "hybrid"):
            raise UserError(
                f"{artefact.folder} was exported for target {artefact.target!r}: this runtime "
                "takes 'cpu', 'portable' and 'hybrid'; export with --target cpu"
            )
        if device != "cpu" and artefact.target != "hybrid":
            raise UserError(
                f"device is {device}: {artefact.folder} is of target {artefact.target!r}, which runs on CPUs here; "
                "export with --target hybrid, or drop --device"
            )
        portable = artefact.target == "portable"
        if portable and library is not None:
            raise UserError(f"library is {library}: {artefact.folder} is of target 'portable', which needs none; drop --library")
        super().__init__(artefact, batch)
        self.threads = check_int("threads", threads or default_threads(device), 1, 4096, "; change --threads")
        self.device = device
        if check_memory:
            self._check_memory()
        ours = use_library and not portable
        self._session, self.library = open_session(
            artefact, threads=self.threads, use_library=ours, library=library, device=device, profile=profile, overlap=overlap
        )
        default = artefact.chunk or (CHUNK if self.library else _CHUNK_WITHOUT_LIBRARY)
        self._chunk = check_int("chunk", chunk or default, 1, artefact.chunk or 2**20)
        self._whole_prompts = chunk is None
        self._near = NearParts(artefact) if artefact.target == "hybrid" else None
        self._caches: Caches = self._allocate()
        self._rows: dict[int, StepBuffers] = {}
        self._unwanted = np.empty((1, 1, self.vocab_size), dtype=np.float32)
        self._tokens = np.zeros((self.batch, 1), dtype=np.int64)
        self._logits = np.zeros((self.batch, 1, self.vocab_size), dtype=np.float32)
        self._step = self._buffers(0, self.batch)
        self._step.set_tokens(self._tokens)
        self._step.set_logits(self._logits)

    @property
    def backend(self) -> dict[str, str | int | None]:
        """The op library that attention runs in (None: standard ONNX), the threads, and what guards of sampled heads found."""
        library = None if self.library is None else str(self.library)
        on = {"device": self.device} if self.artefact.target == "hybrid" else {}
        guarded = {}
        if self.library is not None and any(part.lsh is not None and part.lsh.guard for part in self.artefact.parts):
            checked, exact = guarded_steps(self.library)
            guarded = {"guarded_steps": checked, "guarded_steps_exact": exact}
        return {"op_library": library, "threads": self.threads, **on, **guarded}

    def end_profile(self) -> Path:
        """The file of the profile, which ends here."""
        return Path(self._session.end_profiling())

    def _compute_chunk(
        self, row: int, tokens: npt.NDArray[np.int64], span: npt.NDArray[np.int32], logits: npt.NDArray[np.float32] | None
    ) -> None:
        if row not in self._rows:
            self._rows[row] = self._buffers(row, 1)
        buffers = self._rows[row]
        length = int(self.state.lengths[row])
        buffers.span[:] = self._chunk_spans(span, length, len(tokens))
        buffers.length[0] = length
        buffers.set_tokens(tokens[None])
        # The model computes one row of logits at least.
        buffers.set_logits(self._unwanted if logits is None else logits[None])
        try:
            buffers.run()
        except Exception as error:  # pybind11 classes without a common base
            if self.device == "cpu" or NO_MEMORY not in str(error):
                raise
            raise UserError(
                f"no memory on the GPU for {len(tokens)} tokens of a prompt at a time: give the session a chunk of fewer, a "
                "shorter prompt, or a smaller batch"
            ) from None

    def _compute_step(
        self, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], span: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        self._tokens[:, 0] = tokens
        self._step.length[:] = lengths
        self._step.span[:] = span if self._near is None else self._near.spans(span)
        self._step.run()
        return self._logits[:, 0].copy()

    def _chunk_spans(self, span: npt.NDArray[np.int32], length: int, tokens: int) -> npt.NDArray[np.int32]:
        """Spans of a chunk. On a CPU the far part of sampled heads, which has all tokens, attends to all of them, as target `cpu`
        does; the functions in the model know no span of 0."""
        if self._near is None or self._in_one_piece(length, tokens):
            return span
        return self._near.nothing(span) if self.device == "cpu" and self.library else self._near.spans(span)

    def _in_one_piece(self, length: int, tokens: int) -> bool:
        """Whether the device computes a chunk whole, exactly: nothing has left a ring, and the CPU only stores and indexes."""
        return self.device != "cpu" and self._near is not None and length + (tokens == 1) <= self._near.slots

    def _check_memory(self) -> None:
        """UserError with the numbers when host memory cannot hold the indexes of sampled heads and the caches beside them."""
        parts = [part for part in self.artefact.parts if self.device == "cpu" or part.lsh is not None]
        each = CACHE_BYTES[self.artefact.cache_dtype]
        kv = 2 * self.batch * sum(part.slots for part in parts) * self.artefact.head_dim * each
        check_indexes_fit(kv, self.state_bytes, self._where, "lower the batch, or")

    @property
    def _where(self) -> str:
        return f"{self.batch} rows of {self.artefact.n_max} tokens"

    def _allocate(self) -> Caches:
        """The caches and states. UserError with the numbers when there is no memory for them."""
        try:
            if self.device != "cpu":
                return DeviceCaches(self.artefact, self.batch, self.device)
            return Caches(self.artefact, self.batch, in_place=self.library is not None or self.artefact.chunk is not None)
        except MemoryError:
            kv, states = self.kv_bytes, self.state_bytes
            indexes = f" and indexes of {states / 1e9:.1f} GB" if states else ""
            raise UserError(
                f"no memory for caches of {kv / 1e9:.1f} GB{indexes} ({self._where}): "
                "lower the batch, or export with a smaller --n-max or --density"
            ) from None

    def _chunks(self, length: int, total: int) -> list[tuple[int, int]]:
        whole = self._in_one_piece(length, total) and (self._whole_prompts or total <= self._chunk)
        return [(0, total)] if whole else super()._chunks(length, total)

    def _buffers(self, start: int, count: int) -> StepBuffers:
        return StepBuffers(self._session, self._caches, self.artefact, start, count)


class NearParts:
    """What sampled heads of target `hybrid` see exactly: their sinks and windows, in rings that may be a little larger."""

    slots: int
    """Of the shortest of all rings and caches."""

    def __init__(self, artefact: Artefact) -> None:
        self._span = np.zeros((artefact.layers, 1, artefact.kv_heads), np.int32)  # 0: not sampled
        for part in artefact.parts:
            if part.lsh is not None:
                self._span[part.layer, 0, list(part.heads)] = artefact.sink + part.lsh.window
        self.slots = min(min(part.capacity) for part in artefact.parts)

    def spans(self, span: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Spans [layers, rows, kv_heads] of a step: of sampled heads those of the near parts, the rest is sampled."""
        return np.where(self._span > 0, self._span, span)

    def nothing(self, span: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Spans under which the near parts attend to nothing, and the far parts to everything."""
        return np.where(self._span > 0, np.int32(0), span)

"""An artefact of target `tensorrt` or `portable`, with the engine that `attnspan build` made of it, ready to generate."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from attnspan.planner.errors import UserError
from attnspan.planner.rules import check_int
from attnspan.plugins.trt_sparse_attn.execution import Context, Engine, check_tensors, choose_profile
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.session import CHUNK, RowSession

__all__ = ["Session"]

_log = logging.getLogger("attnspan")


class Session(RowSession):
    """Runs an engine folder on an NVIDIA GPU; `batch` rows, each with a length of its own.

    Prompts are prefilled row by row in chunks, decode steps take all rows together, as one CUDA graph. Caches are allocated
    once, as PyTorch tensors, and updated in place; everything is in one stream. rtx: TensorRT-RTX (True) or TensorRT (False);
    None: the one that is installed. plugin: path of libattnspan_trt.so; None: ATTNSPAN_TRT_PLUGIN, the one in the folder, else
    the plugin in Python. engine: one that was loaded already. graphs False: decode without CUDA graphs. UserError: no artefact
    for TensorRT, no TensorRT, no GPU, no engine for this GPU, a batch or chunk that the engine was not built for, no memory.
    """

    def __init__(
        self,
        folder: str | Path | Artefact,
        *,
        batch: int = 1,
        chunk: int | None = None,
        rtx: bool | None = None,
        plugin: str | Path | None = None,
        engine: Engine | None = None,
        graphs: bool = True,
    ) -> None:
        artefact = folder if isinstance(folder, Artefact) else Artefact.load(folder)
        if artefact.target not in ("tensorrt", "portable"):
            raise UserError(
                f"{artefact.folder} was exported for target {artefact.target!r}: this runtime "
                "takes 'tensorrt' and 'portable'; export with --target tensorrt"
            )
        super().__init__(artefact, batch)
        if engine is None:
            from attnspan.plugins.trt_sparse_attn.loading import open_engine

            engine = open_engine(artefact, self.batch, rtx=rtx, plugin=plugin)
        self._engine = engine
        check_tensors(engine, artefact)
        choose_profile(engine, self.batch, 1)
        longest = max((p.tokens[1] for p in engine.profiles if p.batch[0] <= 1 <= p.batch[1]), default=1)
        self._chunk = check_int("chunk", min(CHUNK, longest) if chunk is None else chunk, 1, 2**20)
        choose_profile(engine, 1, self._chunk)
        self._contexts: dict[int, Context] = {}
        self._allocate()
        self._graphs = graphs and engine.device.type == "cuda"

    @property
    def backend(self) -> dict[str, str | int | None]:
        """The engine and the plugin that it runs with."""
        return {"engine": self._engine.label, "plugin": self._engine.plugin}

    def _allocate(self) -> None:
        """Caches and buffers, filled with zeros. UserError with the numbers when the device has no memory for them."""
        import torch

        from attnspan.plugins.trt_sparse_attn.steps import Call, DeviceCaches, Stream

        engine, artefact = self._engine, self.artefact
        stream = Stream(engine.device)
        try:
            with stream.current():
                self._caches: DeviceCaches = DeviceCaches(artefact, self.batch, engine.device, stream)
                self._prompt = Call(engine, self._caches, artefact, stream, 1, self._chunk)
                self._step = Call(engine, self._caches, artefact, stream, self.batch, 1)
        except torch.OutOfMemoryError:
            raise UserError(
                f"no GPU memory for caches of {self.kv_bytes / 1e9:.1f} GB ({self.batch} rows of {artefact.n_max} tokens): "
                "lower the batch, or export with a smaller --n-max or --density"
            ) from None

    def _compute_chunk(
        self, row: int, tokens: npt.NDArray[np.int64], span: npt.NDArray[np.int32], logits: npt.NDArray[np.float32] | None
    ) -> None:
        # The model computes one row of logits at least.
        kept = 1 if logits is None else len(logits)
        context = self._context(1, tokens.size, kept)
        self._prompt.write(tokens, self.state.lengths[row : row + 1], span)
        result = self._prompt.run(context, row, tokens.size, kept)
        if logits is not None:
            logits[:] = result[0]

    def _compute_step(
        self, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], span: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        self._step.write(tokens, lengths, span)
        result = self._step.replay()
        if result is None:
            result = self._step.run(self._context(self.batch, 1), 0, 1)
            self._capture()
        return result[:, 0].copy()

    def _capture(self) -> None:
        """Later steps are replays of the one that was just made, where the device can do that."""
        if not self._graphs:
            return
        try:
            self._step.capture()
        except RuntimeError as error:
            self._graphs = False
            _log.warning("warning: decode steps run without a CUDA graph, slower: %s", str(error).partition("\n")[0])

    def _context(self, batch: int, tokens: int, kept: int = 1) -> Context:
        profile = choose_profile(self._engine, batch, tokens, kept).index
        if profile not in self._contexts:
            self._contexts[profile] = self._engine.context(profile)
        return self._contexts[profile]

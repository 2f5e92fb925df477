"""What building and running an engine takes, estimated before anything is parsed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Gpu
from attnspan.runtime.artefact import CACHE_BYTES, Artefact
from attnspan.runtime.memory import available_bytes

__all__ = ["Need", "check", "estimate"]

HOST_BASE = 1 << 30
"""Bytes that a builder takes whatever the model: its libraries, and tactics as they are compiled."""
HOST_COPIES = 4
"""Copies of the weights in the host's memory at the worst moment: parsed, converted, serialised."""
GPU_BASE = 1 << 30
"""Bytes of the CUDA context and of the scratch memory of tactics."""
STREAMED = 0.25
"""Share of the weights that stays on the GPU, at least, with weight streaming."""


@dataclass(frozen=True)
class Need:
    """Bytes: host memory and disk of a build; weights, caches, activations on the GPU."""

    host: int
    disk: int
    weights: int
    caches: int
    activations: int

    @property
    def gpu(self) -> int:
        """Bytes on the GPU while the engine runs; a build takes no more."""
        return self.weights + self.caches + self.activations + GPU_BASE


def estimate(artefact: Artefact, batch: int, chunk: int, kept: int, streaming: bool) -> Need:
    """What an engine takes for `batch` rows, prompts in chunks of `chunk` tokens, and logits of `kept` positions."""
    files = artefact.info["files"]
    weights = sum(int(entry["bytes"]) for name, entry in files.items() if name.startswith("model.onnx"))
    config = artefact.config
    element = CACHE_BYTES.get(artefact.dtype, 2)
    hidden = int(config.get("hidden_size") or artefact.heads * artefact.head_dim)
    widest = 4 * hidden + 3 * int(config.get("intermediate_size") or 4 * hidden)
    widest += (artefact.heads + 2 * artefact.kv_heads) * artefact.head_dim
    rows = max(chunk, batch)
    activations = rows * widest * element + max(kept, batch) * artefact.vocab_size * (element + 4)
    if artefact.target == "portable":  # the mask and the scores of one attention
        activations += chunk * max(artefact.slots) * (1 + 4 * artefact.heads)
    resident = int(weights * STREAMED) if streaming else weights
    return Need(HOST_BASE + HOST_COPIES * weights, weights + (64 << 20), resident, artefact.kv_bytes(batch), activations)


def check(need: Need, folder: Path, gpu: Gpu | None, batch: int) -> None:
    """UserError when memory or disk will not do; what cannot be asked for passes."""
    free = available_bytes()
    if free is not None and need.host > free:
        raise UserError(f"a build takes {_gb(need.host)} of memory: {_gb(free)} are available; build on a larger machine")
    room = shutil.disk_usage(folder).free
    if need.disk > room:
        raise UserError(f"the engine takes {_gb(need.disk)}: {_gb(room)} are free where {folder} is")
    if gpu is not None and need.gpu > gpu.free:
        parts = f"weights {_gb(need.weights)}, caches of {batch} rows {_gb(need.caches)}, activations {_gb(need.activations)}"
        raise UserError(
            f"the engine takes {_gb(need.gpu)} on {gpu.name} ({parts}): {_gb(gpu.free)} of {_gb(gpu.total)} are free; "
            "lower --max-batch or --max-prompt-chunk, add --weight-streaming, or plan for fewer tokens"
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"

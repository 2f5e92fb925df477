"""Streams of ONNX Runtime's executor: which nodes may run at the same time, and what its planner prints about them."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspan.planner.errors import UserError

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["NEAR", "near_apart", "open_with_near_apart", "silent_stdout"]

NEAR = re.compile(r"layers\..+\.near\.attention")
"""Nodes of near parts: SpanAttention beside a LshAttention of the same layer."""


def near_apart(partition: dict[str, Any]) -> dict[str, Any]:
    """A partition into the near parts and the rest, from the one that ONNX Runtime made for a CPU: one stream of all nodes.

    ONNX Runtime wants every node listed, by the names that its optimisations left. UserError: no near parts.
    """
    nodes = [name for stream in partition["streams"] for name in stream]
    near = [name for name in nodes if NEAR.fullmatch(name)]
    if not near:
        raise UserError("the model has no near parts to set apart from its far ones: drop --overlap")
    kept = set(near)
    rest = [name for name in nodes if name not in kept]
    return {**partition, "streams": [rest, near], "devices": [partition["devices"][0]] * 2}


def open_with_near_apart(options: ort.SessionOptions, create: Callable[[], ort.InferenceSession]) -> ort.InferenceSession:
    """A session of the CPU provider in which near and far parts of a layer run at the same time, on threads of their own.

    The session is created twice: the first writes the names of its nodes.
    """
    import onnxruntime

    options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    # One of them is the caller's, which only waits; two run nodes.
    options.inter_op_num_threads = 3
    with tempfile.TemporaryDirectory(prefix="attnspan-streams-") as folder:
        file = Path(folder) / "partition.json"
        options.add_session_config_entry("session.node_partition_config_file", str(file))
        profiling, options.enable_profiling = options.enable_profiling, False
        create()
        options.enable_profiling = profiling
        file.write_text(json.dumps(near_apart(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
        with silent_stdout():
            return create()


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Nothing reaches standard output: of two streams ONNX Runtime's planner (1.31) prints there what buffers it reuses."""
    if sys.stdout is None:  # a program without one
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)

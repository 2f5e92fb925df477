"""The two config.pbtxt of a repository: the model, whose caches Triton keeps between the calls of a sequence, and the chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from attnspan.export.package.pbtxt import Enum
from attnspan.runtime.artefact import Artefact

__all__ = ["chat_config", "core_config"]

_TYPES = {
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.BFLOAT16: "TYPE_BF16",
    ir.DataType.INT8: "TYPE_INT8",
    ir.DataType.UINT8: "TYPE_UINT8",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.INT64: "TYPE_INT64",
}
_INSTANCE: Mapping[bool, Mapping[str, Any]] = {
    False: {"kind": Enum("KIND_CPU"), "count": 1},
    # Prompts run in the first optimisation profile, steps in the second.
    True: {"kind": Enum("KIND_GPU"), "count": 1, "profile": ["0", "1"]},
}
"""By whether an engine runs: one instance, which holds the weights once."""
KEEP = "logits_to_keep"
CHAT_INPUTS = (
    ("message", "TYPE_STRING", False),
    ("system", "TYPE_STRING", True),
    ("max_new_tokens", "TYPE_INT32", True),
    ("temperature", "TYPE_FP32", True),
    ("top_p", "TYPE_FP32", True),
    ("seed", "TYPE_INT64", True),
)
CHAT_OUTPUTS = (("text", "TYPE_STRING"), ("finish_reason", "TYPE_STRING"), ("tokens", "TYPE_INT32"))


def core_config(
    name: str, artefact: Artefact, *, sequences: int, idle: int, library: str | None, threads: int | None, file: str | None
) -> dict[str, Any]:
    """The model itself. library: path of the op library on the server. file: name of the engine; None: the graph is run.

    There is no batch axis in Triton's sense: `span` has the rows in its second axis, so that all axes are written out.
    """
    graph = ir.load(artefact.folder / "model.onnx").graph
    pasts = [x for x in graph.inputs if str(x.name).startswith("past_")]
    calls = [x for x in graph.inputs if not str(x.name).startswith("past_")]
    trt = file is not None
    inputs = [_tensor(x) | ({"is_shape_tensor": True} if trt and x.name == KEEP else {}) for x in calls]
    batching = _batching(sequences, idle) | {"state": [_state(x, trt) for x in pasts]}
    config: dict[str, Any] = {
        "name": name,
        "backend": "tensorrt" if trt else "onnxruntime",
        "max_batch_size": 0,
        "default_model_filename": file,
        "input": inputs,
        "output": [_tensor(x) for x in graph.outputs if not str(x.name).startswith("present_")],
        "sequence_batching": batching,
        "instance_group": [_INSTANCE[trt]],
    }
    if library is not None:
        config["model_operations"] = {"op_library_filename": [library]}
    if threads is not None and not trt:
        config["parameters"] = _parameters({"intra_op_thread_count": str(threads)})
    return config


def chat_config(name: str, core: str, *, sequences: int, idle: int, chunk: int) -> dict[str, Any]:
    """The model in Python that chats by the model `core`. chunk: most tokens of a prompt for one call of it."""
    inputs = [
        {"name": key, "data_type": Enum(kind), "dims": [1], **({"optional": True} if optional else {})}
        for key, kind, optional in CHAT_INPUTS
    ]
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "input": inputs,
        "output": [{"name": key, "data_type": Enum(kind), "dims": [1]} for key, kind in CHAT_OUTPUTS],
        "model_transaction_policy": {"decoupled": True},
        "sequence_batching": _batching(sequences, idle),
        "instance_group": [_INSTANCE[False]],
        "parameters": _parameters({"core": core, "chunk": str(chunk), "idle": str(idle)}),
    }


def _batching(sequences: int, idle: int) -> dict[str, Any]:
    # Without a batch axis `direct` gives each instance one sequence; `oldest` keeps several, and takes turns.
    return {"max_sequence_idle_microseconds": idle * 10**6, "oldest": {"max_candidate_sequences": sequences}}


def _state(past: ir.Value, trt: bool) -> dict[str, Any]:
    kind, dims = _type(past), _dims(past)
    return {
        "input_name": past.name,
        "output_name": str(past.name).replace("past_", "present_", 1),
        "data_type": kind,
        "dims": dims,
        # Masks of target portable multiply what was never written by 0, and indexes of sampled heads begin as zeros.
        "initial_state": [{"name": past.name, "data_type": kind, "dims": [1, *dims[1:]], "zero_data": True}],
        # The op, and the plugin, write a present after they have read the past.
        "use_same_buffer_for_input_output": True,
    }


def _tensor(x: ir.Value) -> dict[str, Any]:
    return {"name": x.name, "data_type": _type(x), "dims": _dims(x)}


def _type(x: ir.Value) -> Enum:
    assert x.dtype is not None
    return Enum(_TYPES[x.dtype])


def _dims(x: ir.Value) -> Sequence[int]:
    """Sizes of the axes; -1 where they depend on the call."""
    assert x.shape is not None
    return [size if isinstance(size, int) else -1 for size in x.shape]


def _parameters(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]



"""A stand-in for Triton: its Python backend's module, and sequences of a model whose caches are implicit state, by ONNX Runtime.

Written from Triton's documentation (implicit state, business logic scripting, decoupled responses). It is stricter than Triton: a
call must give exactly the inputs of the configuration, of its types and shapes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

START, END, FINAL = 1, 2, 1
TYPES = {
    "TYPE_FP32": (np.float32, 1),
    "TYPE_FP16": (np.float16, 10),
    "TYPE_BF16": (ml_dtypes.bfloat16, 16),
    "TYPE_INT8": (np.int8, 3),
    "TYPE_UINT8": (np.uint8, 2),
    "TYPE_INT32": (np.int32, 6),
    "TYPE_INT64": (np.int64, 7),
}


class CoreModel:
    """A model of the ONNX Runtime backend with implicit state: an array for each state and sequence, begun as configured."""

    def __init__(self, config: Mapping[str, Any], folder: Path, library: Path | None = None) -> None:
        self.config = config
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if library is not None:
            options.register_custom_ops_library(str(library))
        self.session = ort.InferenceSession(folder / "1" / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.states = config["sequence_batching"]["state"]
        self.sequences: dict[int, dict[str, np.ndarray]] = {}
        self.calls: list[tuple[int, int, tuple[int, ...]]] = []  # sequence, flags, shape of the token ids
        self.fail = ""

    def infer(self, sequence: int, flags: int, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits of one call. ValueError as Triton refuses one."""
        if self.fail:
            raise ValueError(self.fail)
        self.calls.append((sequence, flags, feeds["input_ids"].shape))
        if flags & START:
            self.sequences[sequence] = {state["input_name"]: self._initial(*state["initial_state"]) for state in self.states}
        if sequence not in self.sequences:
            raise ValueError(f"inference request for sequence {sequence} must specify the START flag on the first request")
        self._check(feeds)
        held = self.sequences[sequence]
        binding = self.session.io_binding()
        binding.bind_output("logits")
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        present = {}
        for state in self.states:
            past, kind = held[state["input_name"]], TYPES[state["data_type"]][1]
            assert list(past.shape)[1:] == list(state["dims"])[1:]
            binding.bind_input(state["input_name"], "cpu", 0, kind, past.shape, past.ctypes.data)
            out = present[state["input_name"]] = np.empty_like(past)  # memory of its own, as the backend's
            binding.bind_output(state["output_name"], "cpu", 0, kind, out.shape, out.ctypes.data)
        self.session.run_with_iobinding(binding)
        held |= present
        found: np.ndarray = binding.get_outputs()[0].numpy()
        if flags & END:
            del self.sequences[sequence]
        return found

    def _initial(self, initial: Mapping[str, Any]) -> np.ndarray:
        assert initial["zero_data"]
        assert initial["name"]
        return np.zeros(initial["dims"], TYPES[initial["data_type"]][0])

    def _check(self, feeds: Mapping[str, np.ndarray]) -> None:
        inputs = {entry["name"]: entry for entry in self.config["input"]}
        assert set(feeds) == set(inputs)
        for name, entry in inputs.items():
            array = feeds[name]
            assert array.dtype == TYPES[entry["data_type"]][0]
            assert len(array.shape) == len(entry["dims"])
            assert all(want in (-1, size) for want, size in zip(entry["dims"], array.shape, strict=True))


class Tensor:
    """pb_utils.Tensor."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class Response:
    """pb_utils.InferenceResponse."""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self._error = error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class TritonError:
    """pb_utils.TritonError."""

    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class Sender:
    """pb_utils.InferenceResponseSender: keeps what was sent."""

    def __init__(self, cancel_after: int | None = None) -> None:
        self.sent: list[Response] = []
        self.final = False
        self._cancel_after = cancel_after

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert not self.final, "a response after the final one"
        if response is not None:
            self.sent.append(response)
        self.final = bool(flags & FINAL)

    def is_cancelled(self) -> bool:
        return self._cancel_after is not None and len(self.sent) >= self._cancel_after


class Request:
    """A request that the chat gets."""

    def __init__(self, sequence: int, flags: int, inputs: Mapping[str, np.ndarray], sender: Sender) -> None:
        self._sequence, self._flags, self.inputs, self._sender = sequence, flags, inputs, sender

    def correlation_id(self) -> int:
        return self._sequence

    def flags(self) -> int:
        return self._flags

    def get_response_sender(self) -> Sender:
        return self._sender


def utils(models: Mapping[str, CoreModel]) -> ModuleType:
    """The module triton_python_backend_utils, whose requests reach `models`."""

    class InferenceRequest:
        def __init__(self, *, model_name: str, requested_output_names: list[str], inputs: list[Tensor], correlation_id: int = 0,
                     flags: int = 0, preferred_memory: Any = None) -> None:  # fmt: skip
            assert requested_output_names == ["logits"]
            assert correlation_id > 0
            self._model, self._inputs, self._sequence, self._flags = model_name, inputs, correlation_id, flags

        def exec(self) -> Response:
            feeds = {tensor.name(): tensor.as_numpy() for tensor in self._inputs}
            try:
                logits = models[self._model].infer(self._sequence, self._flags, feeds)
            except ValueError as error:
                return Response(error=TritonError(str(error)))
            return Response([Tensor("logits", logits)])

    def of_request(request: Request, name: str) -> Tensor | None:
        return Tensor(name, request.inputs[name]) if name in request.inputs else None

    def of_response(response: Response, name: str) -> Tensor:
        return Tensor(name, response.tensors[name])

    module = ModuleType("triton_python_backend_utils")
    vars(module).update(
        Tensor=Tensor, InferenceRequest=InferenceRequest, InferenceResponse=Response, TritonError=TritonError,
        PreferredMemory=lambda kind, device: SimpleNamespace(kind=kind, device=device), TRITONSERVER_MEMORY_CPU=0,
        TRITONSERVER_REQUEST_FLAG_SEQUENCE_START=START, TRITONSERVER_REQUEST_FLAG_SEQUENCE_END=END,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL, get_input_tensor_by_name=of_request, get_output_tensor_by_name=of_response,
    )  # fmt: skip
    return module


def load_model(file: Path, models: Mapping[str, CoreModel]) -> Any:
    """The class of a model.py, as the Python backend imports it."""
    before, paths = sys.modules.get("triton_python_backend_utils"), list(sys.path)
    sys.modules["triton_python_backend_utils"] = utils(models)
    try:
        spec = importlib.util.spec_from_file_location("chat_model", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = paths
        if before is None:
            del sys.modules["triton_python_backend_utils"]
        else:
            sys.modules["triton_python_backend_utils"] = before
    return module.TritonPythonModel()

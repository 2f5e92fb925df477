# mypy: ignore-errors
"""Triton's Python backend: a conversation per sequence, on a model whose caches Triton keeps.

One request is one message of the user. The answer comes in pieces (decoupled responses); the last response has `finish_reason`
and `tokens`, how many the conversation holds. The first request of a conversation carries the flag that starts a sequence.

`attnspan` lies beside this file; what it needs on the server: numpy, tokenizers, jinja2.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))  # before an attnspan of another version that may be installed

from attnspan.planner.errors import UserError
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.sampling import Sampling
from attnspan.runtime.session import RowSession


class CoreError(Exception):
    """The model that computes refused a call."""


class CancelledError(Exception):
    """Nobody waits for the answer any more."""


class CoreSession(RowSession):
    """A conversation whose caches are the state of a sequence of another model of the server; lengths and spans are kept here."""

    def __init__(self, artefact: Artefact, core: str, sequence: int | str, chunk: int) -> None:
        super().__init__(artefact, 1)
        self._core, self._sequence, self._chunk, self._started = core, sequence, chunk, False
        self.messages: list[dict[str, str]] = []
        self.used = time.monotonic()

    @property
    def backend(self) -> dict[str, str | int | None]:
        return {"model": self._core}

    def close(self) -> None:
        """End the sequence. Triton ends one by a last call: its token is not looked at."""
        if self._started:
            span = self.state.spans(np.ones(1, np.int32), np.zeros(1, bool))
            self._started = False
            end = pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END
            self._call(np.zeros((1, 1), np.int64), np.zeros(1, np.int32), span, 1, end)

    def _compute_chunk(self, row: int, tokens: Any, span: Any, logits: Any) -> None:
        kept = 1 if logits is None else len(logits)
        result = self._call(tokens[None], self.state.lengths[row : row + 1], span, kept)
        if logits is not None:
            logits[:] = result[0]

    def _compute_step(self, tokens: Any, lengths: Any, span: Any) -> Any:
        return self._call(tokens[:, None], lengths, span, 1)[:, 0].copy()

    def _call(self, tokens: Any, lengths: Any, span: Any, keep: int, flags: int = 0) -> Any:
        if not self._started and not flags:
            flags = pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
        feeds = {
            "input_ids": np.ascontiguousarray(tokens, np.int64),
            "length": np.ascontiguousarray(lengths, np.int32),
            "span": np.ascontiguousarray(span, np.int32),
            "logits_to_keep": np.array([keep], np.int64),
        }
        request = pb_utils.InferenceRequest(
            model_name=self._core,
            requested_output_names=["logits"],
            inputs=[pb_utils.Tensor(name, array) for name, array in feeds.items()],
            correlation_id=self._sequence,
            flags=flags,
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise CoreError(response.error().message())
        self._started = self._started or flags == pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
        return pb_utils.get_output_tensor_by_name(response, "logits").as_numpy()


class TritonPythonModel:
    """The interface that Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what lies beside the model that computes: plan, tokenizer, description."""
        parameters = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
        self._core, self._chunk, self._idle = parameters["core"], int(parameters["chunk"]), float(parameters["idle"])
        self._artefact = Artefact.load(Path(__file__).parents[2] / self._core / "1")
        self._sessions: dict[int | str, CoreSession] = {}

    def execute(self, requests: list[Any]) -> None:
        """Answer messages, one after another."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            except Exception as error:
                # What is in the caches is not what the conversation says it is: start it anew.
                self._drop(request.correlation_id())
                response = None if isinstance(error, CancelledError) else _failure(error)
                final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                sender.send(flags=final) if response is None else sender.send(response, flags=final)

    def finalize(self) -> None:
        """Nothing to do: Triton drops the sequences."""
        self._sessions.clear()

    def _answer(self, request: Any, sender: Any) -> None:
        sequence, flags = request.correlation_id(), request.flags()
        given = {key: _value(request, key) for key in ("message", "system", "max_new_tokens", "temperature", "top_p", "seed")}
        if flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            self._drop(sequence)
            for other, session in list(self._sessions.items()):
                if time.monotonic() - session.used > self._idle:  # Triton has ended it without a word
                    self._drop(other)
            self._sessions[sequence] = CoreSession(self._artefact, self._core, sequence, self._chunk)
            if given["system"] is not None:
                self._sessions[sequence].messages.append({"role": "system", "content": given["system"]})
        session = self._sessions.get(sequence)
        if session is None:
            raise UserError(f"there is no conversation {sequence}: it failed or was idle too long; start it with sequence_start")
        settings = {key: given[key] for key in ("temperature", "top_p", "seed") if given[key] is not None}

        def give(_: int, piece: str) -> None:
            if sender.is_cancelled():
                raise CancelledError
            sender.send(_response(piece, "", 0))

        session.messages.append({"role": "user", "content": given["message"]})
        sampling, most = Sampling(**settings), given["max_new_tokens"]
        result = session.generate(session.messages, most, sampling, continue_=True, on_text=give)[0]
        session.messages.append({"role": "assistant", "content": result.text or ""})
        session.used = time.monotonic()
        sender.send(_response("", result.finish_reason, int(session.lengths[0])))
        if flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
            del self._sessions[sequence]
            session.close()

    def _drop(self, sequence: int | str) -> None:
        """Forget a conversation, and let Triton forget its caches if it still has them."""
        session = self._sessions.pop(sequence, None)
        if session is not None:
            with contextlib.suppress(CoreError):
                session.close()


def _value(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    value = tensor.as_numpy().reshape(-1)[0]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not valid UTF-8 at byte {error.start}") from None
    return value.item()


def _response(text: str, finish_reason: str, tokens: int) -> Any:
    arrays = {
        "text": np.array([text.encode()], np.object_),
        "finish_reason": np.array([finish_reason.encode()], np.object_),
        "tokens": np.array([tokens], np.int32),
    }
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, array) for name, array in arrays.items()])


def _failure(error: Exception) -> Any:
    expected = isinstance(error, UserError | CoreError)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error) if expected else f"{type(error).__name__}: {error}"))

"""The paths of the API."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from attnspan.planner.errors import UserError
from attnspan.runtime.generate import DEFAULT_NEW_TOKENS
from server.answers import Head, stream, whole
from server.engine import Engine
from server.errors import ApiError
from server.listening import DRAIN_RETRY, Listener
from server.schemas import ChatCompletion, ChatRequest, Completion, CompletionRequest, Error, Health, ModelCard, ModelList

__all__ = ["router"]

DEFAULT_COMPLETION = 16
"""New tokens of a completion when none are asked for, as OpenAI's; of a chat: `DEFAULT_NEW_TOKENS`."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declarations of error answers."""
    return {status: {"model": Error, "description": WHY[status]} for status in statuses}


WHY = {
    400: "A field is wrong, unknown or too long",
    401: "The API key is wrong or missing",
    404: "No such model",
    408: "The body took too long",
    413: "The body is too large",
    429: "The queue is full; Retry-After tells when to ask again",
    503: "The server is about to stop; Retry-After tells when to ask again",
}
# Of a text/event-stream, OpenAPI before 3.2 describes one event.
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
GENERATES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": EVENT}}, "description": "The text, or with stream its events"},
    **errors(400, 401, 404, 408, 413, 429, 503),
}


def router(engine: Engine, model: str) -> APIRouter:
    """The routes of a service; an engine of its own answers them."""
    api = APIRouter()
    created = int(time.time())
    card = ModelCard(id=model, created=created, context_length=engine.artefact.n_max)

    def check_model(name: str) -> None:
        if name != model:
            raise ApiError(
                404, f"the model {name!r} does not exist: this server has {model!r}", param="model", code="model_not_found"
            )

    async def answer(
        request: Request, asked: ChatRequest | CompletionRequest, prompt: list[int], max_tokens: int | None, default: int
    ) -> Any:
        room = engine.artefact.n_max - len(prompt)
        if room < 1 or (max_tokens or 1) > room:
            wanted = f" and {max_tokens} new ones" if max_tokens else ""
            raise ApiError(
                400,
                f"{len(prompt)} tokens in the prompt{wanted}: the model takes {engine.artefact.n_max} in all",
                param="messages" if isinstance(asked, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        listener = Listener(engine, prompt, max_tokens or min(default, room), asked.sampling(), asked.stops)
        head = Head(model, chat=isinstance(asked, ChatRequest))
        if asked.stream:
            return stream(head, listener, asked.with_usage)
        return await whole(request, head, listener)

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=GENERATES)
    async def chat_completions(request: Request, asked: ChatRequest) -> Any:
        """Answer a conversation."""
        check_model(asked.model)
        messages = [message.plain() for message in asked.messages]
        prompt = await _encode(lambda: engine.tokenizer.encode(engine.tokenizer.render(messages), special=False), "messages")
        return await answer(request, asked, prompt, asked.max_completion_tokens or asked.max_tokens, DEFAULT_NEW_TOKENS)

    @api.post("/v1/completions", response_model=Completion, responses=GENERATES)
    async def completions(request: Request, asked: CompletionRequest) -> Any:
        """Continue a text."""
        check_model(asked.model)
        if isinstance(asked.prompt, str):
            prompt = await _encode(partial(engine.tokenizer.encode, asked.prompt), "prompt")
        else:
            prompt = asked.prompt
            if max(prompt) >= (size := engine.artefact.vocab_size):
                raise ApiError(400, f"token id {max(prompt)} is not in the vocabulary: must be below {size}", param="prompt")
        return await answer(request, asked, prompt, asked.max_tokens, DEFAULT_COMPLETION)

    @api.get("/v1/models", response_model=ModelList, responses=errors(401))
    async def models() -> ModelList:
        """The models that requests may name."""
        return ModelList(data=[card])

    @api.get("/v1/models/{name:path}", response_model=ModelCard, responses=errors(401, 404))
    async def model_card(name: str) -> ModelCard:
        """One model."""
        check_model(name)
        return card

    @api.get("/healthz", response_model=Health, responses={503: {"model": Health, "description": "Requests are not taken"}})
    async def healthz() -> Response:
        """Whether requests are taken."""
        status = "failed" if engine.failed else "draining" if engine.draining else "ok"
        good = status == "ok"
        return JSONResponse({"status": status}, 200 if good else 503, {} if good else {"Retry-After": str(DRAIN_RETRY)})

    @api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return api


async def _encode(work: Any, param: str) -> list[int]:
    """Token ids, made by another thread as a long text takes its time."""
    try:
        ids: list[int] = await run_in_threadpool(work)
    except UserError as error:
        raise ApiError(400, str(error), param=param) from None
    if not ids:
        raise ApiError(400, "the prompt has no tokens: give at least one", param=param)
    return ids

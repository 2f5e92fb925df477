"""The answers to generations, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, describe
from server.listening import Listener
from server.schemas import Answer, CacheUse, ChatChoice, ChatCompletion, Completion, TextChoice, Usage

__all__ = ["Head", "stream", "whole"]

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies are to pass on events as they come."""


class Head:
    """What all pieces of an answer share. chat: in the form of chat completions, else of completions."""

    def __init__(self, model: str, chat: bool) -> None:
        self.model = model
        self.chat = chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        """One server-sent event."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return _event({"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices} | more)

    def piece(self, text: str, finish: str | None, **more: Any) -> str:
        """An event with a piece of text; with a finish, and then no text, the last of a choice."""
        body: dict[str, Any] = {"text": text}
        if self.chat:
            body = {"delta": {"content": text} if finish is None else {}}
        return self.event([{"index": 0, **body, "logprobs": None, "finish_reason": finish}], **more)


class _Stream(StreamingResponse):
    """Events of a listener, which is closed at the end, whether they were sent or the client left before the first."""

    def __init__(self, events: AsyncIterator[str], listener: Listener) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self._listener = listener

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._listener.close()


async def whole(request: Request, head: Head, listener: Listener) -> ChatCompletion | Completion | Response:
    """The answer in one piece; cancels the generation when the client leaves."""
    reading = asyncio.ensure_future(_read(listener))
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([reading, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return Response(status_code=499)  # nobody sees it
        text, finish, tokens = reading.result()
    finally:
        listener.close()
        for task in (reading, leaving):
            task.cancel()
    shared: dict[str, Any] = {"id": head.id, "created": head.created, "model": head.model, "usage": _usage(listener, tokens)}
    if head.chat:
        return ChatCompletion(choices=[ChatChoice(message=Answer(content=text), finish_reason=finish)], **shared)
    return Completion(choices=[TextChoice(text=text, finish_reason=finish)], **shared)


def stream(head: Head, listener: Listener, with_usage: bool) -> Response:
    """The answer as server-sent events; cancels the generation when the client leaves."""
    return _Stream(_events(head, listener, with_usage), listener)


async def _events(head: Head, listener: Listener, with_usage: bool) -> AsyncIterator[str]:
    empty = {"usage": None} if with_usage else {}
    if head.chat:
        start = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield head.event([start], **empty)
    async for update in listener.updates():
        if update.failure is not None:
            yield _event(describe(503, update.failure))
            return
        if update.text:
            yield head.piece(update.text, None, **empty)
        if update.finish is not None:
            yield head.piece("", update.finish, **empty)
            if with_usage:
                yield head.event([], usage=_usage(listener, update.tokens).model_dump())
    yield "data: [DONE]\n\n"


async def _read(listener: Listener) -> tuple[str, Literal["stop", "length"], int]:
    pieces = []
    async for update in listener.updates():
        pieces.append(update.text)
        if update.failure is not None:
            raise ApiError(503, update.failure, headers={"Retry-After": "1"})
        if update.finish is not None:
            break
    return "".join(pieces), "stop" if update.finish == "stop" else "length", update.tokens


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _usage(listener: Listener, tokens: int) -> Usage:
    total, artefact = listener.prompt_tokens + tokens, listener.artefact
    dense = artefact.dense_kv_bytes() * total // artefact.n_max
    cache = CacheUse(kv_bytes=artefact.kv_bytes_in_force(total), kv_bytes_dense=dense)
    return Usage(prompt_tokens=listener.prompt_tokens, completion_tokens=tokens, total_tokens=total, attnspan=cache)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"

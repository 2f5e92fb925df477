"""A server with the OpenAI API and no model: answers are words, with faults on demand. And servers in threads."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parents[1] / "samples" / "server" / "static"

WORDS = ["the", "sea", "was", "calm", "and", "nobody", "on", "deck", "slept", "**but**", "all", "knew", "`why`"]


class FakeChat:
    """faults: texts that change under load (`differs`), hanging (`stuck`), streams that break off (`lost`), `refused` requests.

    A fault shows once `after` requests have been answered. seen: the requests' bodies; left: streams that the client left.
    """

    def __init__(self, fault: str | None = None, after: int = 0, delay: float = 0.002) -> None:
        self.fault, self.after, self.delay = fault, after, delay
        self.seen: list[dict[str, Any]] = []
        self.sessions: list[str | None] = []
        self.left = 0
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.mount("/", StaticFiles(directory=STATIC, html=True))

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "fake", "object": "model", "created": 0, "owned_by": "tests"}]}

    async def chat(self, request: Request) -> Any:
        body = await request.json()
        self.seen.append(body)
        self.sessions.append(request.headers.get("x-session-id"))
        fault = self.fault if len(self.seen) > self.after else None
        if fault == "refused":
            return JSONResponse({"error": {"message": "the server is full", "type": "overloaded"}}, 503, {"retry-after": "1"})
        return StreamingResponse(self.stream(body, fault), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], fault: str | None) -> AsyncIterator[str]:
        first = zlib.crc32(json.dumps(body["messages"]).encode())
        count = body["max_tokens"]
        words = [WORDS[(first + i) % len(WORDS)] + " " for i in range(count)]
        if fault == "differs":
            words[-1] = "different"
        try:
            for i, word in enumerate(words):
                if fault in ("stuck", "lost") and i == count // 2:
                    if fault == "lost":
                        return
                    await asyncio.sleep(3600)
                yield event([{"index": 0, "delta": {"content": word}, "finish_reason": None}])
                await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.left += 1
            raise
        yield event([{"index": 0, "delta": {}, "finish_reason": "length"}])
        usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
        yield event([], usage=usage | {"attnspan": {"kv_bytes": 2_900_000, "kv_bytes_dense": 7_400_000}})
        yield "data: [DONE]\n\n"


def event(choices: list[dict[str, Any]], **more: Any) -> str:
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "fake", "choices": choices} | more
    return f"data: {json.dumps(chunk)}\n\n"


@contextmanager
def serve(app: Any) -> Iterator[str]:
    """The address of the app, run by uvicorn in a thread."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has ended while it started"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()

"""Requests whose replica died before it answered get 503 with Retry-After, which OpenAI's clients heed, in place of 500.

Ray's HTTP proxy loads this where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=server.ray.retry:middlewares is set. An answer that
had begun is cut off: its stream ends without `[DONE]`, which clients report as a broken connection.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["RetryLost", "middlewares"]

BODY = {"error": {"message": "the replica has died; ask again", "type": "server_error", "param": None, "code": "replica_lost"}}


class RetryLost:
    """The proxy's app sends nothing at all for a request that is lost; this middleware then answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        await self.app(scope, receive, watch)
        if scope["type"] == "http" and not started:
            body = json.dumps(BODY).encode()
            headers: Any = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
            headers.append((b"content-length", str(len(body)).encode()))
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": body})


def middlewares() -> list[Middleware]:
    """What the proxy wraps itself in."""
    return [Middleware(RetryLost)]

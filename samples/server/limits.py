"""What every request must keep to before the app sees it: the key, the size and the time of its body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, error_response
from server.metrics import Metrics
from server.settings import Settings

__all__ = ["Limits"]

KNOWN = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models", "/healthz", "/metrics", "/"})
"""Paths that are counted under their own names."""
CLOSE = {"Connection": "close"}


class Limits:
    """ASGI middleware. A body is received whole, at most `max_body` bytes within `read_seconds`, and then given to the app in
    one piece."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = monotonic(), 0

        async def timed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            # A client that does not read would keep the connection for ever.
            async with asyncio.timeout(self._settings.write_seconds):
                await send(message)

        path = scope["path"] if scope["path"] in KNOWN else "other"
        try:
            await self._handle(scope, receive, timed)
        except TimeoutError:
            pass  # nobody reads: the connection is dropped
        finally:
            self._metrics.requests.labels(path, status).inc()
            self._metrics.request_seconds.labels(path).observe(monotonic() - started)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = dict(scope["headers"])
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            body = await self._body(headers.get(b"content-length"), receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check_key(self, path: str, given: bytes) -> None:
        if self._key is None or not path.startswith("/v1/"):
            return
        scheme, _, key = given.partition(b" ")
        # Digests have one length: the time of the comparison tells nothing about the key's.
        if not (hmac.compare_digest(_digest(key.strip()), self._key) and scheme.lower() == b"bearer"):
            raise ApiError(401, "wrong or missing API key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, length: bytes | None, receive: Receive) -> bytes | None:
        """The whole body; None when the client has left. ApiError: too large, too slow."""
        most = self._settings.max_body
        # The server reads and drops what is left of a body, so that its sender gets to see the answer.
        too_large = ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")
        if length is not None and length.isdigit() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the body took too long", code="request_timeout", headers=CLOSE) from None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

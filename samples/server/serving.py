"""uvicorn with a limit on the time that a request's head may take, and with a drain before it stops."""

from __future__ import annotations

import asyncio
import signal
import sys
from time import monotonic
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.engine import Engine
from server.settings import Settings

__all__ = ["Server", "protocol"]


def protocol(read_seconds: float) -> type[asyncio.Protocol]:
    """The class of connections whose client has so many seconds to send a request's head."""

    class Timed(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the clock when a head is awaited, or a body that nobody wants any more; stop it when the app is at work."""
            answered = self.cycle is None or self.cycle.response_complete
            if answered and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
                if self._deadline is None:
                    self._deadline = self.loop.call_later(read_seconds, self._late)
            elif self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _late(self) -> None:
            self._deadline = None
            if self.cycle is not None and not self.cycle.response_complete:
                return  # a request came to the app since
            if self.cycle is None and not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()

    return Timed


class Server(uvicorn.Server):
    """Stops in two steps: at a signal new requests are refused with 503 and the others finish; then, or when their time is up,
    it ends.

    A second signal ends it at once. signalled: the first signal.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, settings: Settings, ready: str) -> None:
        super().__init__(config)
        self._engine = engine
        self._settings = settings
        self._ready = ready
        self._deadline: float | None = None
        self.signalled: int | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Open the doors and say so."""
        await super().startup(sockets)
        if self.started:
            print(self._ready, file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        if self.signalled is not None:
            self.should_exit = True
            return
        self.signalled = sig
        self._deadline = monotonic() + self._settings.drain_seconds
        # No locks in a signal handler: the loop does the rest at its next tick.

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: whether to stop now."""
        if self._deadline is not None and not self.should_exit:
            if not self._engine.draining:
                self._engine.begin_drain()
                again = "; Ctrl-C again to stop at once" if self.signalled == signal.SIGINT else ""
                print(f"stopping: running requests may finish{again}", file=sys.stderr, flush=True)
            if self._engine.idle or monotonic() > self._deadline:
                self.should_exit = True
        if self.should_exit:
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """End what is unfinished with an error, then close."""
        await asyncio.to_thread(self._engine.close)
        await super().shutdown(sockets)

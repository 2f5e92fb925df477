"""A job of the engine as seen from asyncio: submitted, listened to, cancelled when nobody listens any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from attnspan.runtime.sampling import Sampling
from server.engine import Engine
from server.errors import ApiError
from server.jobs import BusyError, DrainingError, TooLargeError, Update

__all__ = ["DRAIN_RETRY", "Listener"]

DRAIN_RETRY = 5
"""Seconds after which a client may ask again when a server stops: another one may have taken over."""


class Listener:
    """One generation: iterate over its `updates`; `close` cancels what is unfinished. ApiError when it is refused."""

    def __init__(self, engine: Engine, prompt: list[int], max_tokens: int, sampling: Sampling, stop: tuple[str, ...]) -> None:
        self.prompt_tokens = len(prompt)
        self.artefact = engine.artefact
        self._engine = engine
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._finished = False
        loop = asyncio.get_running_loop()

        def publish(update: Update) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._updates.put_nowait, update)

        try:
            self._job = engine.submit(prompt, max_tokens, sampling, stop, publish)
        except BusyError as error:
            raise ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)}) from None
        except DrainingError as error:
            raise ApiError(503, str(error), code="draining", headers={"Retry-After": str(DRAIN_RETRY)}) from None
        except TooLargeError as error:
            raise ApiError(400, str(error), param="max_tokens", code="context_length_exceeded") from None

    def close(self) -> None:
        """Nobody listens any more."""
        if not self._finished:
            self._finished = True
            self._engine.cancel(self._job)

    async def updates(self) -> AsyncIterator[Update]:
        """What the job brings forth, as it comes; the last one has `finish` or `failure`."""
        while not self._finished:
            update = await self._updates.get()
            # What came meanwhile goes with it: a slow reader gets longer pieces.
            while not update.last and not self._updates.empty():
                following = self._updates.get_nowait()
                update = Update(update.text + following.text, following.tokens, following.finish, following.failure)
            self._finished = update.last
            yield update

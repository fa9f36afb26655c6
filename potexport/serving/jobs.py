"""A request on its way from the event loop to the one thread that computes, and what comes back."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

from potexport.serving.answers import Finish, Usage
from potexport.serving.protocol import ApiError, Asked


@dataclass(frozen=True)
class Piece:
    text: str


@dataclass(frozen=True)
class Done:
    finish: Finish
    usage: Usage


class Left:
    """Nobody waits for the answer any more."""


Event = Piece | Done | ApiError | Left


class Job:
    """Made and awaited in the event loop, answered from another thread."""

    def __init__(self, asked: Asked, keys: list[str]) -> None:
        """keys: see `protocol.chain`."""
        self.asked, self.keys = asked, keys
        self.since = perf_counter()
        self.over = False  # it was answered, or forgotten; the engine's
        self.stopped = threading.Event()  # the answer is not wanted, or the server ends
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def tell(self, event: Event) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it who waited
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        return await self._events.get()

    def leave(self) -> None:
        """Generation stops within a token, reading within a chunk."""
        self.stopped.set()
        self._events.put_nowait(Left())

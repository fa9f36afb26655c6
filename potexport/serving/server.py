"""Sockets, and time limits for clients that do not speak, do not listen, or never end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from potexport.errors import PotexportError
from potexport.serving.engine import Engine

HEADER_SECONDS = 15.0  # for a request's head to arrive
DEAF_SECONDS = 60.0  # that an answer may wait for a client to take it
LONGEST_HEAD = 32 << 10  # bytes


class Punctual(H11Protocol):
    """uvicorn's own, which waits for as long as it takes, with an end to that."""

    _late: asyncio.TimerHandle | None = None
    _deaf: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency and len(self.connections) > 2 * self.limit_concurrency:
            transport.abort()  # beyond those that are told that there are too many
        self._late = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        awaits_head = self.conn.their_state is h11.IDLE
        if not awaits_head:
            self._late = _ended(self._late)
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def on_response_complete(self) -> None:
        self._late = _ended(self._late)  # until the next request begins, uvicorn's own counts
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._deaf = self.loop.call_later(DEAF_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._deaf = _ended(self._deaf)

    def connection_lost(self, exc: Exception | None) -> None:
        self._late, self._deaf = _ended(self._late), _ended(self._deaf)
        super().connection_lost(exc)


def _ended(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer:
        timer.cancel()
    return None


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, engine: Engine, grace: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine, self._grace, self._ready = engine, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers end by themselves within the time of grace, or are cut."""
        asyncio.get_running_loop().call_later(self._grace, self._engine.cut)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """Raises PotexportError if the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise PotexportError(
            f"cannot listen on {host}, port {port}: {why}; choose another --port or --host"
        ) from error


def serve(
    app: ASGIApp,
    engine: Engine,
    listening: socket.socket,
    *,
    connections: int,
    grace: float,
    ready: Callable[[], None],
) -> None:
    """Until SIGINT or SIGTERM, whose second cuts the time of grace short.

    grace: seconds that answers may still take then. ready: called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        http=Punctual,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        h11_max_incomplete_event_size=LONGEST_HEAD,
        timeout_graceful_shutdown=int(grace) + 5,
    )
    with _signals_end_it_well():
        _Server(config, engine, grace, ready).run([listening])


@contextmanager
def _signals_end_it_well() -> Iterator[None]:
    """uvicorn raises a signal again when it has ended; that ends nothing more."""
    names = (signal.SIGINT, signal.SIGTERM)
    before: dict[Any, Any] = {each: signal.signal(each, lambda *_: None) for each in names}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

"""A client that waits: its answer in one piece or as a stream, and what is done when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from potexport.serving.answers import Answer, event
from potexport.serving.engine import Engine
from potexport.serving.jobs import Done, Event, Job, Left, Piece
from potexport.serving.protocol import ApiError
from potexport.serving.web import LEFT, USAGE

ALIVE_SECONDS = 10.0  # between signs of life in a stream, while others are answered or a text read


class Waiting:
    """Watches the connection from the moment that a job was submitted."""

    def __init__(self, request: Request, job: Job, engine: Engine) -> None:
        self._request, self._job, self._engine = request, job, engine
        self._watch = asyncio.create_task(self._until_it_leaves())

    async def _until_it_leaves(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._engine.forget(self._job)

    def close(self) -> None:
        self._watch.cancel()
        self._engine.forget(self._job)

    async def whole(self, answer: Answer) -> Response:
        pieces = []
        try:
            while True:
                came = await self._job.next()
                if isinstance(came, Piece):
                    pieces.append(came.text)
                elif isinstance(came, Done):
                    self._note(came)
                    return JSONResponse(answer.whole("".join(pieces), came.finish, came.usage))
                elif isinstance(came, Left):
                    return Response(status_code=LEFT)
                else:
                    raise came
        finally:
            self.close()

    async def stream(self, answer: Answer) -> Response:
        """What fails before the first token fails as other requests do, unless that takes long."""
        try:
            first = await self._next()
            if isinstance(first, ApiError):
                raise first
        except BaseException:
            self.close()
            raise
        return Events(self, answer, first)

    async def send(
        self, answer: Answer, first: Event | None, send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """The events of a stream, to its end."""
        came = first
        await send(answer.first())
        while not isinstance(came, Left):
            if came is None:
                await send(b": waiting\n\n")
            elif isinstance(came, Piece):
                await send(answer.piece(came.text))
            elif isinstance(came, Done):
                self._note(came)
                await send(answer.last(came.finish, came.usage))
                return
            else:
                await send(event(came.body))
                return
            came = await self._next()

    async def _next(self) -> Event | None:
        """None where nothing came for a while."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ALIVE_SECONDS):
                return await self._job.next()
        return None

    def _note(self, done: Done) -> None:
        self._request.scope[USAGE] = done.usage


class Events(Response):
    """Server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, waiting: Waiting, answer: Answer, first: Event | None) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._waiting, self._answer, self._first = waiting, answer, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        start = {"status": self.status_code, "headers": self.raw_headers}
        try:
            await send({"type": "http.response.start", **start})
            await self._waiting.send(self._answer, self._first, body)
            await body(b"", more=False)
        finally:
            self._waiting.close()

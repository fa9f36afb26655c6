"""What every request goes through: a bounded body, errors in OpenAI's shape, a line in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import cast

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from potexport.serving.answers import Usage
from potexport.serving.metrics import Metrics
from potexport.serving.protocol import ApiError
from potexport.serving.where import where

LEFT = 499  # no status of HTTP; what logs have where nobody was there to be answered
PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/metrics")
USAGE = "potexport.usage"  # where a request's scope has what it took
METHODS = ("GET", "HEAD", "POST")
LINGER = 4  # bodies of so many times the limit are read to their end, and not held
CLOSE = {"connection": "close"}  # the rest of such a body is not waited for


@dataclass(frozen=True)
class Limits:
    """request_bytes: of a body. body_seconds: for all of it to arrive. hosts: names that the server
    answers to; None for any."""

    request_bytes: int
    body_seconds: float
    hosts: frozenset[str] | None


async def read_body(request: Request, limits: Limits) -> bytes:
    """Never more than the limit is held. Raises ApiError for what is no JSON by its type, too long
    or too slow. Many clients look for an answer only when they have sent everything."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also: a browser sends this type to a stranger's server only after it was allowed to.
        raise ApiError(415, "the content type must be application/json", headers=CLOSE)
    held, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for block in request.stream():
                size += len(block)
                if size <= limits.request_bytes:
                    held += block
                elif size > LINGER * limits.request_bytes:
                    break
    except TimeoutError as error:
        raise ApiError(408, "the body did not arrive in time", headers=CLOSE) from error
    if size > limits.request_bytes:
        most = f"{limits.request_bytes:,} bytes"
        raise ApiError(413, f"the body is longer than {most}", code="too_long", headers=CLOSE)
    return bytes(held)


def api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


def http_error(_request: Request, error: Exception) -> Response:
    """Starlette's own: no such address, or another method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}; there are {', '.join(PATHS)}"
    made = ApiError(error.status_code, message, headers=error.headers)
    return api_error(_request, made)


class Lines:
    """Around the whole app: one line in the log for each request, and no error without an answer.

    No line has an address's own text, a name or a word of a body: only what we know ourselves.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tell: Callable[[str], None]) -> None:
        self._app, self._metrics, self._tell = app, metrics, tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started, status = perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = cast("int", message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except (ClientDisconnect, asyncio.CancelledError):
            status = LEFT
        except Exception as error:
            self._tell(where(error))
            if not status:
                made = ApiError(500, "the server failed; its log says where")
                await api_error(Request(scope), made)(scope, receive, watched)
        self._metrics.requests.labels(str(status)).inc()
        self._tell(_line(scope, status, perf_counter() - started))


def _line(scope: Scope, status: int, seconds: float) -> str:
    path = scope["path"] if scope["path"] in PATHS else "another address"
    method = scope["method"] if scope["method"] in METHODS else "?"
    usage = scope.get(USAGE)
    took = ""
    if isinstance(usage, Usage):
        took = f", {usage.prompt - usage.cached:,} tokens read, {usage.completion:,} generated"
    return f"{method} {path}: {status}, {seconds:.2f} s{took}"

"""The HTTP of it: which addresses there are, what is checked first, how a client is answered."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from time import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from potexport.serving.answers import Answer
from potexport.serving.auth import Keys, host_of
from potexport.serving.engine import Engine
from potexport.serving.jobs import Job
from potexport.serving.metrics import Metrics
from potexport.serving.protocol import ApiError, Served, chain, conversation_id, parse
from potexport.serving.waiting import Waiting
from potexport.serving.web import PATHS, Limits, Lines, api_error, http_error, read_body

CONVERSATION = "x-conversation-id"


class Api:
    """One bundle's endpoints."""

    def __init__(
        self,
        engine: Engine,
        served: Served,
        metrics: Metrics,
        *,
        keys: Keys,
        limits: Limits,
        fingerprint: str,
    ) -> None:
        self._engine, self._served, self._metrics = engine, served, metrics
        self._keys, self._limits, self._fingerprint = keys, limits, fingerprint
        self._started = int(time())

    def app(self, tell: Callable[[str], None]) -> ASGIApp:
        """tell: takes a line for each request."""
        chat, models, health, metrics = PATHS
        routes = [
            Route(chat, self._guarded(self.chat), methods=["POST"]),
            Route(models, self._guarded(self.models)),
            Route(models + "/{name:path}", self._guarded(self.model)),
            Route(health, self.health),
            Route(metrics, self._guarded(self.metrics)),
        ]
        made = Starlette(
            routes=routes,
            exception_handlers={ApiError: api_error, HTTPException: http_error},
        )
        return Lines(made, self._metrics, tell)

    def _guarded(
        self, endpoint: Callable[[Request, str], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            hosts = self._limits.hosts
            if hosts is not None and host_of(request.headers.get("host", "")) not in hosts:
                # A web page may call its own name this machine's address, and read the answers.
                raise ApiError(403, "this server answers to localhost alone", code="wrong_host")
            return await endpoint(request, self._keys.check(request.headers.get("authorization")))

        return guarded

    async def health(self, _request: Request) -> Response:
        well = self._engine.alive
        status = {"status": "ok" if well else "ending", "waiting": self._engine.waiting}
        return JSONResponse(status, 200 if well else 503)

    async def metrics(self, _request: Request, _owner: str) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _request: Request, _owner: str) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, _owner: str) -> Response:
        if request.path_params["name"] != self._served.name:
            message = f"there is no such model here; use {self._served.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        made = {"created": self._started, "owned_by": "potexport"}
        return {"id": self._served.name, "object": "model", **made}

    async def chat(self, request: Request, owner: str) -> Response:
        body = await read_body(request, self._limits)
        asked = parse(body, self._served)
        given = conversation_id(request.headers.get(CONVERSATION)) or asked.conversation or ""
        scope = json.dumps([owner, given, asked.variables], sort_keys=True)
        job = Job(asked, list(chain(scope, asked.messages)))
        self._engine.submit(job)
        answer = Answer(
            model=self._served.name,
            fingerprint=self._fingerprint,
            include_usage=asked.include_usage,
        )
        waiting = Waiting(request, job, self._engine)
        return await waiting.stream(answer) if asked.stream else await waiting.whole(answer)

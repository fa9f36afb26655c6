"""The thread that answers a server's requests, where its parts fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potexport.errors import PotexportError
from potexport.runtime import metering
from potexport.runtime.session import Session
from potexport.serving.engine import Engine
from potexport.serving.jobs import Done, Job, Piece
from potexport.serving.metrics import Metrics
from potexport.serving.protocol import ApiError, Served, chain, parse
from potexport.serving.sessions import Sessions

BODY = b'{"messages": [{"role": "user", "content": "Who walks there?"}], "max_tokens": 3}'


async def ends(engine: Engine, *bodies: bytes) -> list[Done | ApiError]:
    """How each request ends, one after another."""
    found = []
    for body in bodies:
        asked = parse(body, Served("tiny", max_tokens=8, temperature=0.0))
        job = Job(asked, list(chain("", asked.messages)))
        engine.submit(job)
        while isinstance(came := await job.next(), Piece):
            pass
        assert isinstance(came, (Done, ApiError))
        found.append(came)
    return found


@pytest.fixture
def started(bundle: Path, tmp_path: Path) -> Callable[..., tuple[Engine, Session, list[str]]]:
    def start(rest: Callable[[], None]) -> tuple[Engine, Session, list[str]]:
        session, told = Session.open(bundle, threads=1), list[str]()
        kept = Sessions(session, tmp_path, memory=1, disk=0, tell=told.append)
        return Engine(kept, Metrics(), queue=4, tell=told.append, rest=rest), session, told

    return start


def test_it_rests_behind_each_answer_and_outlives_that(started: Any) -> None:
    rested = list[int]()

    def rest() -> None:
        rested.append(len(rested))
        if len(rested) == 1:
            raise OSError("no rest")

    engine, _, told = started(rest)
    found = asyncio.run(ends(engine, BODY, BODY))
    engine.close(save=False)
    assert all(isinstance(each, Done) for each in found)
    assert len(rested) == 2
    assert len(told) == 1
    assert "OSError" in told[0]


def test_graphs_that_fail_are_our_fault_and_a_chat_is_not(
    started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, session, told = started(lambda: None)

    def fails(*_: object, **__: object) -> None:
        raise PotexportError("ONNX Runtime stopped within a graph")

    monkeypatch.setattr(session.backend, "prefill", fails)
    monkeypatch.setattr(session.backend, "decode", fails)
    long = BODY.replace(b"Who", b"Who and who " * 20)
    ours = asyncio.run(ends(engine, long))
    monkeypatch.setattr(metering, "MAX_SECONDS", -1)  # as for a template that refuses
    theirs = asyncio.run(ends(engine, long))
    engine.close(save=False)
    assert [getattr(each, "status", 200) for each in (*ours, *theirs)] == [500, 400]
    assert told == ["ONNX Runtime stopped within a graph"]

"""Processes that hold something to measure and answer, one question at a time.

A process each, so that the memory of one is not counted to another, two copies of a library do not
meet, and one that dies takes nobody along.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from potexport.errors import PotexportError

# Read when a library is loaded, which the process does that inherits them.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
CLOSING = 30.0  # seconds until a process that does not end is ended


class WorkerError(Exception):
    """What is held failed, or its process died; the message says how."""


class Worker:
    """A process that makes one object of `make(*arguments)` and calls its methods."""

    def __init__(self, make: Callable[..., Any], *arguments: Any, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        with _threads(threads):
            self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *arguments: Any) -> Any:
        """PotexportError as it was raised there; WorkerError for anything else."""
        with suppress(OSError):  # it is gone; how it ended is said below
            self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(CLOSING)
            raise WorkerError(_how_it_ended(self._process.exitcode)) from error
        if kind == "answer":
            return answer
        raise answer if kind == "refused" else WorkerError(answer)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(CLOSING)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = "; it may have had too little memory" if name == "SIGKILL" else ""
        return f"its process died of {name}{memory}"
    return f"its process ended with code {code}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """What a process started within inherits."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with suppress(BrokenPipeError):  # the other side ended before it was answered
        _answer(pipe, make, arguments)


def _answer(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answer until the other side closes the pipe."""
    held: Any = None
    question: tuple[str, tuple[Any, ...]] | None = None
    while True:
        try:
            if held is None:
                held, answer = make(*arguments), None
            else:
                assert question is not None
                answer = getattr(held, question[0])(*question[1])
            pipe.send(("answer", answer))
        except PotexportError as error:
            pipe.send(("refused", error))
        except Exception as error:  # of a peer: any library's; of ours: a bug, so say where
            where = traceback.extract_tb(error.__traceback__)[-1]
            first = (str(error).strip().splitlines() or ["no message"])[0][:200]
            place = f"{os.path.basename(where.filename)}:{where.lineno}"
            pipe.send(("failed", f"{type(error).__name__}: {first} ({place})"))
        if held is None:
            return
        try:
            question = pipe.recv()
        except EOFError:
            return

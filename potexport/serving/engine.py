"""One thread owns the graphs and answers one request at a time; the others wait in a bounded line.

The graphs are made for one text, so two at once would only make both slower. What waits is a
request, never a pot.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter

from potexport.errors import ChatError, PotexportError
from potexport.runtime.session import Session
from potexport.serving.jobs import Done, Job, Piece
from potexport.serving.metrics import Metrics
from potexport.serving.protocol import ApiError, link
from potexport.serving.sessions import Sessions
from potexport.serving.turn import Turn
from potexport.serving.where import where

LONGEST_WAIT = 60  # seconds that a client is told to wait at most before it tries again
ENDING = "the server is ending; try again later"


class _StoppedError(Exception):
    """While a text is read, because nobody waits for the answer."""


class Engine:
    """Started when made; `close` ends it."""

    def __init__(
        self,
        sessions: Sessions,
        metrics: Metrics,
        *,
        queue: int,
        tell: Callable[[str], None],
        rest: Callable[[], None],
    ) -> None:
        """queue: how many requests may wait behind the one that is computed. rest: called between
        two of them."""
        self._sessions, self._metrics, self._tell, self._rest = sessions, metrics, tell, rest
        self._session: Session = sessions.session
        self._most, self._waiting = queue, deque[Job]()
        self._running: Job | None = None
        self._pace = 1.0  # seconds that a turn took lately
        self._ending = False
        self._changed = threading.Condition()
        metrics.watch(
            waiting=lambda: self.waiting,
            running=lambda: self._running is not None,
            in_memory=lambda: sessions.in_memory,
            on_disk=lambda: sessions.on_disk,
        )
        self._thread = threading.Thread(target=self._work, name="potexport engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._ending

    def submit(self, job: Job) -> None:
        """Raises ApiError if the line is full, or the server ends."""
        with self._changed:
            if not self.alive:
                raise ApiError(503, ENDING, code="ending")
            if len(self._waiting) >= self._most:
                raise ApiError(
                    429,
                    f"{self._most} requests wait already; try again in a while",
                    code="queue_full",
                    headers={"retry-after": str(self._patience())},
                )
            self._waiting.append(job)
            self._changed.notify()

    def _patience(self) -> int:
        """Seconds until a place should be free."""
        return max(1, min(LONGEST_WAIT, math.ceil(self._pace)))

    def forget(self, job: Job) -> None:
        """Nobody waits for it: its place in the line is free again, or what is computed stops."""
        job.leave()
        with self._changed:
            if job.over:
                return
            job.over = True
            self._metrics.left.inc()
            if job in self._waiting:
                self._waiting.remove(job)

    def cut(self) -> None:
        """End the answer that is computed, and refuse those that wait."""
        with self._changed:
            self._ending = True
            if self._running:
                self._running.stopped.set()
            while self._waiting:
                self._waiting.popleft().tell(ApiError(503, ENDING, code="ending"))
            self._changed.notify()

    def close(self, *, save: bool) -> None:
        """Cut, and wait for it; see `Sessions.close`."""
        self.cut()
        self._thread.join()
        self._sessions.close(save=save)

    def _work(self) -> None:
        while job := self._next():
            started = perf_counter()
            self._metrics.waited.observe(started - job.since)
            end: Done | ApiError
            try:
                end = self._turn(job)
            except _StoppedError:
                end = ApiError(503, ENDING, code="ending")
            except ApiError as error:
                end = error
            except PotexportError as error:  # of the graphs; it has nothing of the request
                self._tell(str(error))
                end = ApiError(500, str(error))
            except Exception as error:  # the next request is answered all the same
                self._tell(where(error))
                end = ApiError(500, "no answer could be computed; the server's log says where")
            seconds = perf_counter() - started
            self._metrics.computed.observe(seconds)
            self._pace += (seconds - self._pace) / 4
            with self._changed:
                self._running, job.over = None, True
            job.tell(end)
            try:
                self._rest()
            except Exception as error:
                self._tell(where(error))

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._ending:
                self._changed.wait()
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _turn(self, job: Job) -> Done | ApiError:
        """What was shown of an answer that is stopped was said, as of any other."""
        count, origin = self._sessions.enter(job.keys)
        self._metrics.turns.labels(origin).inc()
        turn = Turn(self._session, job.asked.max_new_tokens)
        try:
            self._speak(job, turn)
        finally:
            self._count(turn)
        key = link(job.keys[-1], {"role": "assistant", "content": turn.text})
        self._sessions.leave(key, parent=job.keys[count - 1] if count else None)
        if job.stopped.is_set():
            return ApiError(503, ENDING, code="ending")
        return Done(turn.finish, turn.usage)

    def _speak(self, job: Job, turn: Turn) -> None:
        def check(_read: int, _all: int) -> None:
            if job.stopped.is_set():
                raise _StoppedError

        asked = job.asked
        try:
            stream = self._session.chat(
                asked.messages,
                max_new_tokens=asked.max_new_tokens,
                sampling=asked.sampling,
                stop=asked.stop,
                on_progress=check,
                **asked.variables,
            )
        except ChatError as error:  # the template's word, mostly
            raise ApiError(400, str(error)) from error
        turn.begin()
        for token in stream:
            turn.take(token)
            if token.text:
                job.tell(Piece(token.text))
            if job.stopped.is_set():
                return

    def _count(self, turn: Turn) -> None:
        done = turn.stats
        self._metrics.read.inc(done.tokens_read)
        self._metrics.generated.inc(done.tokens_generated)
        self._metrics.compressions.inc(done.compressions)

"""One answer as it is computed: its text so far, why it ended, and what it took."""

from __future__ import annotations

from potexport.runtime.records import Stats, Token
from potexport.runtime.session import Session
from potexport.serving.answers import Finish, Usage


class Turn:
    """Made before the session reads, `begin` called when it has."""

    def __init__(self, session: Session, limit: int) -> None:
        """limit: of tokens."""
        self._session, self._limit = session, limit
        self._before, self._length = session.stats, session.length
        self._prompt = self._cached = self._count = 0
        self._last: int | None = None
        self._pieces: list[str] = []

    def begin(self) -> None:
        """The prompt is fed, and nothing generated yet."""
        self._prompt = self._session.length
        self._cached = 0 if self._anew else self._length

    def take(self, token: Token) -> None:
        self._count += 1
        self._last = token.id
        self._pieces.append(token.text)

    @property
    def _anew(self) -> bool:
        """Whether the session forgot what it held and read all of the conversation."""
        done = self._session.stats.since(self._before)
        return min(done.tokens_read, done.tokens_generated, done.compressions) < 0

    @property
    def stats(self) -> Stats:
        """What was done."""
        stats = self._session.stats
        return stats if self._anew else stats.since(self._before)

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def finish(self) -> Finish:
        ended = self._last in self._session.manifest.eos_token_ids
        return "stop" if ended or self._count < self._limit else "length"

    @property
    def usage(self) -> Usage:
        return Usage(prompt=self._prompt, cached=self._cached, completion=self._count)

"""A conversation on the command line: turns, and what is typed with a slash.

It prints nothing itself; `cli_chat` reads the lines and shows what comes back.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from potexport.errors import PotexportError
from potexport.kept_text import Piece, Watched, pieces
from potexport.runtime.saved import check_place
from potexport.runtime.session import Session, Token

if TYPE_CHECKING:
    from potexport.runtime.sampling import Sampling

HELP = """\
/save PATH     keep the conversation in a file
/load PATH     go on from such a file
/pot           what the pot still holds, gaps shown
/system        the system prompt; with a TEXT, begin anew with that one
/reset         forget all but the system prompt
/exit          leave; Ctrl-D too
//TEXT         say a text that begins with a slash
Ctrl-C stops an answer."""


class StoppedError(Exception):
    """The reading of a message was stopped."""


class Stop(AbstractContextManager["Stop"]):
    """Ctrl-C while it lasts asks for a stop, and ends nothing by itself: no graph is cut short."""

    asked = False

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


@dataclass(frozen=True)
class Answer:
    """stopped: whether somebody did, before its end."""

    tokens: list[Token]
    stopped: bool


class Talk:
    """Turns of one session. system: the prompt that a conversation begins with."""

    def __init__(
        self,
        session: Session,
        *,
        system: str | None,
        limit: int,
        sampling: Sampling,
        stop: tuple[str, ...],
    ) -> None:
        self.session, self.system = session, system
        self._limit, self._sampling, self._stop = limit, sampling, stop
        self._watched = Watched(session.backend)
        session.backend = self._watched

    def check(self) -> None:
        """PotexportError now, and not in the first turn, where the template takes no system prompt,
        or there is none."""
        self.session.text.chat([*self._beginning(), {"role": "user", "content": "?"}])

    def _beginning(self) -> list[dict[str, Any]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def say(
        self,
        content: str,
        *,
        tell: Callable[[str], None],
        on_progress: Callable[[int, int], None] | None = None,
        on_read: Callable[[], None] = lambda: None,
    ) -> Answer:
        """One turn. tell: is given the answer's text, piece by piece, after `on_read`."""
        messages = [*(self.session.chat.messages or self._beginning())]
        messages.append({"role": "user", "content": content})
        tokens: list[Token] = []
        with Stop() as stop:

            def progressed(read: int, total: int) -> None:
                if on_progress:
                    on_progress(read, total)
                if stop.asked:
                    raise StoppedError

            try:
                stream = self.session.chat(
                    messages,
                    max_new_tokens=self._limit,
                    sampling=self._sampling,
                    stop=self._stop,
                    on_progress=progressed,
                )
            except StoppedError:
                return Answer([], True)
            on_read()
            for token in stream:
                tokens.append(token)
                tell(token.text)
                if stop.asked:
                    return Answer(tokens, True)
        return Answer(tokens, False)

    def save(self, path: str) -> str:
        check_place(path)
        self.session.save(path)
        size = Path(path).stat().st_size
        return f"{path}: {self.session.stats.fill:,} slots saved, {size / 1e6:,.1f} MB"

    def load(self, path: str) -> str:
        """Raises PotexportError, and leaves all as it was, for a file without a conversation."""
        before, settings = self.session.snapshot(), self.session.settings()
        self.session.load(path)
        try:
            self.check_loaded(path)
        except PotexportError:
            self.session.use(settings)
            self.session.restore(before)
            raise
        self._watched.begin()
        stats = self.session.stats
        return (
            f"{path}: {stats.tokens_read:,} tokens were read, {stats.compressions:,} compressions"
        )

    def check_loaded(self, path: str) -> None:
        """Take the system prompt of what was loaded; PotexportError if it was no conversation."""
        messages = self.session.chat.messages
        if not messages:
            raise PotexportError(
                f"{path} holds a text and no conversation; ask it with: potexport run --load"
            )
        first = messages[0]
        self.system = first.get("content") if first["role"] == "system" else None

    def reset(self) -> None:
        self.session.reset()
        self._watched.begin()

    def begin_with(self, system: str) -> None:
        """Raises PotexportError, and goes on with the old one, if the template takes none."""
        before, self.system = self.system, system
        try:
            self.check()
        except PotexportError:
            self.system = before
            raise
        self.reset()

    def pot(self) -> Kept:
        session, stats = self.session, self.session.stats
        pot = session.backend.pot
        facts = {
            "fill": stats.fill,
            "slots": session.manifest.pot.slots,
            "position": pot.position,
            "positions": session.manifest.pot.positions,
            "length": session.length,
            "compressions": stats.compressions,
            "keep": session.keep,
            "pinned": session.pinned,
            "policy": session.policy,
            "unknown": self._watched.unknown,
        }
        return Kept(facts, list(pieces(session.text, self._watched)))


@dataclass(frozen=True)
class Kept:
    """What `/pot` shows. unknown, of the facts: slots filled before the file was loaded."""

    facts: dict[str, Any]
    pieces: list[Piece]

    def to_json(self) -> dict[str, Any]:
        return {**self.facts, "pieces": [asdict(piece) for piece in self.pieces]}

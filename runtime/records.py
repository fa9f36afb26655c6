"""What a session hands out: tokens, what it has done, and all that it holds at one moment."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

from potexport.runtime.backend import Array
from potexport.runtime.ids import Ids
from potexport.runtime.pot import Contents
from potexport.runtime.said import Said


class Token(NamedTuple):
    """A generated token and the text it completes, which may be empty."""

    id: int
    text: str


@dataclass(frozen=True)
class Stats:
    """What a session has done. Seconds are of wall time."""

    tokens_read: int = 0  # fed ones; those still waiting for a full chunk come later
    tokens_generated: int = 0
    compressions: int = 0
    fill: int = 0  # slots that hold a token now
    read_seconds: float = 0.0  # prefill alone
    compress_seconds: float = 0.0  # catalyst and compression
    generate_seconds: float = 0.0  # decode and sampling, one decode for each prompt included

    def since(self, before: Stats) -> Stats:
        """What was done since then; `fill` as it is now."""
        names = [each.name for each in fields(self) if each.name != "fill"]
        return replace(self, **{n: getattr(self, n) - getattr(before, n) for n in names})

    @property
    def read_speed(self) -> float:
        """Tokens per second of reading, compressions included."""
        seconds = self.read_seconds + self.compress_seconds
        return self.tokens_read / seconds if seconds else 0.0

    @property
    def generate_speed(self) -> float:
        """Tokens per second of generating."""
        return self.tokens_generated / self.generate_seconds if self.generate_seconds else 0.0


@dataclass(frozen=True)
class State:
    """A session at one moment, without its settings; see `Session.snapshot`."""

    pot: Contents
    pending: Ids
    fed: int
    novelty: float
    last: Array | None
    to_come: int | None
    tail: Ids
    stats: Stats
    said: Said | None = None


@dataclass(frozen=True)
class Settings:
    """How a session compresses: its policy's label, how much is kept, and what scores the pot.

    asked: whether somebody set the catalyst. note: see `Session.note`.
    """

    policy: str
    keep: int | Literal["auto"]
    keep_mass: float
    asked: bool
    catalyst: Ids
    note: str

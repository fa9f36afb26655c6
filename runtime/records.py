"""What a session hands out: tokens, what it has done, and all that it holds at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from potexport.runtime.backend import Array
from potexport.runtime.pot import Contents

Ids = npt.NDArray[np.int32]


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

"""What a session still holds of what went through its pot, told in the text's own words.

A backend that takes down which token is in which slot of each head; the graphs are another's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from potexport.bundle import PolicyFacts
from potexport.runtime.backend import Array, Backend
from potexport.runtime.text import Text

UNKNOWN = -1  # a token that was in the pot before it was watched
MOST = 0.5  # of the heads, that must hold a token for it to be told


class Watched:
    """The same backend, watched; see `runtime.backend`."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self.pot = backend, backend.pot
        self.begin()

    def begin(self) -> None:
        """Watch from here on: of what is in the pot now nothing is known."""
        pot = self.pot
        self.ids: list[int] = []
        self._slots = [
            np.full((positions.shape[0], pot.filled(layer)), UNKNOWN, np.int32)
            for layer, positions in zip(pot.chosen, pot.positions, strict=True)
        ]

    @property
    def policy(self) -> PolicyFacts:
        return self._backend.policy

    @policy.setter
    def policy(self, policy: PolicyFacts) -> None:
        self._backend.policy = policy

    def prefill(self, ids: Array, next_ids: Array, first_novelty: float) -> float:
        self._take(ids)
        return self._backend.prefill(ids, next_ids, first_novelty)

    def decode(self, token: int, novelty: float) -> Array:
        self._take(np.array([token]))
        return self._backend.decode(token, novelty)

    def observe(self, ids: Array, *, back: int = 0, into: str = "mass") -> None:
        self._backend.observe(ids, back=back, into=into)

    def compress(self, keep: int, *, reset: bool = True) -> list[Array]:
        kept = self._backend.compress(keep, reset=reset)
        self._slots = [
            np.take_along_axis(slots, np.asarray(stay), axis=1)
            for slots, stay in zip(self._slots, kept, strict=True)
        ]
        return kept

    def fork(self) -> Backend:
        return self._backend.fork()

    def _take(self, ids: Array) -> None:
        fills = self.pot.counts_of(self.pot.fills)
        if [slots.shape[1] for slots in self._slots] != fills:  # reset, or another's pot
            self.begin()
        new = np.arange(len(self.ids), len(self.ids) + ids.size, dtype=np.int32)
        self.ids += map(int, ids)
        self._slots = [
            np.concatenate([slots, np.broadcast_to(new, (len(slots), new.size))], axis=1)
            for slots in self._slots
        ]

    def shares(self) -> Array:
        """(n,) of each token watched the share of heads, of all layers, that hold it."""
        held = np.concatenate([slots.ravel() for slots in self._slots])
        heads = sum(map(len, self._slots))
        found: Array = np.bincount(held[held != UNKNOWN], minlength=len(self.ids)) / heads
        return found

    @property
    def unknown(self) -> int:
        """How many slots, of the head with the most, hold what was there before."""
        return max(int((slots == UNKNOWN).sum(axis=1).max(initial=0)) for slots in self._slots)


@dataclass(frozen=True)
class Piece:
    """Tokens that stand together, all held or all gone. text: only of held ones."""

    tokens: int
    text: str
    held: bool


def pieces(text: Text, watched: Watched) -> Iterator[Piece]:
    """All that was watched, in order: what most heads hold, and the gaps."""
    # How a token is written depends on those before it, also where they are gone.
    names = {text.token_id(name): name for name in text.controls.names}
    stream = text.stream()
    count, said, held = 0, "", False
    for token, share in zip(watched.ids, watched.shares(), strict=True):
        written = stream.push(token) or names.get(token, "")
        if bool(share >= MOST) is not held:
            if count:
                yield Piece(count, said if held else "", held)
            count, said, held = 0, "", not held
        count, said = count + 1, said + written
    if count:
        yield Piece(count, said + stream.flush() if held else "", held)

"""One policy a file: the rule that turns what is known of a slot into a score.

A new policy is a new file here with one subclass of `Policy`; nothing else changes. Its name on the
command line is the file's name with `-` for `_`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from potexport.graphs.select import Candidates

NEEDS = frozenset(
    {"mass", "window", "received", "novelty", "keys", "values", "queries"}  # see `Candidates`
)


@dataclass(frozen=True)
class Policy(ABC):
    """Scores slots. Fields of a subclass are its settings, with defaults, and go into the
    manifest."""

    needs: ClassVar[frozenset[str]]  # of NEEDS; a property where settings decide

    @property
    def looks(self) -> int:
        """How many numbers of a slot `look` gives."""
        return int(bool(self.needs & {"keys", "values"}))

    @property
    def observed(self) -> int:
        """Of how many of the last tokens read it wants the attention ("window"); 0 for none."""
        return 0

    @property
    def can_be_blind(self) -> bool:
        """Whether it scores without a catalyst too, then with a mass of 0 everywhere."""
        return "mass" not in self.needs

    def look(self, layer: Candidates) -> tuple[Tensor, ...]:
        """What `score` wants to know of keys and values, as numbers of slots: each (Hkv, M).

        Of one layer at a time, which a cache of the processor may hold; what `score` makes of it
        is computed for all layers at once.
        """
        return ()

    @abstractmethod
    def score(self, slots: Candidates) -> Tensor:
        """(R, M) float32: the higher, the longer a slot stays; `slots.seen` is what `look` gave.
        Free and forced slots are the caller's."""

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


@dataclass(frozen=True)
class Policy(ABC):
    """Scores slots. Fields of a subclass are its settings, with defaults, and go into the
    manifest."""

    needs: ClassVar[frozenset[str]]  # of "mass", "novelty", "keys", "values"

    @abstractmethod
    def score(self, slots: Candidates) -> Tensor:
        """(R, M) float32: the higher, the longer a slot stays. Free and forced slots are the
        caller's."""

"""StreamingLLM: sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from potexport.graphs.policies import Policy
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class Streaming(Policy):
    """The later, the better; sinks are forced for every policy.

    Source: arXiv 2309.17453, section 3.2. Differs: drops down to `keep` at once and not one token a
    step.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, slots: Candidates) -> Tensor:
        return slots.slot.float()[None]  # (1, M): every head keeps the same

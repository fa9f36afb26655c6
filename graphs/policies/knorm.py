"""Knorm: keys of small norm are attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from potexport.graphs.policies import Policy
from potexport.graphs.pooling import stepped
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class Knorm(Policy):
    """s_t = -|k_t|, the Euclidean norm, which no rotation changes.

    Source: arXiv 2406.11430, section 3. Differs: nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def look(self, layer: Candidates) -> tuple[Tensor, ...]:
        assert layer.keys is not None
        keys = layer.keys.float()
        return (stepped(-(keys * keys).sum(dim=1).sqrt()),)

    def score(self, slots: Candidates) -> Tensor:
        return slots.seen[0]

"""SirLLM: the most surprising tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from potexport.graphs.policies import Policy
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class SirLLM(Policy):
    """s_t = -log p of the token when it was read: the same in all heads at first, and carried on.

    Source: arXiv 2405.12528, section 3 (token entropy). Differs: no decay of older tokens; drops
    down to `keep` at once.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"novelty"})

    def score(self, slots: Candidates) -> Tensor:
        assert slots.novelty is not None
        return slots.novelty

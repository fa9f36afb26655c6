"""H2O: the tokens that received most attention so far, and as many of the most recent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from potexport.graphs.policies import Policy
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class H2O(Policy):
    """s_t = the sum over all tokens read since t of their attention to slot t; half of the budget
    goes to the most recent slots.

    Source: arXiv 2306.14048, section 4 and its algorithm 1. Differs: drops down to `keep` at once;
    averaged over the query heads of a group.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"received"})

    def score(self, slots: Candidates) -> Tensor:
        assert slots.received is not None
        received = torch.where(slots.occupied, slots.received, 0.0)
        # As a share of the largest: sums over a book leave the range of scores.
        share = received / received.amax(dim=-1, keepdim=True).clamp(min=1e-6)
        return torch.where(slots.last(slots.keep // 2), 2.0, share)

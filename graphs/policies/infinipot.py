"""InfiniPot: the most surprising tokens first, then those that a catalyst prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from potexport.errors import PotexportError
from potexport.graphs.policies import Policy
from potexport.graphs.pooling import check_pool, max_pool
from potexport.graphs.select import Candidates, best

NOVEL = 4096.0  # above any mass, which is at most the number of catalyst tokens


@dataclass(frozen=True)
class InfiniPot(Policy):
    """The `alpha x keep` most novel slots, then the best pooled mass of the rest.

    Source: arXiv 2410.01518, sections 3.2 (catalyst prompt), 3.3 (novelty) and their order in 3.3,
    alpha = 0.5.
    Differs: the mass is max-pooled over `pool` neighbouring slots (the paper leaves pooling open;
    SnapKV pools with 5 or 7); a needle of several tokens is lost without it. Sinks and recent slots
    are kept besides, and none of them counts as novel.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"mass", "novelty"})
    alpha: float = 0.5
    pool: int = 13

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PotexportError(
                f"--alpha is {self.alpha}; it is the share of novel slots, from 0 to 1"
            )
        check_pool(self.pool)

    def score(self, slots: Candidates) -> Tensor:
        assert slots.mass is not None
        assert slots.novelty is not None
        mass = max_pool(slots.mass, self.pool)
        # A table, not a product: rounding alpha x keep in fp16 would be off by one.
        shares = [floor(self.alpha * keep + 0.5) for keep in range(slots.keep_max + 1)]
        share = torch.tensor(shares, dtype=torch.int32).index_select(0, slots.keep)
        count = torch.minimum(share, slots.room)
        novel = best(slots.novelty, slots.open, count, slots.keep_max)
        return torch.where(novel, NOVEL, mass)

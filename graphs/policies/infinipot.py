"""InfiniPot: the most surprising tokens first, then those that a catalyst prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from potexport.errors import PotexportError
from potexport.graphs.policies import Policy
from potexport.graphs.select import Candidates, top


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
        if self.pool < 1 or self.pool % 2 == 0:
            raise PotexportError(f"--pool is {self.pool}; it must be odd, 1 for no pooling")

    def score(self, slots: Candidates) -> Tensor:
        assert slots.mass is not None
        assert slots.novelty is not None
        mass = (
            max_pool1d(slots.mass[None], self.pool, stride=1, padding=self.pool // 2)[0]
            if self.pool > 1
            else slots.mass
        )
        most = ceil(self.alpha * slots.keep_max)
        if most == 0:
            return mass
        width = slots.slot.shape[0]
        _, novel = top(torch.where(slots.open, slots.novelty, -1.0), min(most, width))
        # Rounded half up: the same in every runtime, where "round half to even" is not.
        count = torch.floor(self.alpha * slots.keep.float() + 0.5)
        rank = torch.arange(min(most, width), dtype=torch.float32)
        tier = (
            (count - rank).clamp(min=0.0).expand(novel.shape)
        )  # most novel highest, 0 past `count`
        tier = torch.zeros_like(mass).scatter(-1, novel, tier)
        # Mass is at most the number of catalyst tokens, far below 4,096; fp16 still tells 4,096 + n
        # from 4,096 + n + 4.
        return torch.where(tier > 0, 4096.0 + tier, mass)

"""What a catalyst prompt attends to: the question, if it is known, or a general instruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from potexport.graphs.policies import Policy
from potexport.graphs.pooling import check_pool, max_pool
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class Catalyst(Policy):
    """u_t = the sum over the catalyst's tokens of their attention to slot t, max-pooled.

    Source: arXiv 2410.01518, section 3.2 (CaP): InfiniPot with alpha = 0. Differs: pooled over
    `pool` neighbouring slots.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    pool: int = 13

    def __post_init__(self) -> None:
        check_pool(self.pool)

    def score(self, slots: Candidates) -> Tensor:
        assert slots.mass is not None
        return max_pool(slots.mass, self.pool)

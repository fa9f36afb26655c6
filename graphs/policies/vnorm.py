"""Values of large norm bring most to what attends to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from potexport.graphs.policies import Policy
from potexport.graphs.pooling import check_pool, mean_pool, stepped
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class Vnorm(Policy):
    """s_t = |v_t|, the Euclidean norm, averaged over `pool` neighbouring slots.

    Source: arXiv 2506.15745 (InfiniPot-V), section 4, where it stands beside a dissimilarity of
    keys: `blend` can do that. Differs: the norm is not compared within frames, which text has not.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    pool: int = 9

    def __post_init__(self) -> None:
        check_pool(self.pool)

    def look(self, layer: Candidates) -> tuple[Tensor, ...]:
        assert layer.values is not None
        values = layer.values.float()
        return (stepped((values * values).sum(dim=-1).sqrt()),)

    def score(self, slots: Candidates) -> Tensor:
        return mean_pool(slots.seen[0], self.pool, slots.occupied)

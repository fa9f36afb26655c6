"""KeyDiff: keys unlike the average key are worth keeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from potexport.graphs.policies import Policy
from potexport.graphs.pooling import check_pool, mean_pool, stepped
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Minus the cosine between a key and the mean direction of all occupied keys: no catalyst, no
    extra pass.

    Source: arXiv 2504.15364, section 3. Differs: the mean is over what the pot holds, in place of
    the whole context; keys are compared as they were before rotation (`rotated`), and scores are
    averaged over `pool` neighbours. `rotated=true,pool=1` is the paper's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    pool: int = 9
    rotated: bool = False

    def __post_init__(self) -> None:
        check_pool(self.pool)

    def look(self, layer: Candidates) -> tuple[Tensor, ...]:
        assert layer.keys is not None
        keys = layer.keys.float().transpose(1, 2) if self.rotated else layer.plain_keys
        # (Hkv, M, D). Products with vectors and no normalised copy of all keys: that is a third of
        # the work.
        norm = (keys * keys).sum(dim=-1).sqrt().clamp(min=1e-6)  # (Hkv, M)
        share = torch.where(layer.occupied, 1.0 / norm, 0.0) / layer.fill.float()
        anchor = share[:, None] @ keys  # (Hkv, 1, D): the mean direction
        length = (anchor * anchor).sum(dim=-1).sqrt().clamp(min=1e-6)  # (Hkv, 1)
        along = (keys @ anchor.transpose(1, 2))[..., 0]  # (Hkv, M)
        return (stepped(-along / (norm * length)),)

    def score(self, slots: Candidates) -> Tensor:
        return mean_pool(slots.seen[0], self.pool, slots.occupied)

"""SnapKV: what the last tokens read attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from potexport.errors import PotexportError
from potexport.graphs.policies import Policy
from potexport.graphs.pooling import check_pool, mean_pool
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class SnapKV(Policy):
    """s_t = the mean over the last `window` tokens, and the query heads of a group, of their
    attention to slot t, mean-pooled over `pool` slots; the window itself stays.

    Source: arXiv 2404.14469, section 4. Differs: the window is read once more over the pot, in
    place of keeping its attention from the first time; pooled behind the mean over the group, which
    is the same; at the first slots the mean is over as many neighbours as there are.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"window"})
    window: int = 32
    pool: int = 7

    def __post_init__(self) -> None:
        check_pool(self.pool)
        if self.window < 1:
            raise PotexportError(f"--window is {self.window}; it must be at least 1")

    @property
    def observed(self) -> int:
        return self.window

    def score(self, slots: Candidates) -> Tensor:
        assert slots.window is not None
        mass = mean_pool(slots.window / self.window, self.pool, slots.occupied)
        return torch.where(slots.last(self.window), 1.0, mass)

"""VATP: attention counts as much as the value that it brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from potexport.errors import PotexportError
from potexport.graphs.policies import Policy
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class Vatp(Policy):
    """s_t = the attention of the last `window` tokens to slot t, times |v_t|, the sum of absolute
    values; the window itself stays.

    Source: arXiv 2406.12335, section 3, in its form with a window (Scissorhands). Differs: averaged
    over the query heads of a group; the window is read once more over the pot.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"window", "values"})
    window: int = 32

    def __post_init__(self) -> None:
        if self.window < 1:
            raise PotexportError(f"--window is {self.window}; it must be at least 1")

    @property
    def observed(self) -> int:
        return self.window

    def look(self, layer: Candidates) -> tuple[Tensor, ...]:
        assert layer.values is not None
        return (layer.values.float().abs().sum(dim=-1),)

    def score(self, slots: Candidates) -> Tensor:
        assert slots.window is not None
        worth = slots.window / self.window * slots.seen[0]
        worth = torch.where(slots.occupied, worth, 0.0)
        share = worth / worth.amax(dim=-1, keepdim=True).clamp(min=1e-6)
        return torch.where(slots.last(self.window), 2.0, share)

"""TOVA: what the last token attends to, the same for all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from potexport.graphs.policies import Policy
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class Tova(Policy):
    """s_t = the attention of the last token to slot t, averaged over all heads of the layer.

    Source: arXiv 2401.06104, section 3.2. Differs: drops down to `keep` at once, and not one token
    a step.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"window"})

    @property
    def observed(self) -> int:
        return 1

    def score(self, slots: Candidates) -> Tensor:
        assert slots.window is not None
        rows, columns = slots.window.shape
        by_layer = slots.window.reshape(rows // slots.heads, slots.heads, columns)
        mean = by_layer.mean(dim=1, keepdim=True).expand(-1, slots.heads, -1)
        return torch.where(slots.last(1), 1.0, mean.reshape(rows, columns))

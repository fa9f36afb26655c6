"""KeyDiff: keys unlike the average key are worth keeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from potexport.graphs.policies import Policy
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Minus the cosine between a key and the mean direction of all occupied keys: no catalyst, no
    extra pass.

    Source: arXiv 2504.15364, section 3. Differs: the mean is over what the pot holds, in place of
    the whole context.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def score(self, slots: Candidates) -> Tensor:
        assert slots.keys is not None
        keys = slots.keys.float()  # (R, D, M)
        direction = keys / keys.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
        occupied = (slots.slot < slots.fill)[:, None]  # (M, 1)
        anchor = (
            torch.where(occupied[:, 0], direction, 0.0).sum(dim=-1, keepdim=True)
            / slots.fill.float()
        )  # (R, D, 1)
        anchor = anchor / anchor.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
        return -(direction * anchor).sum(dim=1)

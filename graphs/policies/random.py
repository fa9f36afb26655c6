"""Random slots: the floor that any rule has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from potexport.graphs.policies import Policy
from potexport.graphs.select import Candidates

WORD = 0xFFFFFFFF


def hashed(number: int) -> float:
    """A number in [0, 1) that looks random: the finalizer of MurmurHash3, of 32 bits."""
    number &= WORD
    number ^= number >> 16
    number = number * 0x85EBCA6B & WORD
    number ^= number >> 13
    number = number * 0xC2B2AE35 & WORD
    return ((number ^ number >> 16) & WORD) / (WORD + 1)


@dataclass(frozen=True)
class Random(Policy):
    """A hash of layer, head and slot: each head keeps other slots, the same ones in every runtime.

    Source: none; every table of policies has one. The hash does not change, so that one compression
    is as the other.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    seed: int = 0

    def score(self, slots: Candidates) -> Tensor:
        columns = slots.slot.shape[0]
        rows = [layer * slots.heads + head for layer in slots.layers for head in range(slots.heads)]
        table = [
            [hashed(hashed_row + slot) for slot in range(columns)]
            for hashed_row in (self.seed * 0x9E3779B1 + row * 0x10001 + 1 for row in rows)
        ]
        return torch.tensor(table, dtype=torch.float32)  # (R, M)

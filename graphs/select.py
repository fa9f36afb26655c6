"""Which slots stay: the part of a compression that is the same for every policy.

A policy gives scores; here they become, without any shape that varies at run time, an ascending
list of slots. All ties go to the lower slot, so that every runtime keeps the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORCED = 6e4  # above any score, and finite in fp16
FREE = -6e4  # below any score


@dataclass(frozen=True)
class Candidates:
    """What a policy may look at. R rows: the key/value heads of one layer, or of all layers at
    once.

    slot: (M,) int32, its own index. fill, keep: (1,) int32.
    forced: (M,) bool, sinks and recent slots, which stay whatever their score. open: (M,) bool,
        occupied and not forced.
    mass: (R, M) float32 >= 0; novelty: (R, M) float32, nats. Free slots hold 0 mass and arbitrary
        novelty.
    keys: (R, D, M), rotated at their slots' positions; values: (R, M, D). Free slots hold arbitrary
    rows. What the policy does not list in its `needs` is None.
    """

    slot: Tensor
    fill: Tensor
    keep: Tensor
    keep_max: int
    forced: Tensor
    open: Tensor
    mass: Tensor | None = None
    novelty: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


def top(scores: Tensor, count: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The best `count` of each row in order, ties to the lower index: values and int64 indices, (R,
    count).

    ONNX TopK promises that order; torch.topk does not, so the eager reference sorts.
    """
    if torch.compiler.is_exporting():
        return torch.topk(scores, count, dim=-1, largest=largest, sorted=True)
    values, index = torch.sort(scores, dim=-1, descending=largest, stable=True)
    return values[..., :count], index[..., :count]


def masks(slots: int, fill: Tensor, *, sink: int, recent: int) -> tuple[Tensor, Tensor, Tensor]:
    """slot (M,) int32, forced (M,) bool, open (M,) bool; `fill` (1,) int32."""
    slot = torch.arange(slots, dtype=torch.int32)
    occupied = slot < fill
    at_an_end = torch.logical_or(slot < sink, slot >= fill - recent)
    forced = torch.logical_and(occupied, at_an_end)
    return slot, forced, torch.logical_and(occupied, torch.logical_not(at_an_end))


def select(scores: Tensor, candidates: Candidates) -> Tensor:
    """(R, M) scores -> (R, K) int32: the slots to keep, ascending; entries from `keep` on are the
    last slot, unread."""
    slots = scores.shape[-1]
    scores = torch.where(candidates.open, scores, torch.where(candidates.forced, FORCED, FREE))
    _, best = top(scores, candidates.keep_max)  # best first
    rank = torch.arange(candidates.keep_max, dtype=torch.int32)
    # What ranks past `keep` gets an index behind every slot, so that the second sort moves it to
    # the end.
    marked = torch.where(rank < candidates.keep, best.to(torch.int32), slots + rank)
    ascending, _ = top(marked, candidates.keep_max, largest=False)
    return ascending.clamp(max=slots - 1)

"""Which slots stay: the part of a compression that is the same for every policy.

A policy gives scores; here they become, without any shape that varies at run time, an ascending
list of slots. All ties go to the lower slot, so that every runtime keeps the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potexport.graphs.rope import turn_back

FREE = -6e4  # below any score, and finite in fp16


@dataclass(frozen=True)
class Candidates:
    """What a policy may look at. R rows: the key/value heads of one layer, or of all layers at
    once.

    slot: (M,) int32, its own index. fill, keep: (1,) int32.
    forced: (M,) bool, sinks or pinned slots, whichever are more, and recent ones, which stay
        whatever their score; no more than `keep`. open: (M,) bool, occupied and not forced.
    heads: key/value heads of a layer. layers: which ones the rows belong to.
    mass, window, received: (R, M) float32 >= 0, the attention of the catalyst, of the last tokens
        read and of all tokens so far, summed over them; 0 in free slots.
    novelty: (R, M) float32, nats; arbitrary in free slots.
    keys: (R, D, M), rotated at `positions`; values: (R, M, D). Free slots hold arbitrary rows.
    positions: (R, M) int32, where each key stands. turn: (positions, D), of `turns.Turns`; None
        where keys do not turn.
    query_mean, query_cov: (Hq, D), (Hq, D, D), of un-rotated queries; position: (1,) int32, of the
        next token.
    seen: (R, M) each, what the policy's `look` made of keys and values. Those, positions, turn and
        what is known of queries are there for `look` alone, which is given one layer.
    What the policy does not list in its `needs` is None.
    """

    slot: Tensor
    fill: Tensor
    keep: Tensor
    keep_max: int
    forced: Tensor
    open: Tensor
    heads: int = 1
    layers: Sequence[int] = (0,)
    mass: Tensor | None = None
    window: Tensor | None = None
    received: Tensor | None = None
    novelty: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    positions: Tensor | None = None
    turn: Tensor | None = None
    query_mean: Tensor | None = None
    query_cov: Tensor | None = None
    position: Tensor | None = None
    seen: tuple[Tensor, ...] = ()

    @property
    def room(self) -> Tensor:
        """(1,) int32: how many of the open slots stay."""
        return self.keep - self.forced.to(torch.int32).sum(dim=0, keepdim=True, dtype=torch.int32)

    @property
    def occupied(self) -> Tensor:
        """(M,) bool."""
        return self.slot < self.fill

    @property
    def plain_keys(self) -> Tensor:
        """(R, M, D) float32: the keys as they were before rotation, slot by slot."""
        assert self.keys is not None
        assert self.positions is not None
        if self.turn is None:
            return self.keys.transpose(1, 2).float()
        heads, size, slots = self.keys.shape
        rows = self.keys.transpose(1, 2).reshape(heads * slots, size)
        by = self.turn.index_select(0, self.positions.reshape(-1))
        return turn_back(rows.float(), by).reshape(heads, slots, size)

    def last(self, count: int | Tensor) -> Tensor:
        """(M,) bool: the last `count` occupied slots."""
        return torch.logical_and(self.slot >= self.fill - count, self.slot < self.fill)


def best(scores: Tensor, among: Tensor, count: Tensor, most: int) -> Tensor:
    """The `count` best slots of each row among those allowed, ties to the lower slot: (R, M) bool.

    ONNX TopK breaks ties towards the lower index and the HTP's towards the higher, without a word;
    so only its values are used here: what lies above the last of them stays, and of what equals it
    the first few.

    Args:
        scores: (R, M). among: (M,) or (R, M) bool, at least `count` of them true in each row.
        count: (1,) int32, from 0 to `most`.
    """
    scores = torch.where(among, scores, FREE)
    ranked, _ = torch.topk(scores, most, dim=-1, sorted=True)
    last = ranked.index_select(1, (count - 1).clamp(min=0))  # (R, 1)
    above, level = scores > last, scores == last
    room = count - above.to(torch.int32).sum(dim=-1, keepdim=True, dtype=torch.int32)
    first = level.to(torch.int32).cumsum(dim=-1, dtype=torch.int32) <= room
    return torch.logical_or(above, torch.logical_and(level, first))


def masks(
    slots: int, fill: Tensor, pinned: Tensor, *, sink: int, recent: int
) -> tuple[Tensor, Tensor, Tensor]:
    """slot (M,) int32, forced (M,) bool, open (M,) bool; `fill`, `pinned` (1,) int32."""
    slot = torch.arange(slots, dtype=torch.int32)
    occupied = slot < fill
    first = torch.logical_or(slot < sink, slot < pinned)
    at_an_end = torch.logical_or(first, slot >= fill - recent)
    forced = torch.logical_and(occupied, at_an_end)
    return slot, forced, torch.logical_and(occupied, torch.logical_not(at_an_end))


def select(scores: Tensor, candidates: Candidates) -> Tensor:
    """(R, M) scores -> (R, K) int32: the slots to keep, ascending; entries from `keep` on are the
    last slot, unread."""
    slots = scores.shape[-1]
    chosen = best(scores, candidates.open, candidates.room, candidates.keep_max)
    chosen = torch.logical_or(chosen, candidates.forced)
    # What goes gets a number behind every slot; no two are equal, so no order is left open.
    marked = torch.where(chosen, candidates.slot, candidates.slot + slots)
    ascending, _ = torch.topk(marked, candidates.keep_max, dim=-1, largest=False, sorted=True)
    return ascending.clamp(max=slots - 1)

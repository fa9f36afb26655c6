"""The compression graph: score, select, gather, and turn the kept keys to their new positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from potexport.geometry import PotGeometry
from potexport.graphs.codes import Four, Stored, flat
from potexport.graphs.policies import Policy
from potexport.graphs.rope import turn_back, turn_forward
from potexport.graphs.select import Candidates, masks, select


@dataclass(frozen=True)
class Compressed:
    """The pot's first K slots after a compression; entries from `keep` on are never read.

    keys: L x (1, Hkv, D, K); values: L x (1, Hkv, K, D); kept: L x (Hkv, K) int32, by which the
        host moves whatever else it knows of a slot. coded: of a coded pot, whose keys and values
        are then only those in full precision, the rest; else empty.
    """

    keys: list[Tensor]
    values: list[Tensor]
    kept: list[Tensor]
    coded: list[Four]


@dataclass(frozen=True)
class Given:
    """What a compression is given, a tensor a layer where it is a list; see docs/graphs.md.

    past_seq_len, keep: (1,) or (L,) int32. reset: (1,) int32, 1 to move all kept slots to the
    front, 0 to leave them at their positions. position: (1,) int32, of the next token. stored: a
    coded pot, whose keys and values are then made when a layer's are asked for.
    """

    past_seq_len: Tensor
    keep: Tensor
    reset: Tensor
    positions: list[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    scores: dict[str, list[Tensor]]
    position: Tensor | None = None
    stored: Stored | None = None


class Compress(nn.Module):
    """One compression of a whole pot, every shape constant.

    Source: arXiv 2410.01518, section 3.4 (context reset); docs/graphs.md, "One compression".
    Differs: the reset may wait until positions run out.
    """

    def __init__(
        self,
        policy: Policy,
        geometry: PotGeometry,
        turn: Tensor,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """statistics: of un-rotated queries, for policies that need "queries": their means
        (L, Hq, D) and covariances (L, Hq, D, D)."""
        super().__init__()
        self.policy, self.geometry = policy, geometry
        self.turn = nn.Buffer(turn)  # (positions, D): by how many positions
        self.query_mean = nn.Buffer(statistics[0]) if statistics else None
        self.query_covariance = nn.Buffer(statistics[1]) if statistics else None

    def run(self, given: Given) -> Compressed:
        return self.gather(self.choose(given), given)

    def gather(self, kept: list[Tensor], given: Given) -> Compressed:
        """Move the kept slots, L x (Hkv, K) int32, to the front."""
        if given.stored is not None:
            return self._gather_codes(kept, given, given.stored)
        moved = [
            self._move(key[0], value[0], slots, positions, given.reset)
            for key, value, slots, positions in zip(
                given.keys, given.values, kept, given.positions, strict=True
            )
        ]
        return Compressed([key for key, _ in moved], [value for _, value in moved], kept, [])

    def _gather_codes(self, kept: list[Tensor], given: Given, stored: Stored) -> Compressed:
        """The same over a coded pot: only kept rows become floats, and codes again."""
        made = []
        for layer, slots in enumerate(kept):
            whole, own, plain, values = stored.rows(layer, slots)
            stood, back = _moves(slots, given.positions[layer], given.reset)
            turned = turn_forward(plain, self.turn.index_select(0, stood - back))
            keys = torch.where(whole, turn_back(own, self.turn.index_select(0, back)), turned)
            bare = turn_back(own, self.turn.index_select(0, stood))
            plain = torch.where(whole, bare, plain)
            made.append(stored.store(layer, keys, plain, values, self.geometry))
        return Compressed(
            [k for k, _, _ in made], [v for _, v, _ in made], kept, [c for *_, c in made]
        )

    def choose(self, given: Given) -> list[Tensor]:
        """Kept slots, L x (Hkv, K) int32; scored and selected for all layers at once,
        if they have as many slots."""
        layers, heads = len(given.keys), given.keys[0].shape[1]
        looks = [self.policy.look(self._of_layer(layer, given)) for layer in range(layers)]
        if self.geometry.shaped:
            return [
                self._choose(replace(self._scores(layer, given), seen=seen), heads)
                for layer, seen in enumerate(looks)
            ]
        scores: dict[str, Any] = {n: torch.cat(each) for n, each in given.scores.items()}
        seen = tuple(torch.cat(each) for each in zip(*looks, strict=True))
        base = replace(self._candidates(0, given), layers=range(layers), seen=seen, **scores)
        chosen = self._choose(base, layers * heads)
        # Slices, not split, which would be exported as a sequence.
        return [chosen[layer * heads : (layer + 1) * heads] for layer in range(layers)]

    def _candidates(self, layer: int, given: Given) -> Candidates:
        """What is known without looking into the pot."""
        shape, heads = self.geometry, given.keys[0].shape[1]
        each = slice(layer, layer + 1) if shape.shaped else slice(0, 1)
        fill, keep = given.past_seq_len[each], given.keep[each]
        slot, forced, free_to_go = masks(
            shape.slots_of(layer), fill, sink=shape.sink, recent=shape.recent
        )
        most = shape.keep_max_of(layer)
        return Candidates(
            slot, fill, keep, most, forced, free_to_go, heads, range(layer, layer + 1)
        )

    def _scores(self, layer: int, given: Given) -> Candidates:
        scores: dict[str, Any] = {name: each[layer] for name, each in given.scores.items()}
        return replace(self._candidates(layer, given), **scores)

    def _of_layer(self, layer: int, given: Given) -> Candidates:
        needs = self.policy.needs
        known: dict[str, Any] = {}
        if "keys" in needs:
            known["keys"] = given.keys[layer][0]
        if "values" in needs:
            known["values"] = given.values[layer][0]
        if self.query_mean is not None and self.query_covariance is not None:
            known |= {
                "query_mean": self.query_mean[layer],
                "query_cov": self.query_covariance[layer],
            }
            known["position"] = given.position
        return replace(
            self._candidates(layer, given),
            positions=given.positions[layer],
            turn=self.turn,
            **known,
        )

    def _choose(self, candidates: Candidates, rows: int) -> Tensor:
        """(rows, K) int32; a policy may answer once for all rows."""
        scores = self.policy.score(candidates)
        return select(scores.expand(rows, candidates.slot.shape[0]), candidates)

    def _move(
        self, key: Tensor, value: Tensor, kept: Tensor, positions: Tensor, reset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One layer: key (Hkv, D, M), value (Hkv, M, D), kept (Hkv, K), positions (Hkv, M) ->
        (1, Hkv, D, K), (1, Hkv, K, D)."""
        heads, size, slots = key.shape
        width = kept.shape[1]
        row = flat(kept, slots)
        rows = key.transpose(1, 2).reshape(heads * slots, size).index_select(0, row)  # (Hkv*K, D)
        _, back = _moves(kept, positions, reset)
        turned = turn_back(rows.float(), self.turn.index_select(0, back))
        new_key = turned.to(key.dtype).reshape(heads, width, size).transpose(1, 2)
        new_value = (
            value.reshape(heads * slots, size).index_select(0, row).reshape(heads, width, size)
        )
        return new_key[None], new_value[None]


def _moves(kept: Tensor, positions: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
    """Where kept slots (Hkv, K) stand, and by how much they move back: (Hkv*K,) each."""
    heads, width = kept.shape
    stood = positions.reshape(-1).index_select(0, flat(kept, positions.shape[1]))
    back = reset * (stood - torch.arange(width, dtype=torch.int32).repeat(heads))
    return stood, back.clamp(min=0)  # entries past `keep` may point anywhere

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
from potexport.graphs.rope import reversed_turn, turn_back, turn_columns_forward, turn_forward
from potexport.graphs.select import Candidates, masks, select
from potexport.graphs.turns import Turns


@dataclass(frozen=True)
class Compressed:
    """The pot's first K slots after a compression; entries from `keep` on are never read.

    Of each layer that was chosen in: keys (1, Hkv, D, K); values (1, Hkv, K, D); kept (Hkv, K)
    int32, by which the host moves whatever else it knows of a slot. coded: of a coded pot, whose
    keys and values are then only those in full precision, the rest; else empty. last: of each
    layer with a window all keys, turned back.
    """

    keys: list[Tensor]
    values: list[Tensor]
    kept: list[Tensor]
    coded: list[Four]
    last: list[Tensor]


@dataclass(frozen=True)
class Given:
    """What a compression is given, a tensor for each layer that is chosen in where it is a list;
    see docs/graphs.md.

    past_seq_len, keep: (1,) or (L,) int32. pinned: (1,) int32, how many first slots of every layer
    stay in any case. reset: (1,) int32, 1 to move all kept slots to the front, 0 to leave them at
    their positions. position: (1,) int32, of the next token. stored: a
    coded pot, whose keys and values are then made when a layer's are asked for. last: of each layer
    with a window its keys; back: (1,) int32, by how many positions these move back.
    """

    past_seq_len: Tensor
    keep: Tensor
    pinned: Tensor
    reset: Tensor
    positions: list[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    scores: dict[str, list[Tensor]]
    position: Tensor | None = None
    stored: Stored | None = None
    last: Sequence[Tensor] = ()
    back: Tensor | None = None


class Compress(nn.Module):
    """One compression of a whole pot, every shape constant.

    Source: arXiv 2410.01518, section 3.4 (context reset); docs/graphs.md, "One compression".
    Differs: the reset may wait until positions run out.
    """

    def __init__(
        self,
        policy: Policy,
        geometry: PotGeometry,
        turns: Turns,
        statistics: tuple[Tensor, Tensor] | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        """statistics: of un-rotated queries, for policies that need "queries": their means
        (L, Hq, D) and covariances (L, Hq, D, D). in_place: the pot's keys and values are
        (1, Hkv, S, D), as in `Layout`, and so are those that leave, (1, Hkv, K, D)."""
        super().__init__()
        self.in_place = in_place
        self.policy, self.geometry, self.turns = policy, geometry, turns
        count = len(turns.layers)
        self.chosen, self.windowed = geometry.chosen(count), geometry.windowed(count)
        self.query_mean = nn.Buffer(statistics[0]) if statistics else None
        self.query_covariance = nn.Buffer(statistics[1]) if statistics else None

    def run(self, given: Given) -> Compressed:
        return self.gather(self.choose(given), given)

    def gather(self, kept: list[Tensor], given: Given) -> Compressed:
        """Move the kept slots, of each chosen layer (Hkv, K) int32, to the front."""
        if given.stored is not None:
            return self._gather_codes(kept, given, given.stored)
        moved = [
            self._move(layer, _bare(key), _bare(value), slots, positions, given.reset)
            for layer, key, value, slots, positions in zip(
                self.chosen, given.keys, given.values, kept, given.positions, strict=True
            )
        ]
        last = [
            self._move_window(layer, key, given.back)
            for layer, key in zip(self.windowed, given.last, strict=True)
        ]
        return Compressed([key for key, _ in moved], [value for _, value in moved], kept, [], last)

    def _gather_codes(self, kept: list[Tensor], given: Given, stored: Stored) -> Compressed:
        """The same over a coded pot: only kept rows become floats, and codes again."""
        made = []
        for layer, slots in enumerate(kept):
            table = self.turns.of(layer)
            assert table is not None  # of a coded pot's model all layers turn alike
            whole, own, plain, values = stored.rows(layer, slots)
            stood, back = _moves(slots, given.positions[layer], given.reset)
            turned = turn_forward(plain, table.index_select(0, stood - back))
            keys = torch.where(whole, turn_back(own, table.index_select(0, back)), turned)
            bare = turn_back(own, table.index_select(0, stood))
            plain = torch.where(whole, bare, plain)
            made.append(stored.store(layer, keys, plain, values, self.geometry))
        return Compressed(
            [k for k, _, _ in made], [v for _, v, _ in made], kept, [c for *_, c in made], []
        )

    def choose(self, given: Given) -> list[Tensor]:
        """Kept slots, of each chosen layer (Hkv, K) int32; scored and selected for all of them at
        once, if they have as many slots."""
        heads = given.keys[0].shape[1]
        looks = [self._look(n, given) for n in range(len(self.chosen))]
        if self.geometry.shaped:
            return [
                self._choose(replace(self._scores(n, given), seen=seen), heads)
                for n, seen in enumerate(looks)
            ]
        scores: dict[str, Any] = {n: torch.cat(each) for n, each in given.scores.items()}
        seen = tuple(torch.cat(each) for each in zip(*looks, strict=True))
        base = replace(self._candidates(0, given), layers=self.chosen, seen=seen, **scores)
        chosen = self._choose(base, len(self.chosen) * heads)
        # Slices, not split, which would be exported as a sequence.
        return [chosen[n * heads : (n + 1) * heads] for n in range(len(self.chosen))]

    def _look(self, number: int, given: Given) -> tuple[Tensor, ...]:
        """What the policy sees in a layer, (Hkv, M) each. Rows behind the slots of a pot that is
        written in place are looked at too: to cut them off before would copy all others."""
        slots = self.geometry.slots_of(self.chosen[number])
        seen = self.policy.look(self._of_layer(number, given))
        return tuple(each[:, :slots] for each in seen) if self.in_place else seen

    def _candidates(self, number: int, given: Given, spare: int = 0) -> Candidates:
        """What is known of a chosen layer without looking into its pot. spare: rows behind its
        slots."""
        shape, heads, layer = self.geometry, given.keys[0].shape[1], self.chosen[number]
        each = slice(0, 1) if shape.uniform else slice(layer, layer + 1)
        fill, keep = given.past_seq_len[each], given.keep[each]
        rows = shape.slots_of(layer) + spare
        slot, forced, free_to_go = masks(
            rows, fill, given.pinned, sink=shape.sink, recent=shape.recent
        )
        most = shape.keep_max_of(layer)
        return Candidates(slot, fill, keep, most, forced, free_to_go, heads, (layer,))

    def _scores(self, number: int, given: Given) -> Candidates:
        scores: dict[str, Any] = {name: each[number] for name, each in given.scores.items()}
        return replace(self._candidates(number, given), **scores)

    def _of_layer(self, number: int, given: Given) -> Candidates:
        needs, layer = self.policy.needs, self.chosen[number]
        known: dict[str, Any] = {}
        if "keys" in needs:
            keys = _bare(given.keys[number])
            known["keys"] = keys.transpose(1, 2) if self.in_place else keys
        if "values" in needs:
            known["values"] = _bare(given.values[number])
        if self.query_mean is not None and self.query_covariance is not None:
            known |= {
                "query_mean": self.query_mean[layer],
                "query_cov": self.query_covariance[layer],
            }
            known["position"] = given.position
        positions, spare = given.positions[number], self.geometry.spare if self.in_place else 0
        if spare:
            none = torch.zeros(positions.shape[0], spare, dtype=positions.dtype)
            positions = torch.cat([positions, none], dim=1)
        return replace(
            self._candidates(number, given, spare),
            positions=positions,
            turn=self.turns.of(layer),
            **known,
        )

    def _choose(self, candidates: Candidates, rows: int) -> Tensor:
        """(rows, K) int32; a policy may answer once for all rows."""
        scores = self.policy.score(candidates)
        return select(scores.expand(rows, candidates.slot.shape[0]), candidates)

    def _move(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        kept: Tensor,
        positions: Tensor,
        reset: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """key (Hkv, D, M), value (Hkv, M, D), kept (Hkv, K), positions (Hkv, M) ->
        (1, Hkv, D, K), (1, Hkv, K, D); of a pot that is written in place keys are as values."""
        by_token = key if self.in_place else key.transpose(1, 2)
        heads, slots, size = by_token.shape
        width = kept.shape[1]
        row = flat(kept, slots)
        rows = by_token.reshape(heads * slots, size).index_select(0, row)  # (Hkv*K, D)
        table = self.turns.of(layer)
        if table is not None:
            _, back = _moves(kept, positions, reset)
            rows = turn_back(rows.float(), table.index_select(0, back)).to(key.dtype)
        new_key = rows.reshape(heads, width, size)
        if not self.in_place:
            new_key = new_key.transpose(1, 2)
        new_value = (
            value.reshape(heads * slots, size).index_select(0, row).reshape(heads, width, size)
        )
        return new_key[None], new_value[None]

    def _move_window(self, layer: int, key: Tensor, back: Tensor | None) -> Tensor:
        """All keys of a layer with a window, (1, Hkv, D, M), as many positions further back."""
        table = self.turns.of(layer)
        if table is None or back is None:
            return key.clone()
        by = reversed_turn(table.index_select(0, back))
        return turn_columns_forward(key[0].float(), by[None]).to(key.dtype)[None]


def _bare(tensor: Tensor) -> Tensor:
    """Without its first dimension, which is 1; x[0] would be exported as a copy."""
    return tensor.reshape(tensor.shape[1:])


def _moves(kept: Tensor, positions: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
    """Where kept slots (Hkv, K) stand, and by how much they move back: (Hkv*K,) each."""
    heads, width = kept.shape
    stood = positions.reshape(-1).index_select(0, flat(kept, positions.shape[1]))
    back = reset * (stood - torch.arange(width, dtype=torch.int32).repeat(heads))
    return stood, back.clamp(min=0)  # entries past `keep` may point anywhere

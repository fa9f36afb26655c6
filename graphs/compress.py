"""The compression graph: score, select, gather, and turn the kept keys to their new positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from potexport.graphs.policies import Policy
from potexport.graphs.rope import turn_back
from potexport.graphs.select import Candidates, masks, select
from potexport.spec import PotGeometry


@dataclass(frozen=True)
class Compressed:
    """The pot's first K slots after a compression; entries from `keep` on are never read.

    keys: L x (1, Hkv, D, K); values: L x (1, Hkv, K, D); novelty: L x (Hkv, K) or empty; kept: L x
        (Hkv, K) int32.
    """

    keys: list[Tensor]
    values: list[Tensor]
    novelty: list[Tensor]
    kept: list[Tensor]


class Compress(nn.Module):
    """One compression of a whole pot, every shape constant.

    Source: arXiv 2410.01518, section 3.4 (context reset); docs/graphs.md, "One compression".
    """

    def __init__(self, policy: Policy, geometry: PotGeometry, turn: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.policy, self.geometry = policy, geometry
        self.cos, self.sin = (
            nn.Buffer(turn[0]),
            nn.Buffer(turn[1]),
        )  # (M, D/2): by how many positions

    def run(
        self,
        past_seq_len: Tensor,
        keep: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        mass: list[Tensor] | None = None,
        novelty: list[Tensor] | None = None,
    ) -> Compressed:
        """past_seq_len, keep: (1,) int32; keys, values, mass, novelty: a tensor a layer, as in
        docs/graphs.md."""
        kept = self.choose(past_seq_len, keep, keys, values, mass, novelty)
        return self.gather(kept, keys, values, novelty)

    def gather(
        self,
        kept: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
        novelty: list[Tensor] | None,
    ) -> Compressed:
        """Move the kept slots, L x (Hkv, K) int32, to the front."""
        moved = [
            self._move(key[0], value[0], slots)
            for key, value, slots in zip(keys, values, kept, strict=True)
        ]
        carried = (
            []
            if novelty is None
            else [n.gather(1, k.long()) for n, k in zip(novelty, kept, strict=True)]
        )
        return Compressed([key for key, _ in moved], [value for _, value in moved], carried, kept)

    def choose(
        self,
        fill: Tensor,
        keep: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        mass: list[Tensor] | None,
        novelty: list[Tensor] | None,
    ) -> list[Tensor]:
        """Kept slots of every layer, L x (Hkv, K) int32. A policy that looks at no key is asked
        once for all layers."""
        shape = self.geometry
        slot, forced, free_to_go = masks(shape.slots, fill, sink=shape.sink, recent=shape.recent)
        base = Candidates(slot, fill, keep, shape.keep_max, forced, free_to_go)
        layers, heads = len(keys), keys[0].shape[1]
        if not self.policy.needs & {"keys", "values"}:
            everything = replace(base, mass=_stack(mass), novelty=_stack(novelty))
            chosen = self._choose(everything, layers * heads)
            # Slices, not split, which would be exported as a sequence.
            return [chosen[layer * heads : (layer + 1) * heads] for layer in range(layers)]
        one_by_one = [
            replace(
                base,
                mass=None if mass is None else mass[layer],
                novelty=None if novelty is None else novelty[layer],
                keys=keys[layer][0],
                values=values[layer][0],
            )
            for layer in range(layers)
        ]
        return [self._choose(candidates, heads) for candidates in one_by_one]

    def _choose(self, candidates: Candidates, rows: int) -> Tensor:
        """(rows, K) int32; a policy may answer once for all rows."""
        scores = self.policy.score(candidates)
        return select(scores.expand(rows, self.geometry.slots), candidates)

    def _move(self, key: Tensor, value: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """One layer: key (Hkv, D, M), value (Hkv, M, D), kept (Hkv, K) -> (1, Hkv, D, K), (1, Hkv,
        K, D)."""
        heads, size, slots = key.shape
        width = kept.shape[1]
        # All heads as one long list of rows: a plain Gather on axis 0, which every NPU compiler
        # gets right.
        row = (kept + slots * torch.arange(heads, dtype=torch.int32)[:, None]).reshape(
            -1
        )  # (Hkv*K,)
        rows = key.transpose(1, 2).reshape(heads * slots, size).index_select(0, row)  # (Hkv*K, D)
        back = (kept - torch.arange(width, dtype=torch.int32)).reshape(-1)  # positions to go back
        back = back.clamp(min=0)  # entries past `keep` may point anywhere
        turned = turn_back(
            rows.float(), self.cos.index_select(0, back), self.sin.index_select(0, back)
        )
        new_key = turned.to(key.dtype).reshape(heads, width, size).transpose(1, 2)
        new_value = (
            value.reshape(heads * slots, size).index_select(0, row).reshape(heads, width, size)
        )
        return new_key[None], new_value[None]


def _stack(tensors: list[Tensor] | None) -> Tensor | None:
    """L x (Hkv, M) -> (L*Hkv, M)."""
    return None if tensors is None else torch.cat(tensors)

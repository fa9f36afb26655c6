"""The pot: the key/value cache of fixed size, and what is known of each of its slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from potexport.spec import CARRIED, SCORES, Layout

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Contents:
    """A copy of what a pot holds: of its arrays the filled part, as `Pot.views` names them."""

    fills: Array
    position: int
    arrays: Mapping[str, Array]
    pinned: int = 0


class Pot:
    """Arrays that live as long as the session; only numbers in them change.

    keys: L x (1, Hkv, D, M); values: L x (1, Hkv, M, D); in the bundle's float type. M may differ
        from layer to layer.
    chosen: the layers that are compressed. The others, windowed, hold the last tokens alone.
    positions: of each chosen layer (Hkv, M) int32, where the rotary embedding put each key.
    scores: name -> of each chosen layer (Hkv, M) float32, for those of `spec.SCORES` that a policy
        needs.
    sizes, fills: (1,) or (L,) int32, how many slots there are, and how many of them hold a token,
        the same in every head.
    position: of the next token.
    pinned: how many of the first slots every compression keeps, whatever their scores; they stay
        the first. Some may not be filled as yet.
    """

    def __init__(self, layout: Layout) -> None:
        specs = layout.past()
        self.keys = [np.zeros(spec.shape, spec.dtype) for spec in specs[0::2]]
        self.values = [np.zeros(spec.shape, spec.dtype) for spec in specs[1::2]]
        per_slot = layout.per_slot("{}")
        self.positions = [np.zeros(spec.shape, np.int32) for spec in per_slot]
        self.scores = {
            name: [np.zeros(spec.shape, spec.dtype) for spec in per_slot]
            for name in SCORES
            if name in layout.gathered
        }
        self.chosen, self.windowed = layout.chosen, layout.windowed
        self.slots = layout.pot.slots
        self._window_kept = {layer: layout.pot.window_kept(layer) for layer in self.windowed}
        self.held: dict[str, Array] = {}  # of a coded pot: more that its graphs read, by name
        slots = [layout.pot.slots_of(layer) for layer in range(layout.counts)]
        self.sizes = np.array(slots, np.int32)
        self.fills = np.zeros(layout.counts, np.int32)
        self.position = 0
        self.pinned = 0

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays())

    @property
    def novelty(self) -> list[Array]:
        return self.scores.get("novelty", [])

    @property
    def mass(self) -> list[Array]:
        return self.scores.get("mass", [])

    @property
    def fill(self) -> int:
        """Slots that hold a token, in the chosen layer with the most."""
        return max(self.counts_of(self.fills))

    @fill.setter
    def fill(self, count: int) -> None:
        """Say that so many slots of each layer, where it has them, hold tokens that stand one
        behind the other."""
        self.fills[:] = np.minimum(count, self.sizes)
        self.position = count
        for positions in self.positions:
            positions[:] = np.arange(positions.shape[-1])

    @property
    def room(self) -> int:
        """How many more tokens every chosen layer can take."""
        return min(self.counts_of(self.sizes - self.fills))

    def counts_of(self, counts: Array) -> list[int]:
        """Of each chosen layer, from one number for all layers, or one for each."""
        return [self._of(counts, layer) for layer in self.chosen]

    def filled(self, layer: int) -> int:
        return self._of(self.fills, layer)

    @staticmethod
    def _of(counts: Array, layer: int) -> int:
        """A layer's, of one number for all layers, or one for each."""
        return int(counts[layer if counts.size > 1 else 0])

    def append(
        self, keys: list[Array], values: list[Array], novelty: Array | float, count: int
    ) -> None:
        """Put the first `count` new rows behind the filled slots.

        keys: L x (1, Hkv, D, T); values: L x (1, Hkv, T, D); novelty: (count,) float32, or one
            number, in nats.
        """
        if count > self.room:
            raise ValueError(f"{count} rows do not fit behind {self.fills} of {self.sizes} slots")
        for layer in self.windowed:
            self._drop_oldest(layer, count)
        for number, layer in enumerate(self.chosen):
            first, last = self.filled(layer), self.filled(layer) + count
            self.positions[number][:, first:last] = self.position + np.arange(count)
            if self.novelty:
                self.novelty[number][:, first:last] = novelty
        for layer in range(len(self.keys)):
            self.append_rows(layer, keys[layer], values[layer], count)
        self.fills += count
        self.position += count

    def receive(self, mass: list[Array], new_mass: list[Array], count: int) -> None:
        """Add the attention of the last `count` tokens, which were not appended yet: to filled
        slots, and to themselves.

        mass: of each chosen layer (Hkv, M); new_mass: (Hkv, T).
        """
        for number, received in enumerate(self.scores["received"]):
            first = self.filled(self.chosen[number])
            received[:, :first] += mass[number][:, :first]
            received[:, first : first + count] = new_mass[number][:, :count]

    def replace(
        self,
        keys: list[Array],
        values: list[Array],
        kept: list[Array],
        counts: Array,
        *,
        reset: bool,
        coded: Sequence[tuple[Array, ...]] = (),
        last: Sequence[Array] = (),
    ) -> None:
        """Make the first rows, `counts` (1,) or (L,) of the (1, Hkv, D, K) and so on of each chosen
        layer, the whole of it; what else is known of a slot follows `kept`, (Hkv, K) of each.

        reset: they now stand at 0, 1, 2, …; otherwise where they stood. coded: of a coded pot,
            whose keys and values are only a part, the rest. last: of each layer with a window its
            keys (1, Hkv, D, M), as far before the next token as they were.
        """
        sizes = self.counts_of(counts)
        for number, (layer, count) in enumerate(zip(self.chosen, sizes, strict=True)):
            self.replace_rows(
                layer, keys[number], values[number], count, coded[number] if coded else ()
            )
        self._follow(kept, counts, reset=reset)
        if reset:
            for layer, turned in zip(self.windowed, last, strict=True):
                self.keys[layer][..., : self.filled(layer)] = turned[..., : self.filled(layer)]

    def _follow(self, kept: list[Array], counts: Array, *, reset: bool) -> None:
        """Let what else is known of a slot follow it, once keys and values are where they go."""
        sizes = self.counts_of(counts)
        for number, count in enumerate(sizes):
            slots = kept[number][:, :count]
            for per_slot in (self.positions[number], *self._carried(number)):
                per_slot[:, :count] = np.take_along_axis(per_slot, slots, axis=1)
            if reset:
                self.positions[number][:, :count] = np.arange(count)
        self.fills[:] = counts
        if reset:
            self.position = max(sizes)

    def _drop_oldest(self, layer: int, count: int) -> None:
        """Let a layer with a window forget what no query will see, if `count` more do not fit."""
        fill, keep = self.filled(layer), self._window_kept[layer]
        if fill + count > self.sizes[layer]:
            old = slice(fill - keep, fill)
            self.keys[layer][..., :keep] = self.keys[layer][..., old].copy()
            self.values[layer][:, :, :keep] = self.values[layer][:, :, old].copy()
            self.fills[layer] = keep

    def append_rows(self, layer: int, keys: Array, values: Array, count: int) -> None:
        """Put the first `count` of keys (1, Hkv, D, T) and values behind a layer's slots."""
        first, last = self.filled(layer), self.filled(layer) + count
        self.keys[layer][..., first:last] = keys[..., :count]
        self.values[layer][:, :, first:last] = values[:, :, :count]

    def replace_rows(
        self, layer: int, keys: Array, values: Array, count: int, coded: tuple[Array, ...]
    ) -> None:
        """Make the first `count` of keys (1, Hkv, D, K) and values the first of a layer."""
        self.keys[layer][..., :count] = keys[..., :count]
        self.values[layer][:, :, :count] = values[:, :, :count]

    def output(self, array: Array, name: str) -> Array:
        """An output of a graph, as `append` and `replace` take it."""
        return array

    def ready(self) -> None:
        """Called before graphs read the pot."""

    def _carried(self, number: int) -> list[Array]:
        return [self.scores[name][number] for name in CARRIED if name in self.scores]

    def save(self) -> Contents:
        """A copy of all that is filled."""
        copies = {name: view.copy() for name, view in self.views(self.fills).items()}
        return Contents(self.fills.copy(), self.position, copies, self.pinned)

    def load(self, contents: Contents) -> None:
        """Hold again what was saved."""
        self.fills[:] = contents.fills
        self.position, self.pinned = contents.position, contents.pinned
        for name, view in self.views(self.fills).items():
            view[...] = contents.arrays[name]

    def views(self, fills: Array) -> dict[str, Array]:
        """The part of every array that is filled where so many slots are, by the contract's
        names."""
        views: dict[str, Array] = {}
        for layer in range(len(self.keys)):
            views |= self._rows_of(layer, fills)
        for number, layer in enumerate(self.chosen):
            rest = {"positions": self.positions} | self.scores
            fill = self._of(fills, layer)
            views |= {f"{name}.{layer}": each[number][:, :fill] for name, each in rest.items()}
        return views

    def _rows_of(self, layer: int, fills: Array) -> dict[str, Array]:
        """The filled part of keys and values."""
        fill, name = self._of(fills, layer), f"past_key_values.{layer}"
        return {
            f"{name}.key": self.keys[layer][..., :fill],
            f"{name}.value": self.values[layer][:, :, :fill],
        }

    def _arrays(self) -> list[Array]:
        scores = [array for each in self.scores.values() for array in each]
        return [*self.keys, *self.values, *self.positions, *scores]

"""The pot: the key/value cache of fixed size, and what is known of each of its slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from potexport.spec import CARRIED, SCORES, Layout

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Contents:
    """A copy of what a pot holds: filled slots alone. See `Pot`."""

    fills: Array
    position: int
    arrays: tuple[Array, ...]


class Pot:
    """Arrays that live as long as the session; only numbers in them change.

    keys: L x (1, Hkv, D, M); values: L x (1, Hkv, M, D); in the bundle's float type. M may differ
        from layer to layer.
    positions: L x (Hkv, M) int32, where the rotary embedding put each key.
    scores: name -> L x (Hkv, M) float32, for those of `spec.SCORES` that a policy needs.
    fills: (1,) or (L,) int32, how many slots hold a token, the same in every head.
    position: of the next token.
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
        self.slots = layout.pot.slots
        self.held: dict[str, Array] = {}  # of a coded pot: more that its graphs read, by name
        self._sizes = np.array([key.shape[-1] for key in self.keys][: layout.counts], np.int32)
        self.fills = np.zeros(layout.counts, np.int32)
        self.position = 0

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
        """Slots that hold a token, in the layer with the most."""
        return int(self.fills.max())

    @fill.setter
    def fill(self, count: int) -> None:
        """Say that so many slots of each layer, where it has them, hold tokens that stand one
        behind the other."""
        self.fills[:] = np.minimum(count, self._sizes)
        self.position = count
        for positions in self.positions:
            positions[:] = np.arange(positions.shape[-1])

    @property
    def room(self) -> int:
        """How many more tokens every layer can take."""
        return int((self._sizes - self.fills).min())

    def filled(self, layer: int) -> int:
        return int(self.fills[layer if self.fills.size > 1 else 0])

    def append(
        self, keys: list[Array], values: list[Array], novelty: Array | float, count: int
    ) -> None:
        """Put the first `count` new rows behind the filled slots.

        keys: L x (1, Hkv, D, T); values: L x (1, Hkv, T, D); novelty: (count,) float32, or one
            number, in nats.
        """
        if count > self.room:
            raise ValueError(f"{count} rows do not fit behind {self.fills} of {self._sizes} slots")
        for layer in range(len(self.keys)):
            first, last = self.filled(layer), self.filled(layer) + count
            self.positions[layer][:, first:last] = self.position + np.arange(count)
            self.append_rows(layer, keys[layer], values[layer], count)
            if self.novelty:
                self.novelty[layer][:, first:last] = novelty
        self.fills += count
        self.position += count

    def receive(self, mass: list[Array], new_mass: list[Array], count: int) -> None:
        """Add the attention of the last `count` tokens, which were not appended yet: to filled
        slots, and to themselves.

        mass: L x (Hkv, M); new_mass: L x (Hkv, T).
        """
        for layer, received in enumerate(self.scores["received"]):
            first = self.filled(layer)
            received[:, :first] += mass[layer][:, :first]
            received[:, first : first + count] = new_mass[layer][:, :count]

    def replace(
        self,
        keys: list[Array],
        values: list[Array],
        kept: list[Array],
        counts: Array,
        *,
        reset: bool,
        coded: Sequence[tuple[Array, ...]] = (),
    ) -> None:
        """Make the first rows, `counts` (1,) or (L,) of L x (1, Hkv, D, K) and so on, the whole of
        the pot; what else is known of a slot follows `kept`, L x (Hkv, K).

        reset: they now stand at 0, 1, 2, …; otherwise where they stood. coded: of a coded pot,
            whose keys and values are only a part, the rest.
        """
        for layer in range(len(self.keys)):
            count = int(counts[layer if counts.size > 1 else 0])
            slots = kept[layer][:, :count]
            self.replace_rows(
                layer, keys[layer], values[layer], count, coded[layer] if coded else ()
            )
            for per_slot in (self.positions[layer], *self._carried(layer)):
                per_slot[:, :count] = np.take_along_axis(per_slot, slots, axis=1)
            if reset:
                self.positions[layer][:, :count] = np.arange(count)
        self.fills[:] = counts
        if reset:
            self.position = self.fill

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

    def ready(self) -> None:
        """Called before graphs read the pot."""

    def _carried(self, layer: int) -> list[Array]:
        return [self.scores[name][layer] for name in CARRIED if name in self.scores]

    def save(self) -> Contents:
        """A copy of all that is filled."""
        fills = self.fills.copy()
        return Contents(fills, self.position, tuple(view.copy() for view in self._views()))

    def load(self, contents: Contents) -> None:
        """Hold again what was saved."""
        self.fills[:] = contents.fills
        self.position = contents.position
        for view, saved in zip(self._views(), contents.arrays, strict=True):
            view[...] = saved

    def _views(self) -> list[Array]:
        """The filled part of every array."""
        views = []
        for layer in range(len(self.keys)):
            fill = self.filled(layer)
            views += self._rows_of(layer)
            rest = (self.positions[layer], *(each[layer] for each in self.scores.values()))
            views += [array[:, :fill] for array in rest]
        return views

    def _rows_of(self, layer: int) -> list[Array]:
        """The filled part of keys and values."""
        fill = self.filled(layer)
        return [self.keys[layer][..., :fill], self.values[layer][:, :, :fill]]

    def _arrays(self) -> list[Array]:
        scores = [array for each in self.scores.values() for array in each]
        return [*self.keys, *self.values, *self.positions, *scores]

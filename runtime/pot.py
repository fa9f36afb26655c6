"""The pot: the key/value cache of fixed size, and what is known of each of its slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from potexport.spec import Layout

Array = npt.NDArray[Any]


class Pot:
    """Arrays that live as long as the session; only numbers in them change.

    keys: L x (1, Hkv, D, M); values: L x (1, Hkv, M, D); in the bundle's float type.
    novelty, mass: L x (Hkv, M) float32, empty where the policy does not need them.
    fill: how many slots hold a token, the same in every layer and head.
    """

    def __init__(self, layout: Layout) -> None:
        specs = layout.past()
        self.keys = [np.zeros(spec.shape, spec.dtype) for spec in specs[0::2]]
        self.values = [np.zeros(spec.shape, spec.dtype) for spec in specs[1::2]]
        per_slot = layout.per_slot("{}", layout.pot.slots)
        self.novelty = (
            [np.zeros(s.shape, s.dtype) for s in per_slot] if "novelty" in layout.needs else []
        )
        self.mass = [np.zeros(s.shape, s.dtype) for s in per_slot] if "mass" in layout.needs else []
        self.slots = layout.pot.slots
        self.fill = 0

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values, *self.novelty, *self.mass))

    def append(
        self, keys: list[Array], values: list[Array], novelty: Array | float, count: int
    ) -> None:
        """Put the first `count` new rows behind the filled slots.

        keys: L x (1, Hkv, D, T); values: L x (1, Hkv, T, D); novelty: (count,) float32, or one
            number, in nats.
        """
        first, last = self.fill, self.fill + count
        if last > self.slots:
            raise ValueError(f"{count} rows do not fit behind {self.fill} of {self.slots} slots")
        for past, new in zip(self.keys, keys, strict=True):
            past[..., first:last] = new[..., :count]
        for past, new in zip(self.values, values, strict=True):
            past[:, :, first:last] = new[:, :, :count]
        for per_slot in self.novelty:
            per_slot[:, first:last] = novelty
        self.fill = last

    def replace(
        self, keys: list[Array], values: list[Array], novelty: list[Array], count: int
    ) -> None:
        """Make the first `count` rows, of L x (1, Hkv, D, K) and so on, the whole of the pot."""
        for past, kept in zip(self.keys, keys, strict=True):
            past[..., :count] = kept[..., :count]
        for past, kept in zip(self.values, values, strict=True):
            past[:, :, :count] = kept[:, :, :count]
        for past, kept in zip(self.novelty, novelty, strict=True):
            past[:, :count] = kept[:, :count]
        self.fill = count

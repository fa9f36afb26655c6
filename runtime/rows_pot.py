"""A pot that the model graphs write into, token by token."""

from __future__ import annotations

import numpy as np

from potexport.runtime.pot import Array, Pot
from potexport.spec import ITEM_BYTES, Layout


class RowsPot(Pot):
    """keys, values: views of what is in `held`, so that they are as in any pot; `Layout.in_place`
    says how the memory behind them lies."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        past = layout.past()
        sizes = [spec.bytes // ITEM_BYTES[spec.dtype] for spec in past]
        # One piece of memory: of several MB, numpy asks for large pages (a decode step: 4% faster).
        whole = np.split(np.zeros(sum(sizes), past[0].dtype), np.cumsum(sizes)[:-1])
        self.held = {spec.name: x.reshape(spec.shape) for spec, x in zip(past, whole, strict=True)}
        rows = [each[:, :, : self.slots] for each in self.held.values()]
        self.keys = [self.output(array, ".key") for array in rows[0::2]]
        self.values = rows[1::2]

    @property
    def bytes(self) -> int:
        spare = sum(array.nbytes for array in self.held.values())
        return super().bytes + spare - sum(each.nbytes for each in (*self.keys, *self.values))

    def output(self, array: Array, name: str) -> Array:
        return array.transpose(0, 1, 3, 2) if name.endswith(".key") else array

    def keep(self, kept: list[Array], counts: Array) -> None:
        """Move kept slots, (Hkv, K) of each layer, to the front; they keep their positions."""
        count = int(counts[0])
        for layer, slots in enumerate(kept):
            for part in ("key", "value"):
                for head, rows in enumerate(self.held[f"past_key_values.{layer}.{part}"][0]):
                    rows[:count] = rows[slots[head, :count]]
        self._follow(kept, counts, reset=False)

    def append_rows(self, layer: int, keys: Array, values: Array, count: int) -> None:
        """The graph did."""

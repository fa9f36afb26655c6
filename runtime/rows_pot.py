"""A pot that the model graphs write into, token by token."""

from __future__ import annotations

import numpy as np

from potexport.runtime.pot import Array, Pot
from potexport.spec import Layout


class RowsPot(Pot):
    """keys, values: views of what is in `held`, so that they are as in any pot; `Layout.in_place`
    says how the memory behind them lies."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        past = layout.past()
        self.held = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in past}
        rows = [each[:, :, : self.slots] for each in self.held.values()]
        self.keys = [self.output(array, ".key") for array in rows[0::2]]
        self.values = rows[1::2]

    @property
    def bytes(self) -> int:
        spare = sum(array.nbytes for array in self.held.values())
        return super().bytes + spare - sum(each.nbytes for each in (*self.keys, *self.values))

    def output(self, array: Array, name: str) -> Array:
        return array.transpose(0, 1, 3, 2) if name.endswith(".key") else array

    def append_rows(self, layer: int, keys: Array, values: Array, count: int) -> None:
        """The graph did."""

"""How a pot is kept in fewer bytes: which of its slots are codes, and how many bytes each takes.

Standard library only, as `spec`, which makes tensors of it.

A coded pot of M slots has F columns in full precision, for the sinks and the newest tokens, and
M - F columns of codes, its body. Slots keep their order: sinks, then the body, then the newest.
Letters: M slots, F float columns, B = M - F columns of the body, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Names on the command line and in the manifest -> the type of the pot's rows in full precision.
FLOATS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16"}
BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
POT_DTYPES = (*FLOATS, *BITS)
# The newest tokens become codes so many at a time: a copy of the rest costs little then, and at
# least `recent` of them are never codes.
STEP = 16


@dataclass(frozen=True)
class Coding:
    """bits: of a code. sink: first slots, recent: last slots, that are never codes."""

    bits: int
    sink: int
    recent: int

    @property
    def floats(self) -> int:
        """Columns in full precision."""
        return self.sink + self.recent + STEP

    @property
    def largest(self) -> int:
        """Codes go from its negative to it."""
        return int(2 ** (self.bits - 1)) - 1

    def packed(self, size: int) -> int:
        """Bytes of a row of `size` codes."""
        return size * self.bits // 8

    def coded(self, fill: int, slots: int) -> int:
        """How many slots are codes, of `fill` in a pot of `slots`: as few as can be, in steps."""
        beyond = max(fill - self.floats, 0)
        return min(-(-beyond // STEP) * STEP, slots - self.floats)

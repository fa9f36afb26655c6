"""Which tokens each head still holds, from the slots that compressions kept.

A token that a head has dropped never comes back. So one number tells its whole life: which
compression dropped it.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
NEVER = 0  # compressions are counted from 1


@dataclass(frozen=True)
class Lives:
    """What became of every token in every head.

    gone: (H, N) int32, the compression that dropped the token, from 1; NEVER if it is held to the
        end. Heads are those of the first layer, then of the second, and so on.
    heads: L, key/value heads of each layer. read: C, tokens that were read at each compression.
    """

    gone: Array
    heads: tuple[int, ...]
    read: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return int(self.gone.shape[1])

    @property
    def steps(self) -> int:
        """States of the text: before any compression, after each, and at the end."""
        return len(self.read) + 2

    def seen(self, step: int) -> int:
        """How many tokens were read at a step."""
        whole = (self.read[0] if self.read else self.tokens, *self.read, self.tokens)
        return whole[step]

    def held(self, step: int) -> Array:
        """(H, N) bool: which tokens each head holds at a step; none that was not read yet."""
        found: Array = (self.gone == NEVER) | (self.gone > step)
        found[:, self.seen(step) :] = False
        return found

    def counts(self, step: int) -> Array:
        """(N,) how many heads hold each token at a step."""
        return np.asarray(self.held(step).sum(0))


class Ledger:
    """Follows the tokens of one text through compressions that move slots."""

    def __init__(self, heads: Sequence[int], tokens: int) -> None:
        """heads: key/value heads of each layer. tokens: of the whole text."""
        self._gone = [np.full((n, tokens), NEVER, np.int32) for n in heads]
        self._held = [np.empty((n, 0), np.int32) for n in heads]  # token of each slot
        self._read: list[int] = []

    def compress(self, kept: Sequence[Array], read: int) -> None:
        """Take down a compression.

        kept: L x (Hkv, keep) int32, the slots that stay, numbered as they were before it; layers
            may keep different numbers. read: tokens that the pot had taken until then.
        """
        fresh = np.arange(self._read[-1] if self._read else 0, read, dtype=np.int32)
        self._read.append(read)
        for layer, (slots, gone) in enumerate(zip(kept, self._gone, strict=True)):
            news = np.broadcast_to(fresh, (len(gone), fresh.size))
            before = np.concatenate([self._held[layer], news], axis=1)
            after = np.take_along_axis(before, np.asarray(slots), axis=1)
            np.put_along_axis(gone, before, len(self._read), axis=1)
            np.put_along_axis(gone, after, NEVER, axis=1)
            self._held[layer] = after

    def lives(self) -> Lives:
        heads = tuple(len(gone) for gone in self._gone)
        return Lives(np.concatenate(self._gone), heads, tuple(self._read))


def width(gone: Array) -> int:
    """Bytes that one entry needs."""
    return 1 if gone.max(initial=NEVER) < 256 else 2


def packed(gone: Array) -> str:
    """`gone` as base64 of zlib's deflate, token by token, of entries of `width` bytes, the lower
    byte first.

    Token by token, for neighbours meet the same fate more often than heads do.
    """
    data = np.ascontiguousarray(gone.T, f"<u{width(gone)}").tobytes()
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")

"""What a session asks of the thing that runs the graphs."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from potexport.bundle import PolicyFacts
from potexport.geometry import PotGeometry
from potexport.runtime.pot import Pot

Array = npt.NDArray[Any]


class Backend(Protocol):
    """Runs the graphs of one bundle over one pot. Ids are int32; n is the number of real tokens."""

    pot: Pot
    policy: PolicyFacts  # whose compression graph is used; of those that were opened

    def prefill(self, ids: Array, next_ids: Array, first_novelty: float) -> float:
        """Append the rows of `ids` (n,) to the pot, n <= T.

        next_ids: (n,), the tokens that come after each. first_novelty: of ids[0], in nats; the
        others' comes out of this pass. Returns the novelty of next_ids[-1], 0 where the policy
        needs none.
        """

    def decode(self, token: int, novelty: float) -> Array:
        """Append one token; (V,) float32 logits of the next one, valid until the next call."""

    def observe(self, ids: Array, *, back: int = 0, into: str = "mass") -> None:
        """Fill the pot's scores `into` with the attention of ids (n,), n <= P, which take no slot.

        back: they are the last so many tokens of the pot, read again: they see what lies before.
        """

    def compress(self, keep: int, *, reset: bool = True) -> list[Array]:
        """Keep the best slots and those that are pinned, `keep` on average over the layers; of each
        layer that is chosen in (Hkv, keep of the layer) int32, the slots they were in, valid until
        the next call.

        reset: move them to the positions 0, 1, 2, …; otherwise they stay where they stand.
        """

    def fork(self) -> Backend:
        """The same graphs over an empty pot of its own."""


def kept_counts(pot: Pot, geometry: PotGeometry, keep: int) -> Array:
    """(1,) or (L,) int32: how many slots each layer keeps; all that it has, if fewer, or if it has
    a window."""
    if geometry.uniform:
        return np.array([keep], np.int32)
    layers = range(pot.fills.size)
    keeps = [pot.fills[n] if geometry.window_of(n) else keep + geometry.more(n) for n in layers]
    return np.minimum(keeps, pot.fills).astype(np.int32)


def moved_back(pot: Pot, counts: Array, *, reset: bool) -> int:
    """By how many positions a compression moves the next token, and so the keys of layers with a
    window, which are relative to it."""
    return pot.position - max(pot.counts_of(counts)) if reset else 0


def padded(buffer: Array, ids: Array) -> None:
    """Write ids into the beginning of a graph's input (1, width) and zero the rest."""
    buffer[0, : ids.size] = ids
    buffer[0, ids.size :] = 0

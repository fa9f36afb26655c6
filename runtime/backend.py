"""What a session asks of the thing that runs the graphs."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

from potexport.runtime.pot import Pot

Array = npt.NDArray[Any]


class Backend(Protocol):
    """Runs the graphs of one bundle over one pot. Ids are int32; n is the number of real tokens."""

    pot: Pot

    def prefill(self, ids: Array, next_ids: Array, first_novelty: float) -> float:
        """Append the rows of `ids` (n,) to the pot, n <= T.

        next_ids: (n,), the tokens that come after each. first_novelty: of ids[0], in nats; the
        others' comes out of this pass. Returns the novelty of next_ids[-1], 0 where the policy
        needs none.
        """

    def decode(self, token: int, novelty: float) -> Array:
        """Append one token; (V,) float32 logits of the next one, valid until the next call."""

    def observe(self, ids: Array) -> None:
        """Fill the pot's `mass` with the attention of a catalyst, ids (n,), n <= P, which takes no
        slot."""

    def compress(self, keep: int) -> list[Array]:
        """Keep the best `keep` slots; L x (Hkv, keep) int32, the slots they were in, valid until
        the next call."""


def padded(buffer: Array, ids: Array) -> None:
    """Write ids into the beginning of a graph's input (1, width) and zero the rest."""
    buffer[0, : ids.size] = ids
    buffer[0, ids.size :] = 0

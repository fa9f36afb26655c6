"""Token ids, as a caller or a file gives them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from potexport.errors import PotexportError

Ids = npt.NDArray[np.int32]


def token_ids(given: Sequence[int] | Ids, vocab_size: int) -> Ids:
    """As (n,) int32; PotexportError for what is none, or is not in the vocabulary."""
    ids = np.asarray(given)
    if ids.size == 0:
        return np.empty(0, np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise PotexportError(
            f"token ids must be a flat list of whole numbers; found {ids.dtype} of {ids.ndim} "
            "dimensions"
        )
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise PotexportError(
            f"token id {outside[0]} is outside the vocabulary of {vocab_size}; use this bundle's "
            "own tokenizer"
        )
    return ids.astype(np.int32)

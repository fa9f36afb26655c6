"""What queries look like before rotation, for policies that expect the attention still to come.

Mean and covariance of each query head over a calibration text, read as the loop reads it. They go
into the compression graph as constants, and beside the graphs into a file, so that `verify` can ask
PyTorch the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potexport.bundle import PolicyFacts
from potexport.errors import PotexportError
from potexport.graphs.model import PotModel
from potexport.graphs.rope import turn_back
from potexport.reference import TorchBackend
from potexport.runtime.backend import Array
from potexport.spec import Layout

FILE = "statistics.safetensors"
MOST = 2048  # tokens of the text
SINKS = 4  # first tokens, whose queries are unlike all others


def measure(core: PotModel, layout: Layout, ids: Array) -> tuple[Tensor, Tensor]:
    """Means (L, Hq, D) and covariances (L, Hq, D, D) float32 of un-rotated queries over ids (n,).

    The text is cut into pieces that fit an empty pot.
    Raises PotexportError for a text with fewer tokens than a head has dimensions, twice.
    """
    facts = layout.facts
    least = 2 * facts.head_size + SINKS
    if ids.size < least:
        raise PotexportError(
            f"the calibration text has {ids.size} tokens; statistics of queries need {least}: "
            "give a longer --calibration"
        )
    shape = (facts.layers, facts.query_heads, facts.head_size)
    total = torch.zeros(shape, dtype=torch.float64)
    squares = torch.zeros(*shape, facts.head_size, dtype=torch.float64)
    count = 0
    for queries in _queries(core, layout, ids[:MOST]):  # (L, Hq, n, D)
        total += queries.sum(dim=2)
        squares += queries.transpose(2, 3) @ queries
        count += queries.shape[2]
    mean = total / count
    covariance = squares / count - mean[..., :, None] * mean[..., None, :]
    return mean.float(), covariance.float()


def _queries(core: PotModel, layout: Layout, ids: Array) -> list[Tensor]:
    """Of each pass (L, Hq, n, D) float64, before rotation."""
    from potexport.graphs.policies.streaming import Streaming  # any: nothing is compressed

    pot, made = layout.pot, []
    facts = PolicyFacts("streaming", "streaming", (), {})
    backend = TorchBackend(core, [(facts, Streaming())], Layout(layout.facts, pot, frozenset()))
    for first in range(0, ids.size, pot.chunk):
        chunk = ids[first : first + pot.chunk]
        if chunk.size > backend.pot.room:
            backend.pot.fill = 0
        start = backend.pot.position
        out = backend.run_pass(chunk, pot.chunk, want_queries=True)
        backend.pot.append(
            [key.numpy() for key in out.keys], [v.numpy() for v in out.values], 0.0, chunk.size
        )
        skip = max(0, SINKS - start)
        where = slice(start + skip, start + chunk.size)
        made.append(
            torch.stack(
                [
                    _plain(query[0, :, skip : chunk.size].float(), core.turns.of(layer), where)
                    for layer, query in enumerate(out.queries)
                ]
            )
        )
    return made


def _plain(queries: Tensor, table: Tensor | None, where: slice) -> Tensor:
    """Of one layer (Hq, n, D) float64, before rotation."""
    if table is None:
        return queries.double()
    heads, width, size = queries.shape
    plain = turn_back(queries.reshape(-1, size), table[where].repeat(heads, 1))
    return plain.reshape(heads, width, size).double()


def write(folder: Path, found: tuple[Tensor, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({"mean": found[0], "covariance": found[1]}, folder / FILE)


def read(folder: Path) -> tuple[Tensor, Tensor]:
    from safetensors.torch import load_file

    stored = load_file(folder / FILE)
    return stored["mean"], stored["covariance"]


def tokens(text: str, tokenizer: Any) -> Array:
    """What `measure` reads of a text: (n,) int32."""
    ids = tokenizer.encode(text[: 20 * MOST], add_special_tokens=False)
    return np.array(ids[:MOST], np.int32)

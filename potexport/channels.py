"""What the channels of keys look like, for a coded pot: a centre and a spread for each.

Some channels of keys are far larger than others, the same ones for every token (arXiv 2402.02750,
section 3.2; arXiv 2401.18079, section 3.1), so each is centred and spread by numbers of its own
before a key is coded. They are measured once, before rotation, on a text, and need not be exact: a
key's own scale takes what they miss.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potexport.bundle import KEY_FILES
from potexport.errors import PotexportError
from potexport.graphs.model import PotModel
from potexport.graphs.rope import turn_back
from potexport.runtime.backend import Array
from potexport.spec import Layout

MOST = 512  # tokens of the text
SINKS = 4  # first tokens, whose keys are unlike all others, and are never coded
LEAST = 1e-3  # of a head's spread: the least that a channel's counts as
TEXT = """The ferry left at seven in the morning with 43 people, two bicycles and a crate of hens.
Nobody had slept much. "If the wind turns," said the pilot, "we shall be late; if it does not, we
shall be early, and that is worse." He was right: at 9:15 the harbour was shut, the café was dark,
and the only thing awake was a dog that had learnt to wait. We asked it the way. A woman came down
the hill with bread, looked at our tickets, and laughed. They were for Thursday.

def mean(values):
    total = sum(values)
    return total / len(values)  # fails for an empty list

Notes for the meeting: 1. The budget grew by 12.5%, mostly for heating. 2. Dr. Okafor will speak on
glaciers, rivers and what lies between. 3. Please bring the keys back to room B-204 before Friday,
for the cleaners need them. The results are on page 17; question 6 was answered by everyone, and
wrongly. What does a careful reader remember of a long letter? Names, a number or two, whatever was
said twice, and the one sentence that did not fit. The rest is weather.
"""


def check(core: PotModel, layout: Layout) -> None:
    """Raise PotexportError for a model whose pot cannot be coded."""
    if not core.turns.alike:
        raise PotexportError(
            f"--pot-dtype {layout.pot_dtype} takes models whose layers all turn their keys alike; "
            f"those of {layout.facts.model_type} differ: omit it"
        )


def measure(core: PotModel, layout: Layout, ids: Array) -> Array:
    """(L, 2, Hkv, D) float32: the centre and the spread of each channel of the keys of
    ids (n,)."""
    made: Array = spread_of(plain_keys(core, layout, ids[:MOST])).numpy()
    return made


def plain_keys(core: PotModel, layout: Layout, ids: Array) -> Tensor:
    """(L, Hkv, n, D) float32, before rotation, of ids that are cut into pieces of a chunk, each
    without its first tokens."""
    facts, width = layout.facts, layout.pot.chunk
    plain = replace(layout, pot_dtype="", dtype="float32")
    empty = [torch.zeros(spec.shape, dtype=core.model.dtype) for spec in plain.past()]
    zero = torch.zeros(1, dtype=torch.int32)
    skip = min(SINKS, width - 1)
    made = []
    for first in range(0, ids.size, width):
        chunk = torch.from_numpy(ids[None, first : first + width])
        with torch.no_grad():
            out = core.run(chunk, zero.expand(layout.counts), zero, empty[0::2], empty[1::2])
        rows = torch.cat(out.keys).float().transpose(2, 3)[:, :, skip:]  # (L, Hkv, n, D)
        heads = facts.layers * facts.kv_heads
        by = core.turn[skip : chunk.shape[1]].repeat(heads, 1)
        turned = turn_back(rows.reshape(-1, facts.head_size), by)
        made.append(turned.reshape(rows.shape))
    return torch.cat(made, dim=2)


def spread_of(keys: Tensor) -> Tensor:
    """(L, 2, Hkv, D) float32: mean and standard deviation of keys (L, Hkv, n, D)."""
    centre, spread = keys.mean(dim=2), keys.std(dim=2, correction=0)
    floor = LEAST * spread.mean(dim=-1, keepdim=True) + 1e-6
    return torch.stack([centre, torch.maximum(spread, floor)], dim=1)


def tokens(text: str, tokenizer: Any) -> Array:
    ids = tokenizer.encode(text[: 20 * MOST], add_special_tokens=False)
    return np.array(ids[:MOST], np.int32)


def write(folder: Path, found: Array, turn: Tensor) -> None:
    """KEY_FILES: the channels, and cos and sin of each position (2, positions, D/2), by which a
    host codes keys."""
    tables = torch.stack(turn.chunk(2, dim=-1)).numpy()
    for name, array in zip(KEY_FILES, (found, tables), strict=True):
        np.save(folder / name, array, allow_pickle=False)

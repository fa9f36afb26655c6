"""Selection and policies against plain Python, for any scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potexport.graphs.policies.infinipot import InfiniPot
from potexport.graphs.select import Candidates, masks, select

SLOTS, KEEP_MAX, ROWS = 24, 18, 3
# Few different values, so that ties are the rule.
scores = st.lists(
    st.lists(st.integers(0, 6), min_size=SLOTS, max_size=SLOTS), min_size=ROWS, max_size=ROWS
)


def candidates(
    fill: int, keep: int, sink: int, recent: int, pinned: int = 0, **known: Any
) -> Candidates:
    count = torch.tensor([fill], dtype=torch.int32)
    kept, pin = (torch.tensor([n], dtype=torch.int32) for n in (keep, pinned))
    slot, forced, free_to_go = masks(SLOTS, count, pin, sink=sink, recent=recent)
    return Candidates(slot, count, kept, KEEP_MAX, forced, free_to_go, **known)


@settings(deadline=None, max_examples=200)
@given(
    scores,
    st.integers(KEEP_MAX, SLOTS),
    st.integers(7, KEEP_MAX),
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(0, 7),
)
def test_select_keeps_forced_then_best_in_order(
    values: list[list[int]], fill: int, keep: int, sink: int, recent: int, pinned: int
) -> None:
    pinned = min(pinned, keep - recent)
    chosen = select(torch.tensor(values).float(), candidates(fill, keep, sink, recent, pinned))
    assert chosen.shape == (ROWS, KEEP_MAX)
    assert chosen.dtype == torch.int32
    for row, got in zip(values, chosen.tolist(), strict=True):
        forced = set(range(max(sink, pinned))) | set(range(fill - recent, fill))
        ranked = sorted(set(range(fill)) - forced, key=lambda slot: (-row[slot], slot))
        wanted = sorted(forced | set(ranked[: keep - len(forced)]))
        assert got[:keep] == wanted
        assert all(0 <= slot < SLOTS for slot in got)


@settings(deadline=None, max_examples=200)
@given(
    scores,
    scores,
    st.integers(KEEP_MAX, SLOTS),
    st.integers(7, KEEP_MAX),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([1, 3, 5]),
)
def test_infinipot_takes_novelty_first_then_pooled_mass(
    mass: list[list[int]],
    novelty: list[list[int]],
    fill: int,
    keep: int,
    alpha: float,
    pool: int,
) -> None:
    sink, recent = 2, 3
    seen = torch.tensor(mass).float()
    seen[:, fill:] = 0  # free slots get no attention
    surprise = torch.tensor(novelty).float()
    known = candidates(fill, keep, sink, recent, mass=seen, novelty=surprise)
    chosen = select(InfiniPot(alpha=alpha, pool=pool).score(known), known)
    half = pool // 2
    for row, novel_row, got in zip(seen.tolist(), novelty, chosen.tolist(), strict=True):
        forced = set(range(sink)) | set(range(fill - recent, fill))
        free = [slot for slot in range(fill) if slot not in forced]
        pooled = [max(row[max(0, s - half) : s + half + 1]) for s in range(fill)]
        by_novelty = sorted(free, key=lambda slot: (-novel_row[slot], slot))
        novel = by_novelty[: int(np.floor(alpha * keep + 0.5))]
        rest = sorted(set(free) - set(novel), key=lambda slot: (-pooled[slot], slot))
        order = [*sorted(forced), *novel, *rest]
        assert got[:keep] == sorted(order[:keep])

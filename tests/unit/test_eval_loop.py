"""Which tokens a pot holds, and how many of the important ones, against plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from potexport.evaluation.loop import Origins, latest
from potexport.evaluation.retrieval import hit_rate

LAYERS, HEADS = 2, 3


@settings(deadline=None)
@given(st.data())
def test_tokens_are_followed_through_any_compressions(data: st.DataObject) -> None:
    """Beside every head's own list of tokens."""
    origins, read = Origins(), 0
    plain: list[list[list[int]]] = [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
    for _ in range(data.draw(st.integers(0, 4))):
        more = data.draw(st.integers(1, 6))
        for heads in plain:
            for head in heads:
                head += range(read, read + more)
        read += more
        slots = []
        for layer, heads in enumerate(plain):
            fill = len(heads[0])
            keep = data.draw(st.integers(1, fill))
            chosen = [sorted(data.draw(st.permutations(range(fill)))[:keep]) for _ in range(HEADS)]
            slots.append(np.array(chosen, np.int32))
            plain[layer] = [
                [head[slot] for slot in own] for head, own in zip(heads, chosen, strict=True)
            ]
        origins.follow(slots, read)
    more = data.draw(st.integers(0, 3))
    found = origins.held(read + more, layers=LAYERS, heads=HEADS)
    for layer, heads in enumerate(plain):
        assert found[layer].tolist() == [[*head, *range(read, read + more)] for head in heads]


@given(st.data())
def test_the_share_of_important_tokens_that_are_held(data: st.DataObject) -> None:
    tokens, count = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 12))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    paid = [random.permuted(np.tile(np.arange(tokens), (HEADS, 1)), axis=1) for _ in range(LAYERS)]
    size = data.draw(st.integers(1, tokens))
    held = [
        np.stack([random.choice(tokens, size, replace=False) for _ in range(HEADS)])
        for _ in range(LAYERS)
    ]
    found = hit_rate(held, [each.astype(np.float32) for each in paid], count)
    for layer in range(LAYERS):
        shares = []
        for head in range(HEADS):
            attention = paid[layer][head].tolist()
            ranked = sorted(range(tokens), key=attention.__getitem__, reverse=True)
            best = set(ranked[: min(count, tokens)])
            shares.append(len(best & set(held[layer][head].tolist())) / len(best))
        assert abs(found[layer] - np.mean(shares)) < 1e-12


def test_truncation_keeps_the_head_and_the_end() -> None:
    head, body = np.arange(3, dtype=np.int32), np.arange(10, 20, dtype=np.int32)
    assert latest(head, body, 5).tolist() == [0, 1, 2, 18, 19]
    assert latest(head, body, 3).tolist() == [0, 1, 2]
    assert latest(head, body, 99).tolist() == [0, 1, 2, *range(10, 20)]

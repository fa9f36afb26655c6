"""The oracle's rules against numbers worked out by hand."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.reference_policies import (
    Choice,
    blend,
    choose,
    gap,
    infinipot,
    keydiff,
    knorm,
    max_pool,
    mean_pool,
    streaming,
)


def seen(n: int, **known: Any) -> Any:
    """What is known of `n` entries of one head; what no rule asks for is missing."""
    return SimpleNamespace(**{"fill": n, "keys": torch.zeros(1, n, 2), **known})


def by_infinipot(
    mass: list[float],
    novelty: list[float],
    *,
    keep: int,
    sink: int,
    recent: int,
    alpha: float,
    pool: int,
) -> Choice:
    known = seen(len(mass), mass=torch.tensor([mass]), novelty=torch.tensor([novelty]))
    tiers = infinipot(known, keep, alpha=alpha, pool=pool)
    rows = [(tier.scores[0].tolist(), tier.most, tier.pooled) for tier in tiers]
    return choose(rows, keep=keep, sink=sink, recent=recent)


def test_infinipot_by_hand() -> None:
    #        slot:  0    1    2    3    4    5    6    7    8    9
    novelty = [9.0, 1.0, 5.0, 2.0, 5.0, 0.5, 3.0, 0.1, 0.2, 8.0]
    mass = [0.9, 0.1, 0.0, 0.2, 0.1, 0.3, 0.1, 0.6, 0.0, 0.7]
    choose = partial(by_infinipot, mass, novelty, sink=1, recent=1, alpha=0.5)
    # Forced 0, 9. floor(2.5 + 0.5) = 3 most novel of the rest: 2, 4, 6. 5 in all.
    choice = choose(keep=5, pool=1)
    assert choice.kept == [0, 2, 4, 6, 9]
    assert choice.margin == pytest.approx(1 / 3)  # novelty 3 in, 2 out
    # keep 6: the same 3 novel ones, then the best mass of 1, 3, 5, 7, 8: slot 7.
    choice = choose(keep=6, pool=1)
    assert choice.kept == [0, 2, 4, 6, 7, 9]
    assert choice.margin == pytest.approx(1 / 3)  # mass 0.6 in, 0.3 out is wider
    # Pooled by 3: 0.9 0.9 0.2 0.2 0.3 0.3 0.6 0.6 0.7 0.7: now 1, from its neighbour the sink.
    # keep 7: floor(4) = 4 novel: 2, 4, 6, 3. Left 1, 5, 7, 8 with 0.9, 0.3, 0.6, 0.7.
    choice = choose(keep=7, pool=3)
    assert choice.kept == [0, 1, 2, 3, 4, 6, 9]
    assert choice.margin == pytest.approx(0.2 / 0.9)  # mass 0.9 in, 0.7 out


def test_infinipot_ties_and_edges_by_hand() -> None:
    choose = partial(by_infinipot, sink=0, recent=0, pool=1)
    ties = choose([0.5] * 6, [1.0] * 6, keep=4, alpha=0.5)
    assert ties.kept == [0, 1, 2, 3]
    assert ties.margin == 0.0
    # More novel slots wanted than there is room for beside the forced ones: the most novel first.
    full = by_infinipot(
        [0.0] * 6, [0.0, 3.0, 9.0, 4.0, 8.0, 0.0], keep=4, sink=1, recent=1, alpha=1.0, pool=1
    )
    assert full.kept == [0, 2, 4, 5]
    assert full.margin == pytest.approx(0.5)  # 8 in, 4 out
    by_mass = choose([3.0, 1.0, 2.0], [9.0, 9.0, 9.0], keep=2, alpha=0.0)
    assert by_mass.kept == [0, 2]
    assert choose([1.0] * 3, [1.0] * 3, keep=3, alpha=0.5).kept == [0, 1, 2]


def test_pooling_and_gaps_by_hand() -> None:
    values = torch.tensor([[1.0, 5.0, 2.0, 0.0, 3.0]])
    assert max_pool(values, 1).equal(values)
    assert max_pool(values, 3).tolist() == [[5.0, 5.0, 5.0, 3.0, 3.0]]
    assert max_pool(values, 13).tolist() == [[5.0] * 5]
    assert mean_pool(values, 3).tolist() == [pytest.approx([3, 8 / 3, 7 / 3, 5 / 3, 1.5])]
    assert gap([4.0, 1.0, 2.0, 8.0], 2) == 0.5
    assert gap([4.0, 1.0], 2) == gap([4.0, 1.0], 0) == math.inf
    assert gap([4.0, 4.0, 3.0, 5.0], 2) == 0.0
    assert gap([4.0, 4.0, 3.0, 5.0], 2, plateaus=True) == pytest.approx(0.2)
    assert gap([0.0, 0.0], 1) == 0.0


def test_choosing_by_hand() -> None:
    (newest,) = streaming(seen(9), 5)
    row = (newest.scores[0].tolist(), newest.most, False)
    assert choose([row], keep=5, sink=2, recent=1).kept == [0, 1, 6, 7, 8]
    best = choose([([0.0, -1.0, 7.0, 7.0, 7.0, 2.0], 4, False)], keep=4, sink=1, recent=1)
    assert best.kept == [0, 2, 3, 5]
    assert best.margin == 0.0
    # One of the first tier, of the second what is left of the room; an empty tier is skipped.
    tiers = [
        ([1.0, 3.0, 2.0, 0.0], 1, False),
        ([1.0] * 4, 0, False),
        ([5.0, 0.0, 0.0, 7.0], 9, False),
    ]
    assert choose(tiers, keep=2, sink=0, recent=0).kept == [1, 3]


def test_scores_by_hand() -> None:
    keys = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [0.0, 1.0]]])  # mean of unit keys: (1, 2) / 3
    expected = -torch.tensor([[1.0, 2.0, 2.0]]) / math.sqrt(5)
    (tier,) = keydiff(seen(3, keys=keys), 2, pool=1, rotated=False)
    torch.testing.assert_close(tier.scores, expected, atol=6e-4, rtol=0)  # to 1/1024
    (tier,) = keydiff(seen(3, turned=keys), 2, pool=1, rotated=True)
    torch.testing.assert_close(tier.scores, expected, atol=6e-4, rtol=0)  # to 1/1024
    (tier,) = knorm(seen(3, keys=keys), 2)
    assert tier.scores.tolist() == [[-2.0, -5.0, -1.0]]
    # Of two terms of opposite order the heavier one decides; one that is constant counts nothing.
    known = seen(3, keys=keys, novelty=torch.tensor([[1.0, 5.0, 2.0]]), sink=0, recent=0)
    known.mass = torch.zeros(1, 3)
    (tier,) = blend(known, 2, mix="knorm + 3*sirllm + 9*catalyst(pool=1)")
    # knorm: mean -8/3, deviation sqrt(26)/3; novelty: mean 8/3, the same deviation.
    wanted = [(2 - 3 * 5) / 26**0.5, (-7 + 3 * 7) / 26**0.5, (5 - 3 * 2) / 26**0.5]
    assert tier.scores.tolist() == [pytest.approx(wanted)]

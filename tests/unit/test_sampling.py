"""Sampling against a plain implementation that sorts everything and loops."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from potexport.errors import PotexportError
from potexport.runtime.sampling import Sampler, Sampling, surprise

# Few distinct values, so that ties at every border are the rule; -inf forbids a token.
LOGITS = st.lists(
    st.sampled_from([-math.inf, -3.0, -1.0, 0.0, 0.5, 0.75, 2.0]), min_size=1, max_size=12
).filter(lambda row: max(row) > -math.inf)


def row(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def plain_distribution(values: Sequence[float], sampling: Sampling) -> dict[int, float]:
    """The probability of each token that may be drawn: the definition, word for word."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    peak = values[order[0]]
    weights = {i: math.exp((values[i] - peak) / sampling.temperature) for i in order}
    total = math.fsum(weights.values())
    kept: dict[int, float] = {}
    for i in order:
        kept[i] = weights[i] / total
        if math.fsum(kept.values()) >= sampling.top_p:
            break
    share = math.fsum(kept.values())
    return {i: p / share for i, p in kept.items() if p > 0.0}


def drawn(values: Sequence[float], sampling: Sampling, times: int) -> Counter[int]:
    sampler = Sampler(sampling)
    return Counter(sampler.pick(row(values)) for _ in range(times))


@given(LOGITS)
def test_greedy_takes_the_lowest_of_the_highest(values: list[float]) -> None:
    assert Sampler(Sampling()).pick(row(values)) == values.index(max(values))


@settings(max_examples=40, deadline=None)
@given(
    LOGITS,
    st.sampled_from([0.5, 1.0, 2.5]),
    st.integers(0, 14),
    # Odd shares, so that no sum of probabilities lands on one and rounding could decide.
    st.sampled_from([0.0137, 0.3391, 0.6173, 0.9127, 1.0]),
)
def test_draws_follow_the_plain_distribution(
    values: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=7)
    expected = plain_distribution(values, sampling)
    counts = drawn(values, sampling, 400)
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        # Six standard deviations, and room for the long tail of rare tokens.
        bound = 6 * math.sqrt(400 * probability * (1 - probability)) + 4
        assert abs(counts[token] - 400 * probability) <= bound


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(temperature=1.0, seed=1), {0, 1, 2, 3}),
        (Sampling(temperature=1.0, top_k=2, seed=1), {1, 3}),
        (Sampling(temperature=1.0, top_k=3, seed=1), {0, 1, 3}),  # 0 and 2 tie; 0 is lower
        (Sampling(temperature=1.0, top_p=0.5, seed=1), {1}),
        (Sampling(temperature=1.0, top_p=0.70, seed=1), {1, 3}),
        (Sampling(temperature=1.0, top_k=2, top_p=0.6, seed=1), {1}),  # 0.625 once 0 and 2 are out
        (Sampling(temperature=1.0, top_p=1e-9, seed=1), {1}),
        (Sampling(temperature=1e-300, seed=1), {1}),
    ],
)
def test_the_support_is_exactly_the_allowed_set(sampling: Sampling, support: set[int]) -> None:
    values = [math.log(p) for p in (0.1, 0.5, 0.1, 0.3)] + [-math.inf]
    assert set(drawn(values, sampling, 2_000)) == support


def test_a_large_vocabulary_keeps_the_same_tokens_as_the_plain_one() -> None:
    values = np.random.default_rng(3).normal(scale=3, size=49_152).astype(np.float32)
    for sampling in (
        Sampling(temperature=0.8, top_p=0.9137, seed=5),
        Sampling(temperature=0.8, top_k=40, seed=5),
        Sampling(temperature=0.8, top_k=1000, top_p=0.5131, seed=5),
    ):
        # fsum over a growing list is quadratic; here the same definition in numpy, fully sorted.
        order = np.argsort(-values, kind="stable")[: sampling.top_k or None]
        shares = np.exp(values[order].astype(np.float64) / 0.8)
        reached = np.cumsum(shares / shares.sum())
        allowed = order[: int(np.sum(reached < sampling.top_p)) + 1]
        sampler = Sampler(sampling)
        picks = {sampler.pick(values) for _ in range(100)}
        assert picks <= set(allowed.tolist())
        assert len(picks) > 10  # not one corner of the set


def test_the_same_seed_gives_the_same_tokens() -> None:
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)

    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=seed))
        return [sampler.pick(values) for _ in range(30)]

    assert tokens(11) == tokens(11)
    assert tokens(11) != tokens(12)
    assert tokens(None) != tokens(None)


@dataclass
class Always:
    """A generator with one answer."""

    value: float

    def random(self) -> float:
        return self.value


@given(LOGITS, st.sampled_from([0.0, math.nextafter(1.0, 0.0)]), st.sampled_from([0.3, 1.0, 7.0]))
def test_the_outermost_random_numbers_draw_allowed_tokens(
    values: list[float], number: float, temperature: float
) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=0))
    sampler._random = Always(number)  # type: ignore[assignment]
    assert values[sampler.pick(row(values))] > -math.inf


@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=20), st.data())
def test_surprise_is_minus_log_softmax(values: list[float], data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(values) - 1))
    peak = max(values)
    expected = math.log(math.fsum(math.exp(v - peak) for v in values)) + peak - values[token]
    found = surprise(row(values), token)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert found >= 0.0


def test_surprise_is_stable_where_float32_is_not() -> None:
    assert surprise(row([30_000.0, 29_999.0]), 1) == pytest.approx(math.log1p(math.e), rel=1e-12)
    assert surprise(row([0.0, -200.0]), 1) == pytest.approx(200.0, rel=1e-12)
    assert surprise(row([0.0, -math.inf]), 1) == math.inf
    assert surprise(row([5.0, -math.inf]), 0) == 0.0
    half_million_even = np.zeros(500_000, dtype=np.float16)
    assert surprise(half_million_even, 3) == pytest.approx(math.log(500_000), rel=1e-12)


def test_logits_are_left_as_they_were() -> None:
    values = row([0.0, 3.0, 1.0, 2.0])
    values.flags.writeable = False
    Sampler(Sampling(temperature=0.7, top_k=3, top_p=0.9, seed=0)).pick(values)
    surprise(values, 1)
    assert values.tolist() == [0.0, 3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0, math.nan, 1.0], "NaN in 1 of 3"),
        ([math.nan], "NaN"),
        ([math.inf, 0.0], r"\+inf"),
        ([-math.inf, -math.inf], "no logit above -inf"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_named(values: list[float], words: str, temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, top_k=2, seed=0))
    with pytest.raises(PotexportError, match=words):
        sampler.pick(row(values))
    with pytest.raises(PotexportError, match=words):
        surprise(row(values), 0)


@pytest.mark.parametrize("token", [-1, 3])
def test_surprise_refuses_a_token_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(PotexportError, match="outside the graph's 3 logits"):
        surprise(row([0.0, 1.0, 2.0]), token)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 10**5000},
        {"temperature": "1"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 2.0},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(PotexportError, match=f"^{name} is ") as caught:
        Sampling(**wrong)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)

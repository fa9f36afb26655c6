"""What answers are worth, against plain computations that share no code, for any input."""

from __future__ import annotations

import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potexport.errors import PotexportError
from potexport.evaluation import scores

WORDS = st.lists(st.sampled_from(["the", "a", "An", "fox", "Fox,", "13", "dog's", "“so”", "-"]))
TEXTS = WORDS.map(" ".join)
POINTS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def plain_words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in POINTS)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def plain_f1(answer: str, wanted: str) -> float:
    """Precision and recall over tokens, each used once."""
    mine, left = plain_words(answer), plain_words(wanted)
    size, common = len(left), 0
    for word in mine:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = Fraction(common, len(mine)), Fraction(common, size)
    return float(2 * precision * recall / (precision + recall))


def plain_rouge(answer: str, wanted: str) -> float:
    """From the longest common subsequence of words of letters and digits, by the full table."""

    def split(text: str) -> list[str]:
        return "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()

    mine, other = split(answer), split(wanted)
    table = [[0] * (len(other) + 1) for _ in range(len(mine) + 1)]
    for i, left in enumerate(mine):
        for j, right in enumerate(other):
            same = table[i][j] + 1 if left == right else 0
            table[i + 1][j + 1] = max(same, table[i][j + 1], table[i + 1][j])
    longest = table[-1][-1]
    return 2 * longest / (len(mine) + len(other)) if longest else 0.0


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_f1_is_the_best_overlap_of_words(answer: str, accepted: list[str]) -> None:
    expected = max((plain_f1(answer, each) for each in accepted), default=0.0)
    assert scores.f1(answer, accepted) == pytest.approx(expected)


@settings(deadline=None)  # the first one imports the package
@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_rouge_l_is_the_longest_common_subsequence(answer: str, accepted: list[str]) -> None:
    expected = max((plain_rouge(answer, each) for each in accepted), default=0.0)
    assert scores.rouge_l(answer, accepted) == pytest.approx(expected)


def test_f1_of_known_answers() -> None:
    assert scores.f1("The quick, brown fox!", ["a quick brown fox"]) == 1.0
    assert scores.f1("quick fox", ["slow fox", "nobody"]) == 0.5
    assert scores.f1("", ["fox"]) == 0.0


def test_summaries_without_their_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    scores.rouge_scorer.cache_clear()
    with pytest.raises(PotexportError, match=r"potexport\[eval\]"):
        scores.rouge_l("a", ["b"])


DOCUMENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=12)


@given(DOCUMENTS, st.integers(0, 3))
def test_an_interval_lies_between_the_worst_and_the_best_document(
    documents: list[tuple[int, int]], seed: int
) -> None:
    totals, counts = [t for t, _ in documents], [c for _, c in documents]
    found = scores.estimate(totals, counts, seed=seed)
    ratios = [total / count for total, count in documents]
    assert found.value == pytest.approx(sum(totals) / sum(counts))
    assert min(ratios) - 1e-9 <= found.low <= found.high <= max(ratios) + 1e-9
    assert scores.estimate(totals, counts, seed=seed) == found


def test_one_document_says_nothing_of_another() -> None:
    """Whole documents are drawn: however many questions, one document has no interval."""
    assert scores.estimate([3], [4], seed=0) == scores.Estimate(0.75, 0.75, 0.75)


def test_an_interval_is_as_wide_as_theory_has_it() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = scores.estimate(values.tolist(), seed=0)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_rising_function_maps_all_three() -> None:
    assert scores.Estimate(1.0, 0.0, 2.0).map(np.exp).low == 1.0

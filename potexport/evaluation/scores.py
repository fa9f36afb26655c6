"""Figures of answers, and how sure they are.

Decides what a token F1, a ROUGE-L and an interval are; it knows no model.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from potexport.errors import PotexportError

DRAWS = 2000
INTERVAL = 0.95
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that holds it, by bootstrap over documents."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Through a function that only rises."""
        return Estimate(*(float(function(each)) for each in (self.value, self.low, self.high)))


def estimate(
    totals: Sequence[float], counts: Sequence[float] | None = None, *, seed: int
) -> Estimate:
    """The ratio of sums over documents; whole documents are drawn again, never their questions.

    Args:
        totals: of each document, such as right answers.
        counts: of each document, such as questions; 1 each by default.
    """
    above = np.asarray(totals, np.float64)
    below = np.ones(above.size) if counts is None else np.asarray(counts, np.float64)
    draws = np.random.default_rng(seed).integers(0, above.size, (DRAWS, above.size))
    drawn = above[draws].sum(-1) / below[draws].sum(-1)
    edge = (1 - INTERVAL) / 2
    low, high = np.quantile(drawn, [edge, 1 - edge])
    return Estimate(float(above.sum() / below.sum()), float(low), float(high))


def words(text: str) -> list[str]:
    """What F1 compares: lower case, without punctuation and articles.

    Source: arXiv 2308.14508 (LongBench), which takes it from SQuAD. Differs: nothing.
    """
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def f1(answer: str, accepted: Iterable[str]) -> float:
    """The best token F1 against any accepted answer, from 0 to 1."""
    return max((_f1(words(answer), words(each)) for each in accepted), default=0.0)


def _f1(mine: list[str], wanted: list[str]) -> float:
    common = sum((Counter(mine) & Counter(wanted)).values())
    return 2 * common / (len(mine) + len(wanted)) if common else 0.0


def rouge_l(answer: str, accepted: Iterable[str]) -> float:
    """The best ROUGE-L (F-measure) against any accepted answer, from 0 to 1.

    Source: the package rouge-score, without its stemmer. Differs: LongBench takes the package
    `rouge`, which splits at blanks alone and keeps punctuation.
    """
    scorer = rouge_scorer()
    return max(
        (float(scorer.score(each, answer)["rougeL"].fmeasure) for each in accepted), default=0.0
    )


@cache
def rouge_scorer() -> Any:
    """PotexportError where the package is missing: asked before anything is read."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise PotexportError(
            "summaries are scored by the package rouge-score, which is not installed; install it "
            "with: pip install 'potexport[eval]'"
        ) from error
    return RougeScorer(["rougeL"])

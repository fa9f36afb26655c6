"""Turns one row of logits into a token, or into the surprise of a given token.

This file decides how tokens are drawn; it knows nothing of text, stop strings or end-of-sequence
ids. V is the vocabulary. Every tie goes to the lowest id, so that all runtimes pick the same token.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potexport.errors import PotexportError

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens. The defaults are greedy; `top_k=0` and `top_p=1.0` are off.

    Raises PotexportError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if _is_int(self.temperature) and self.temperature > sys.float_info.max:
            raise PotexportError("temperature is too large a number; 1 draws as the model says")
        if not (_is_real(self.temperature) and 0.0 <= self.temperature < math.inf):
            raise PotexportError(
                f"temperature is {self.temperature!r}; expected a finite number, 0 (greedy) or more"
            )
        if not (_is_int(self.top_k) and self.top_k >= 0):
            raise PotexportError(f"top_k is {self.top_k!r}; expected a whole number, 0 for off")
        if not (_is_real(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise PotexportError(
                f"top_p is {self.top_p!r}; expected more than 0 and at most 1 (1 is off)"
            )
        if self.seed is not None and not (_is_int(self.seed) and self.seed >= 0):
            raise PotexportError(
                f"seed is {self.seed!r}; expected a whole number, 0 or more, or none"
            )


class Sampler:
    """Draws tokens one after another; holds the random state and nothing else.

    The same seed and the same logits give the same tokens. Each sampled token uses up exactly one
    random number, a greedy one none.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        # PCG64 by name: numpy may one day change what default_rng stands for.
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def pick(self, logits: Logits) -> int:
        """A token's id from `logits`, [V] float32; -inf forbids a token.

        Order: temperature, top-k, top-p on what top-k left. Exactly `top_k` tokens stay, fewer if
        V is smaller. Raises PotexportError for NaN, +inf, or nothing but -inf in the logits.
        """
        peak = _peak(logits)
        if self.sampling.temperature == 0.0:
            return int(np.argmax(logits))
        ids = _top_k(logits, self.sampling.top_k)
        kept = logits if ids is None else logits[ids]
        weights = _exp(kept, peak, self.sampling.temperature)
        if self.sampling.top_p < 1.0:
            nucleus = _top_p(weights, self.sampling.top_p)
            weights = weights[nucleus]
            ids = nucleus if ids is None else ids[nucleus]
        index = self._draw(weights)
        return index if ids is None else int(ids[index])

    def _draw(self, weights: NDArray[np.float64]) -> int:
        """An index into `weights`, [N] float64 >= 0 with a positive sum, in proportion to them."""
        reached = np.cumsum(weights)
        point = self._random.random() * reached[-1]
        # side="right" steps over zero weights. random() is at most 1 - 2**-53, and the product then
        # still rounds to less than the sum, so the index is within.
        return int(np.searchsorted(reached, point, side="right"))


def surprise(logits: Logits, token: int) -> float:
    """-log softmax(logits)[token] in nats, summed in float64; inf where the token's logit is -inf.

    logits: [V] float32. One float64 vector is allocated. Raises PotexportError as `Sampler.pick`
    does, and for a token outside 0 … V-1.
    """
    if not 0 <= token < logits.size:
        raise PotexportError(
            f"token {token} is outside the graph's {logits.size} logits; "
            "the tokenizer and the graphs belong to different models"
        )
    shifted = np.subtract(logits, _peak(logits), dtype=np.float64)
    own = float(shifted[token])
    np.exp(shifted, out=shifted)
    return math.log(float(shifted.sum())) - own


def _peak(logits: Logits) -> float:
    """The highest logit; one pass finds every defect, for NaN spreads through max."""
    if logits.ndim != 1 or logits.size == 0:
        raise ValueError(f"logits have shape {logits.shape}; expected [V]")
    peak = float(logits.max())
    if math.isfinite(peak):
        return peak
    if math.isnan(peak):
        defect = f"NaN in {int(np.isnan(logits).sum())} of {logits.size} logits"
    else:
        defect = "+inf among its logits" if peak > 0 else "no logit above -inf"
    raise PotexportError(f"the graph produced {defect}; export it at a higher precision (fp32)")


def _top_k(logits: Logits, k: int) -> NDArray[np.intp] | None:
    """Ids of the k highest logits, ascending, ties to the lowest id; None stands for all."""
    size = logits.size
    if k == 0 or k >= size:
        return None
    # A partition settles ties at the border by chance, so it only tells where the border is.
    border = np.partition(logits, size - k)[size - k]
    above = np.flatnonzero(logits > border)
    tied = np.flatnonzero(logits == border)[: k - above.size]
    return np.sort(np.concatenate([above, tied]))


def _exp(logits: Logits, peak: float, temperature: float) -> NDArray[np.float64]:
    """exp((logits - peak) / temperature), [N] float64: probabilities up to one factor."""
    weights: NDArray[np.float64] = np.subtract(logits, peak, dtype=np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature makes -inf, whose weight is rightly 0
        np.divide(weights, temperature, out=weights)
    np.exp(weights, out=weights)
    return weights


def _top_p(weights: NDArray[np.float64], p: float) -> NDArray[np.intp]:
    """Indices of the fewest weights whose share reaches p, at least one; heaviest first."""
    total = weights.sum()
    # Weights below (1-p)·total/N together weigh less than (1-p)·total, so the others reach p
    # without them: a sort of 256k becomes one of a few thousand. The half is room for rounding.
    candidates = np.flatnonzero(weights >= 0.5 * (1.0 - p) * total / weights.size)
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    reached = np.cumsum(weights[order])
    return order[: int(np.searchsorted(reached, p * total, side="left")) + 1]


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)

"""Scores of neighbours, mixed: what a policy does so that a number of five digits stays whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from potexport.errors import PotexportError

WIDEST = 129  # slots; means are sums of so many shifted scores


def check_pool(pool: int) -> None:
    if pool < 1 or pool % 2 == 0:
        raise PotexportError(f"--pool is {pool}; it must be odd, 1 for no pooling")
    if pool > WIDEST:
        raise PotexportError(f"--pool is {pool}; it may be at most {WIDEST}")


def max_pool(scores: Tensor, pool: int) -> Tensor:
    """(R, M): of each slot and its `pool // 2` neighbours on both sides the largest."""
    if pool == 1:
        return scores
    return max_pool1d(scores[None], pool, stride=1, padding=pool // 2)[0]


def mean_pool(scores: Tensor, pool: int, occupied: Tensor) -> Tensor:
    """(R, M): the mean of each slot and its neighbours, of those that are occupied (M,).

    Sums of shifted scores, for average pooling is wrong on the HTP in one form (docs/npu.md)
    and on ExecuTorch's kernels in the other, and rounds in each runtime in another order.
    """
    if pool == 1:
        return scores
    total = _sum_pool(torch.where(occupied, scores, 0.0), pool)
    return total / _sum_pool(occupied.float()[None], pool).clamp(min=1.0)


def _sum_pool(scores: Tensor, pool: int) -> Tensor:
    columns = scores.shape[-1]
    wide = pad(scores, (pool // 2, pool // 2))
    total = wide[:, :columns]
    for first in range(1, pool):
        total = total + wide[:, first : first + columns]
    return total


def stepped(numbers: Tensor) -> Tensor:
    """Rounded to 1/1024.

    The first layer's keys depend on the token alone, so that equal tokens tie, and so do means over
    neighbours. Each runtime rounds differently behind the seventh digit: they would break these
    ties, each in its own way. Multiples of 1/1024 add up exactly everywhere.
    """
    return torch.round(numbers * 1024.0) / 1024.0

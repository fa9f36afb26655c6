"""Expected attention: what queries still to come will attend to, by their statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from potexport.errors import PotexportError
from potexport.graphs.policies import Policy
from potexport.graphs.select import Candidates


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """s_t = E[attention to t] x |v_t|: queries are taken to be normally distributed, so that
    E[exp(q k / sqrt D)] = exp(m k / sqrt D + k S k / 2D), with mean m and covariance S of a query
    averaged over the next `future` positions; then a softmax over slots, and the mean over the
    query heads of a group. The norm of v is the Euclidean one.

    Source: arXiv 2510.00636, section 3. Differs: mean and covariance are of a calibration text, not
    of the context.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "queries"})
    future: int = 512

    def __post_init__(self) -> None:
        if self.future < 1:
            raise PotexportError(f"--future is {self.future}; it must be at least 1")

    def look(self, layer: Candidates) -> tuple[Tensor, ...]:
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.query_mean is not None
        assert layer.query_cov is not None
        heads, size = layer.keys.shape[0], layer.keys.shape[1]
        turn = self._turn(layer)  # (D, D)
        group = layer.query_mean.shape[0] // heads
        mean = (layer.query_mean @ turn.T).reshape(heads, group, size)
        spread = (turn @ layer.query_cov @ turn.T).reshape(heads, group * size, size)
        keys = layer.keys.float()  # (Hkv, D, M)
        wide = (spread @ keys).reshape(heads, group, size, -1)
        quadratic = (wide * keys[:, None]).sum(dim=2)  # (Hkv, g, M): k S k
        logits = (mean @ keys) / size**0.5 + quadratic / (2 * size)
        logits = torch.where(layer.occupied, logits, -1e4)
        expected = torch.softmax(logits, dim=-1).mean(dim=1)  # (Hkv, M)
        return (expected * (layer.values.float() * layer.values.float()).sum(dim=-1).sqrt(),)

    def score(self, slots: Candidates) -> Tensor:
        return slots.seen[0]

    def _turn(self, slots: Candidates) -> Tensor:
        """(D, D): the mean rotation of a query over the next `future` positions.

        Constant where the next token stands at 0; the rest of the way is a row of the tables.
        """
        assert slots.position is not None
        if slots.turn is None:  # a layer without positions
            return torch.eye(slots.query_mean.shape[1])  # type: ignore[union-attr]
        half = slots.turn.shape[1] // 2
        cos, sin = slots.turn[:, :half], slots.turn[:, half:]
        ahead = min(self.future, cos.shape[0])
        mean_cos, mean_sin = cos[:ahead].mean(dim=0), sin[:ahead].mean(dim=0)
        here = slots.position.clamp(max=cos.shape[0] - 1)
        first_cos, first_sin = cos.index_select(0, here)[0], sin.index_select(0, here)[0]
        c = first_cos * mean_cos - first_sin * mean_sin
        s = first_sin * mean_cos + first_cos * mean_sin
        one = torch.eye(c.shape[0])  # and not diag, which the exporter knows in parts only
        upper = torch.cat([c * one, -s * one], dim=1)
        lower = torch.cat([s * one, c * one], dim=1)
        return torch.cat([upper, lower])

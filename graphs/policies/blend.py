"""A weighted mix of other policies' scores, each brought to the same scale first."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from potexport.errors import PotexportError
from potexport.graphs.policies import Policy
from potexport.graphs.select import Candidates

TERM = re.compile(r"(?:(-?\d+(?:\.\d*)?|-?\.\d+)\s*\*\s*)?([a-z][a-z0-9-]*)\s*(?:\(([^()]*)\))?")
EXAMPLE = '"keydiff + 2*catalyst(pool=13) + 0.5*sirllm"'
RANGE = 1000.0  # of a mixed score, far inside what `select` allows


@dataclass(frozen=True)
class Blend(Policy):
    """s_t = the sum over terms of weight x (score - mean) / deviation, both over the slots that may
    go. A term that scores all of them alike, as a catalyst does that was not given, counts nothing.

    mix: such as "keydiff + 2*catalyst(pool=13)": policies by name, with weights and settings.
    Source: none.
    """

    mix: str = "keydiff + 0.5*vnorm + 2*catalyst"

    def __post_init__(self) -> None:
        _ = self.terms
        windows = {term.observed for _, term in self.terms} - {0}
        if len(windows) > 1:
            raise PotexportError(
                f"the blend {self.mix!r} wants the attention of the last {min(windows)} and of the "
                f"last {max(windows)} tokens; one window serves a whole blend"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(term.needs for _, term in self.terms))

    @property
    def observed(self) -> int:
        return max(term.observed for _, term in self.terms)

    @property
    def can_be_blind(self) -> bool:
        return any(term.can_be_blind for _, term in self.terms)

    @cached_property
    def terms(self) -> tuple[tuple[float, Policy], ...]:
        """(weight, policy) of each."""
        return tuple(self._term(part.strip()) for part in self._split())

    def _split(self) -> list[str]:
        parts = re.split(r"\+(?![^()]*\))", self.mix)
        if not all(part.strip() for part in parts):
            raise PotexportError(f"the blend {self.mix!r} does not parse; write such as {EXAMPLE}")
        return parts

    def _term(self, text: str) -> tuple[float, Policy]:
        from potexport.graphs.policies._find import make_policy, settings_of

        found = TERM.fullmatch(text)
        if found is None:
            raise PotexportError(
                f"{text!r} in the blend {self.mix!r} does not parse; write such as {EXAMPLE}"
            )
        weight, name, settings = found.groups()
        if name == "blend":
            raise PotexportError(f"the blend {self.mix!r} holds a blend; name its terms instead")
        policy = make_policy(name, settings_of(name, settings or ""))
        return float(weight or 1), policy

    def look(self, layer: Candidates) -> tuple[Tensor, ...]:
        return tuple(each for _, term in self.terms for each in term.look(layer))

    def score(self, slots: Candidates) -> Tensor:
        mixed, seen = torch.zeros(()), iter(slots.seen)
        for weight, term in self.terms:
            own = replace(slots, seen=tuple(islice(seen, term.looks)))
            mixed = mixed + weight * _normal(term.score(own), slots)
        return mixed.clamp(-RANGE, RANGE)


def _normal(scores: Tensor, slots: Candidates) -> Tensor:
    """(R, M) -> (R, M): with mean 0 and deviation 1 over the open slots of each row."""
    open_, count = slots.open, slots.open.float().sum().clamp(min=1.0)
    inside = torch.where(open_, scores, 0.0)
    mean = inside.sum(dim=-1, keepdim=True) / count
    away = torch.where(open_, scores - mean, 0.0)
    # Scaled first: squares of small attentions vanish in fp16.
    largest = away.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6)
    unit = away / largest
    deviation = ((unit * unit).sum(dim=-1, keepdim=True) / count).sqrt()
    return unit / deviation.clamp(min=1e-3)

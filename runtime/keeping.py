"""How many slots a compression keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from potexport.bundle import PolicyFacts
from potexport.errors import PotexportError
from potexport.geometry import PotGeometry
from potexport.runtime.backend import Array
from potexport.runtime.pot import Pot

SHARE = 0.95


@dataclass(frozen=True)
class Allowed:
    """The least and the most that can be kept, on average over the layers. first: what the first of
    the slots are that stay in any case."""

    least: int
    most: int
    first: str = "sinks"

    def check(self, keep: int) -> None:
        if not self.least <= keep <= self.most:
            raise PotexportError(
                f"keep is {keep}; it must lie between {self.first} + recent ({self.least}) and "
                f"{self.most}"
            )

    def nearest(self, keep: int) -> int:
        return max(self.least, min(self.most, keep))


def allowed(geometry: PotGeometry, fill: int, pinned: int = 0) -> Allowed:
    """With so many slots filled, and so many pinned. A layer that keeps fewer than the average must
    still hold sinks, or what is pinned, and recent ones."""
    least = max(geometry.sink, pinned) + geometry.recent - geometry.smallest
    first = "pinned" if pinned > geometry.sink else "sinks"
    return Allowed(least, min(geometry.keep_max, fill - geometry.smallest), first)


def check(
    geometry: PotGeometry,
    policy: PolicyFacts,
    keep: int | Literal["auto"],
    share: float,
    pinned: int = 0,
) -> None:
    """Raise PotexportError for a `keep` that no compression could take."""
    if keep == "auto":
        attention(policy)
        check_share(share)
        check_pin(geometry, keep, pinned)
    else:
        allowed(geometry, geometry.slots, pinned).check(keep)


def check_pin(
    geometry: PotGeometry, keep: int | Literal["auto"], pinned: int, lost: int = 0
) -> None:
    """Raise PotexportError where so many tokens cannot be pinned. lost: how many of them no slot
    holds any more."""
    if lost > 0:
        raise PotexportError(
            f"a compression has dropped {lost} of the {pinned + lost} tokens that are to be "
            "pinned; pin them before the pot is full, or after a reset"
        )
    most = geometry.keep_max if keep == "auto" else min(keep, geometry.keep_max)
    room = most + geometry.smallest - geometry.recent
    if pinned > max(room, 0):
        raise PotexportError(
            f"{pinned} tokens are to be pinned, and a compression that keeps {most} slots has room "
            f"for {max(room, 0)} beside the {geometry.recent} recent ones; shorten the prompt, or "
            f"keep more (at most {geometry.keep_max})"
        )


def by_mass(pot: Pot, policy: PolicyFacts, geometry: PotGeometry, share: float) -> int:
    """The fewest slots that hold this share of the attention that the policy goes by."""
    check_share(share)
    scores = pot.scores[attention(policy)]
    fills = pot.counts_of(pot.fills)
    filled = [each[:, :fill] for each, fill in zip(scores, fills, strict=True)]
    return holding(filled, geometry, share, pot.pinned)


def attention(policy: PolicyFacts) -> str:
    """Which of the pot's scores that is; PotexportError for a policy that looks at none."""
    for name in ("mass", "window", "received"):
        if name in policy.needs:
            return name
    raise PotexportError(
        f"keep is auto, and the policy {policy.label} looks at no attention; give a number, or "
        "use a policy that does: potexport policies"
    )


def check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise PotexportError(f"keep_mass is {share}; it must lie between 0 and 1")


def holding(scores: list[Array], geometry: PotGeometry, share: float, pinned: int = 0) -> int:
    """The smallest keep with which the slots that stay in any case and the best of the others hold
    this share of all scores, over all heads.

    scores: L x (Hkv, fill of the layer) float32 >= 0.
    """
    total, held = 0.0, np.zeros(geometry.slots + 1)
    first = max(geometry.sink, pinned)
    forced = first + geometry.recent
    for layer, each in enumerate(scores):
        exact = each.astype(np.float64)
        free = exact[:, first : each.shape[1] - geometry.recent]
        others = (-np.sort(-free, axis=-1)).sum(axis=0).cumsum()
        stays = exact.sum() - free.sum()
        sums = np.concatenate([np.zeros(forced), [stays], stays + others])
        # What this layer holds if the average layer keeps 0, 1, 2, … slots.
        at = np.clip(np.arange(geometry.slots + 1) + geometry.more(layer), 0, sums.size - 1)
        held += sums[at]
        total += sums[-1]
    if total <= 0:
        return geometry.keep
    return int(np.searchsorted(held, share * total * (1 - 1e-9)))

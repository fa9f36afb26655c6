"""One compression as a session makes it: what its policy looks at, how much stays, and whether all
that stays moves to the front."""

from __future__ import annotations

from typing import Literal

from potexport.geometry import PotGeometry
from potexport.runtime import keeping
from potexport.runtime.backend import Array, Backend
from potexport.runtime.ids import Ids


def compress(
    backend: Backend,
    geometry: PotGeometry,
    *,
    keep: int | Literal["auto"],
    share: float,
    least: int | None,
    catalyst: Ids,
    tail: Ids,
) -> list[Array]:
    """Keep the best slots, and those that are pinned.

    Args:
        keep: exactly so many slots, or "auto": as few as hold this `share` of the attention.
        least: keep more, up to so many, if a compression can.
        catalyst: (n,) int32, n <= P; none leaves its attention at 0. tail: the last tokens read.

    Returns, of each layer that is chosen in, (Hkv, keep of the layer) int32, the slots kept.
    """
    pot = backend.pot
    allowed = keeping.allowed(geometry, pot.fill, pot.pinned)
    if keep != "auto":  # before the work of observing
        count = keep if least is None else max(keep, min(geometry.keep_max, least))
        allowed.check(count)
    observe(backend, catalyst, tail)
    if keep == "auto":
        found = keeping.by_mass(pot, backend.policy, geometry, share)
        count = allowed.nearest(max(found, least or 0))
        allowed.check(count)  # fewer slots may be filled than must stay
    reset = pot.position + geometry.slots - count + geometry.widest > geometry.positions
    return backend.compress(count, reset=reset)


def observe(backend: Backend, catalyst: Ids, tail: Ids) -> None:
    """The passes that the policy wants before a compression."""
    policy = backend.policy
    if "mass" in policy.needs and catalyst.size:
        backend.observe(catalyst)
    elif "mass" in policy.needs:
        for mass in backend.pot.mass:
            mass[...] = 0
    if "window" in policy.needs:
        last = tail[-policy.window :]
        backend.observe(last, back=last.size, into="window")

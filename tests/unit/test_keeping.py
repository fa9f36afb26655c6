"""How many slots a compression keeps, against plain Python."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potexport.bundle import PolicyFacts
from potexport.errors import PotexportError
from potexport.geometry import ModelFacts, PotGeometry
from potexport.runtime import keeping
from potexport.runtime.pot import Pot
from potexport.spec import Layout

FACTS = ModelFacts("llama", 3, 4, 2, 8, 100, 512)
CATALYST = PolicyFacts("catalyst", "catalyst", ("mass",), {})
UNIFORM = PotGeometry(24, 4, 10, 18, 4, 2, 3, positions=100)
SHAPED = PotGeometry(24, 4, 10, 18, 4, 2, 3, positions=100, layer_slots=(26, 25, 21))


def plainly(pot: Pot, geometry: PotGeometry, share: float) -> int:
    """The smallest keep that is allowed, with which forced slots and the best of the others have
    the share; the largest if none does."""
    allowed = keeping.allowed(geometry, pot.fill, pot.pinned)
    first = max(geometry.sink, pot.pinned)
    heads = [
        (layer, head[: pot.filled(layer)].tolist())
        for layer, mass in enumerate(pot.mass)
        for head in mass
    ]
    wanted = share * sum(sum(head) for _, head in heads)
    for keep in range(allowed.least, allowed.most + 1):
        held = 0.0
        for layer, head in heads:
            end = len(head) - geometry.recent
            forced = head[:first] + head[end:]
            room = max(0, keep + geometry.more(layer) - len(forced))
            held += sum(forced) + sum(sorted(head[first:end], reverse=True)[:room])
        if held >= wanted:
            return keep
    return allowed.most


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([UNIFORM, SHAPED]),
    st.integers(19, 24),
    st.sampled_from([0.1, 0.5, 0.8, 0.95, 1.0]),
    st.lists(st.integers(0, 9), min_size=40, max_size=160),
    st.integers(0, 6),
)
def test_the_smallest_set_that_holds_the_share(
    geometry: PotGeometry, fill: int, share: float, numbers: list[int], pinned: int
) -> None:
    pot = Pot(Layout(FACTS, geometry, frozenset({"mass"})))
    pot.fill, pot.pinned = fill, pinned
    for layer, mass in enumerate(pot.mass):
        mass[:] = np.resize(np.roll(numbers, 7 * layer), mass.shape)
        mass[:, pot.filled(layer) :] = 0  # free slots are attended by none
    if not any(mass.any() for mass in pot.mass):
        assert keeping.by_mass(pot, CATALYST, geometry, share) == geometry.keep
        return
    found = keeping.by_mass(pot, CATALYST, geometry, share)
    mine = keeping.allowed(geometry, pot.fill, pinned).nearest(found)
    assert mine == plainly(pot, geometry, share)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_a_share_is_more_than_nothing_and_at_most_all(share: float) -> None:
    with pytest.raises(PotexportError, match=f"keep_mass is {share}; .* between 0 and 1"):
        keeping.check_share(share)


def test_what_can_be_kept_holds_the_forced_slots_of_every_layer() -> None:
    assert keeping.allowed(UNIFORM, 24) == keeping.Allowed(5, 18)
    assert keeping.allowed(UNIFORM, 12) == keeping.Allowed(5, 12)
    assert keeping.allowed(SHAPED, 24) == keeping.Allowed(8, 18)  # the last layer keeps 3 fewer
    with pytest.raises(PotexportError, match=r"keep is 7; .* sinks \+ recent \(8\) and 18"):
        keeping.allowed(SHAPED, 24).check(7)
    assert keeping.allowed(UNIFORM, 24, pinned=2) == keeping.Allowed(5, 18)
    assert keeping.allowed(SHAPED, 24, pinned=7) == keeping.Allowed(13, 18, "pinned")
    with pytest.raises(PotexportError, match=r"keep is 8; .* pinned \+ recent \(10\) and 18"):
        keeping.check(UNIFORM, CATALYST, 8, 0.9, pinned=7)


@pytest.mark.parametrize(
    ("geometry", "keep", "room"), [(UNIFORM, 10, 7), (UNIFORM, "auto", 15), (SHAPED, 10, 4)]
)
def test_what_is_pinned_fits_every_layer_of_every_compression(
    geometry: PotGeometry, keep: int | Literal["auto"], room: int
) -> None:
    keeping.check_pin(geometry, keep, room)
    keeping.check(geometry, CATALYST, keep, 0.9, room)
    says = rf"{room + 1} tokens are to be pinned, .* has room for {room} beside the 3 recent"
    with pytest.raises(PotexportError, match=says):
        keeping.check_pin(geometry, keep, room + 1)
    with pytest.raises(PotexportError, match="pinned"):
        keeping.check(geometry, CATALYST, keep, 0.9, room + 1)


def test_only_what_looks_at_attention_can_go_by_it() -> None:
    for needs in (("mass", "novelty"), ("received",), ("keys", "window")):
        assert keeping.attention(PolicyFacts("x", "x", needs, {})) in needs
    with pytest.raises(PotexportError, match=r"keydiff looks at no attention; .*potexport pol"):
        keeping.attention(PolicyFacts("keydiff", "keydiff", ("keys",), {}))

"""The whole loop on the emulator: read past compressions, go on, decode past more.

The oracle is fp32 PyTorch, which follows the emulator's compressions: one near tie decided
otherwise, and two runs would read different contexts from then on. The limits are those of issue 3.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from potexport.npu_parity import selected_otherwise
from potexport.recording import compare, origins
from tests.npu.conftest import FORCED, READ, Case

Make = Callable[[str, str], Case]
FAMILIES = ["llama", "qwen3", "gemma3", "glm4"]
CASES = [(family, "infinipot") for family in FAMILIES]
# What small models get by default, with pools as small as the pot.
BLEND = "blend:keydiff(pool=3) + 0.5*vnorm(pool=3) + 2*catalyst(pool=3)"
CASES += [("llama", "streaming"), ("llama", BLEND)]
MORE = [pytest.param("llama", "keydiff", marks=pytest.mark.thorough)]
COSINE = 0.9995  # smallest of 120 positions
TOP1, GAP = 0.975, 0.01  # of 120 positions; of the largest logit
OVERLAP, HEAD = 0.99, 0.98  # of all kept slots; of those of the worst head, 336
NOISE = 0.01  # of the largest score of a head


@pytest.mark.parametrize(("family", "policy"), [*CASES, *MORE])
def test_the_loop_on_the_emulator_is_pytorchs(case: Make, family: str, policy: str) -> None:
    here = case(family, policy)
    mine = here.on_emulator()
    seen = compare(mine, here.follow(mine))
    assert seen.compressions >= 5
    assert seen.cosine >= COSINE
    # Random weights have near ties among their logits, too: that share differs, and no more.
    assert seen.top1 >= TOP1
    assert seen.gap <= GAP
    assert seen.disagreements <= (1 - OVERLAP) * seen.kept
    assert seen.overlap >= HEAD
    # Every disagreement is a near tie: the scores are this close to the reference's, and the NPU
    # selects from its own scores exactly what the reference would select from them.
    assert all(noise <= NOISE for noise in seen.noise.values()), seen
    assert selected_otherwise(mine, here.manifest, here.oracle.policy) == (
        0 if policy == "infinipot" else None
    )


def test_the_recorded_slots_lead_back_to_the_tokens(case: Make) -> None:
    """Sinks stay for good; what was just read is kept."""
    here = case("llama", "streaming")
    mine = here.on_emulator()
    pot = here.manifest.pot
    read = 0
    for fill, keep, kept in zip(mine.fill, [0, *mine.keep], origins(mine), strict=False):
        read += fill - keep
        assert (kept[..., : pot.sink] == np.arange(pot.sink)).all()
        assert (kept[..., -pot.recent :] == np.arange(read - pot.recent, read)).all()
        assert (np.diff(kept, axis=-1) > 0).all()
    assert pot.slots < read <= READ + FORCED

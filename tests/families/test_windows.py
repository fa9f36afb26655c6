"""What sliding windows, keys that do not turn and keys in another order change, past the plumbing.

Policies that look at keys, at the last tokens once more, or at attention of every pass; generating
token by token, when a window's oldest tokens give way; and going back to a snapshot.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potexport import bundle, pipeline
from potexport.errors import PotexportError
from potexport.runtime.session import Session
from tests import tiny
from tests.families.proof import Proof
from tests.parity import tolerances
from tests.parity.conftest import POT
from tests.parity.going_on import goes_on_alike
from tests.parity.held import SPECS, begin
from tests.parity.test_loop import CATALYST, alike, difference, generate_alike, tokens, watch

POLICIES = ("infinipot", "snapkv", "h2o", "keydiff", "tova", "random")
FAMILIES = ("gemma3", "smollm3", "glm4")


@pytest.fixture(scope="module", params=FAMILIES)
def proof(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Proof:
    """A bundle with all of POLICIES."""
    folder = tmp_path_factory.mktemp("several")
    asked = tuple(SPECS.get(name, name) for name in POLICIES)
    return Proof.build(str(request.param), folder, policy=asked, settings={})


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_choose_as_their_rules_do(proof: Proof, policy: str) -> None:
    session = Session.open(proof.bundle, threads=1, policy=list(POLICIES))
    kept = begin(session, policy)
    session.feed(tokens())
    settings = session.manifest.policy_of(policy).settings
    oracle = proof.oracle(policy=policy, settings=settings)
    wanted = oracle.read(tokens().tolist())
    assert difference(session.logits(), wanted) <= tolerances.PAST
    assert alike(kept, oracle.kept)
    assert len(kept) >= 10


@pytest.mark.parametrize("proof", ["gemma3"], indirect=True)
def test_pinned_tokens_stay_where_layers_are_chosen_in(proof: Proof) -> None:
    """The others hold the last tokens, whatever is pinned."""
    settings = Session.open(proof.bundle, threads=1).manifest.policy_of("infinipot").settings
    worst, compressions = proof.past(pinned=11, settings=settings)
    assert worst <= tolerances.PAST
    assert compressions >= 10


@pytest.mark.parametrize("proof", ["gemma3"], indirect=True)
def test_generating_past_window_and_pot_equals_the_oracle(proof: Proof) -> None:
    session = Session.open(proof.bundle, threads=1)
    session.set_catalyst(CATALYST)
    settings = session.manifest.policy_of("infinipot").settings
    oracle = proof.oracle(settings=settings)
    kept = watch(session)
    generate_alike(session, oracle)
    assert alike(kept, oracle.kept)  # greedy texts repeat, and equal tokens hide a wrong slot
    assert len(oracle.kept) >= 2


@pytest.mark.parametrize("proof", ["gemma3"], indirect=True)
def test_a_snapshot_goes_on_bit_for_bit(proof: Proof) -> None:
    session = Session.open(proof.bundle, threads=1)
    session.feed(tokens(150))
    state = session.snapshot()
    first = [_after(session, tokens(200, seed=2)), _after(session, tokens(9, seed=3))]
    session.restore(state)
    again = [_after(session, tokens(200, seed=2)), _after(session, tokens(9, seed=3))]
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))


def _after(session: Session, ids: Any) -> Any:
    session.feed(ids)
    return session.logits().copy()


@pytest.mark.parametrize("proof", ["gemma3"], indirect=True)
def test_a_saved_session_goes_on_bit_for_bit(proof: Proof, tmp_path: Path) -> None:
    for policy in ("infinipot", "snapkv"):  # the last looks at tokens that were read once more
        goes_on_alike(proof.bundle, tmp_path, policy=policy)


def test_a_layer_with_a_window_is_as_large_as_it(tmp_path: Path) -> None:
    made = tiny.save(tmp_path / "model", "gemma3")
    options: dict[str, Any] = {**POT, "positions": 480}
    decided = pipeline.plan(pipeline.Options(model=str(made), policy="infinipot", **options))
    pot = decided.layout.pot
    assert pot.windows == (tiny.WINDOW, tiny.WINDOW, 0)
    sizes = [pot.slots_of(layer) for layer in range(3)]
    assert sizes == [tiny.WINDOW + pot.chunk + pot.catalyst_width] * 2 + [48]
    full = replace(decided.layout, pot=replace(pot, windows=()))
    assert decided.layout.memory()["pot"] < full.memory()["pot"]


def test_a_manifest_with_other_windows_is_refused(tmp_path: Path) -> None:
    proof = Proof.build("gemma3", tmp_path)
    manifest = bundle.read(proof.bundle)
    for windows, message in (
        ((13, 13), "slots or windows of 2 layers"),
        ((13, 0, 13), "do not fit"),
    ):
        other = replace(manifest, pot=replace(manifest.pot, windows=windows))
        (proof.bundle / bundle.MANIFEST).write_text(other.to_json())
        with pytest.raises(PotexportError, match=message):
            bundle.read(proof.bundle)

"""Layers with pots of different sizes (`--pot-shape`): the eager loop, and the rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from potexport import bundle
from potexport.errors import PotexportError
from tests.parity.conftest import RUNTIMES
from tests.parity.going_on import goes_on_alike
from tests.parity.held import SPECS, Held, begin
from tests.parity.test_loop import same, tokens

SHAPED = ("keydiff", "infinipot", "snapkv", "h2o")
HELD = {"onnxruntime": SHAPED, "executorch": SHAPED[:2]}  # whose builds are slow
SHAPES = {"onnxruntime": (59, 48, 37), "executorch": (41, 60, 43)}  # a pyramid; a file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Held]:
    """Three layers with pots of different sizes; of ExecuTorch's slow builds a smaller one.

    A fixture with the runtime as its parameter would be made again for each test that names it.
    """

    @cache
    def build(runtime: str) -> Held:
        folder, asked = tmp_path_factory.mktemp("shaped"), "pyramid"
        if runtime == "executorch":
            (folder / "shape.json").write_text(json.dumps(SHAPES[runtime]))
            asked = str(folder / "shape.json")
        specs = [SPECS.get(name, name) for name in HELD[runtime]]
        held = Held.build(folder, specs, runtime=runtime, pot_shape=asked, layers=3)
        assert bundle.read(held.folder).pot.layer_slots == SHAPES[runtime]
        return held

    return build


@pytest.fixture(params=RUNTIMES)
def shaped(made: Callable[[str], Held], request: pytest.FixtureRequest) -> Held:
    return made(request.param)


CASES = [(runtime, name) for runtime, held in HELD.items() for name in held]


@pytest.mark.parametrize(("shaped", "name"), CASES, indirect=["shaped"])
def test_layers_of_different_sizes(shaped: Held, name: str) -> None:
    """Against the eager loop, and the rule."""
    kept = begin(shaped.session, name)
    shaped.session.feed(tokens())
    eager = shaped.oracle().session(policy=name)
    wanted = begin(eager, name)
    eager.feed(tokens())
    slots = shaped.session.manifest.pot.layer_slots
    oracle = shaped.reference(name, layer_slots=slots)
    logits = oracle.read(tokens().tolist())
    same(shaped.session, kept, oracle, logits)
    same(eager, wanted, oracle, logits)
    assert [each.shape[1] for each in kept[-1]] == [23 + size - 48 for size in slots]
    assert set(oracle.resets) == {False, True}


@pytest.mark.parametrize("name", SHAPED[:2])
def test_pinned_tokens_stay_in_every_layer(shaped: Held, name: str) -> None:
    """As sinks do. As many as the smallest layer has room for, and no more."""
    session, pot = shaped.session, shaped.session.manifest.pot
    room = pot.keep + pot.smallest - pot.recent
    begin(session, name)
    session.feed(tokens(room + 1))
    with pytest.raises(PotexportError, match=f"has room for {room} beside the 3 recent"):
        session.pin()
    kept = begin(session, name)
    session.feed(tokens()[:room])
    assert session.pin() == room
    session.feed(tokens()[room:])
    oracle = shaped.reference(name, layer_slots=pot.layer_slots, sink=room)
    same(session, kept, oracle, oracle.read(tokens().tolist()))


def test_a_saved_session_goes_on_bit_for_bit(shaped: Held, tmp_path: Path) -> None:
    goes_on_alike(shaped.folder, tmp_path)


@pytest.mark.parametrize("shaped", RUNTIMES[:1], indirect=True)  # no runtime takes part
@pytest.mark.parametrize("slots", SHAPES.values())
@pytest.mark.parametrize("name", SHAPED)
def test_layers_of_different_sizes_with_as_few_positions_as_there_can_be(
    shaped: Held, name: str, slots: tuple[int, ...]
) -> None:
    """Behind a reset the next token stands after the fullest layer."""
    pot = shaped.session.manifest.pot
    least = max(slots) + pot.widest
    session = shaped.oracle(layer_slots=slots, positions=least).session(policy=name)
    kept = begin(session, name)
    session.feed(tokens())
    oracle = shaped.reference(name, layer_slots=slots, positions=least)
    same(session, kept, oracle, oracle.read(tokens().tolist()))
    assert all(oracle.resets[1:])

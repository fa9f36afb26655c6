"""Bundles of tiny models, in each runtime, against references that share no code with them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from potexport.runtime.session import Session
from tests.parity import tolerances
from tests.parity.conftest import POT, RUNTIMES, Build
from tests.parity.going_on import goes_on_alike
from tests.reference import Reference
from tests.thorough import cases

# Where tokens may stand: as few as there can be, so that each compression moves all to the front;
# so many that none does; or some of both.
POSITIONS = {"llama": 150, "qwen2": 512, "qwen3": 56}
SLOW = ("executorch", "qwen2"), ("executorch", "qwen3")  # builds of 20 s; Llama's are the same loop
CASES = cases(itertools.product(RUNTIMES, POSITIONS), rare=SLOW)
every_family = pytest.mark.parametrize(("build", "family"), CASES, indirect=["build"])
INFINIPOT: dict[str, Any] = {"alpha": 0.5, "pool": 13}  # its defaults
TOKENS = 400
CATALYST = [5, 9, 200, 33, 41]


def tokens(count: int = TOKENS, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(3, 280, count).astype(np.int32)


def load(folder: Any) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


def reference(
    model: PreTrainedModel, policy: str = "infinipot", settings: Any = INFINIPOT, **changes: Any
) -> Any:
    """The oracle with the geometry of POT."""
    names = ("chunk", "keep", "keep_max", "sink", "recent", "positions")
    return Reference(
        model,
        slots=POT["pot"],
        policy=policy,
        settings=settings,
        **{
            **{name: POT[name] for name in names},
            "widest": max(POT["chunk"], POT["catalyst_width"]),
            "catalyst": CATALYST,
            **changes,
        },
    )


Kept = list[list[np.ndarray[Any, Any]]]  # of each compression and layer (Hkv, keep)


def watched(bundle: Any) -> tuple[Session, Kept]:
    """A session that records the slots it keeps."""
    session = Session.open(bundle, threads=1)
    session.set_catalyst(CATALYST)
    return session, watch(session)


def watch(session: Session) -> Kept:
    """What it keeps from now on."""
    kept: Kept = []
    session.on_compress = lambda slots: kept.append([each.copy() for each in slots])
    return kept


def alike(mine: Kept, wanted: Any) -> bool:
    """The same slots at every compression."""
    return len(mine) == len(wanted) and all(
        np.array_equal(a, np.asarray(b))
        for one, other in zip(mine, wanted, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def difference(mine: Any, wanted: Any) -> float:
    """Largest difference relative to the largest logit."""
    mine, wanted = np.asarray(mine), np.asarray(wanted)
    return float(np.abs(mine - wanted).max() / np.abs(wanted).max())


@every_family
def test_context_that_fits_equals_transformers(build: Build, family: str) -> None:
    bundle, folder = build(family, positions=POSITIONS[family])
    prompt = tokens(30)
    wanted = load(folder).generate(  # type: ignore[operator]
        torch.from_numpy(prompt[None].astype(np.int64)),
        max_new_tokens=16,
        min_new_tokens=16,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    session, kept = watched(bundle)
    session.feed(prompt)
    for step, logits in enumerate(wanted.logits):
        mine = session.logits()
        assert difference(mine, logits[0]) <= tolerances.FITS, f"step {step}"
        session.accept(int(wanted.sequences[0, prompt.size + step]))
    assert not kept


@every_family
def test_a_saved_session_goes_on_bit_for_bit(build: Build, family: str, tmp_path: Path) -> None:
    goes_on_alike(build(family, positions=POSITIONS[family])[0], tmp_path)


@every_family
def test_past_the_pot_it_equals_the_independent_reference(build: Build, family: str) -> None:
    """The oracle that has nothing of transformers in it; tests/families has more of them."""
    positions = POSITIONS[family]
    bundle, folder = build(family, positions=positions)
    session, kept = watched(bundle)
    session.feed(tokens())
    oracle = reference(load(folder), positions=positions)
    wanted = oracle.read(tokens().tolist())
    same(session, kept, oracle, wanted)
    assert set(oracle.resets) == {56: {True}, 150: {True, False}, 512: {False}}[positions]


def same(session: Session, kept: Kept, oracle: Any, wanted: Any, *, least: int = 10) -> None:
    """Kept slots of every compression; then logits, and all that the pot holds."""
    mine = session.logits()
    assert len(kept) == len(oracle.kept) >= least
    for number, (one, other) in enumerate(zip(kept, oracle.kept, strict=True)):
        assert alike([one], [other]), f"compression {number}"
    assert difference(mine, wanted) <= tolerances.PAST
    pot = session.backend.pot
    assert pot.position == oracle.position
    for layer, fill in enumerate(oracle.fills):
        assert pot.filled(layer) == fill
        keys = pot.keys[layer][0, :, :, :fill].transpose(0, 2, 1)
        assert difference(keys, oracle.keys(layer)) <= tolerances.PAST
        assert difference(pot.values[layer][0, :, :fill], oracle.values(layer)) <= tolerances.PAST
        if pot.novelty:
            assert np.allclose(pot.novelty[layer][:, :fill], oracle.novelty[layer], atol=1e-3)


def generate_alike(session: Session, oracle: Any) -> None:
    """Both read a little and go on greedily, past the pot: the same logits at every step."""
    session.feed(tokens(20))
    wanted = oracle.read(tokens(20).tolist())
    for _ in range(90):
        mine = session.logits()
        assert difference(mine, wanted) <= tolerances.PAST
        token = int(mine.argmax())
        session.accept(token)
        wanted = oracle.decode(token)


@pytest.mark.parametrize(
    "fault", ["no_reset", "positions_left_behind", "mask_off_by_one", "swap_keys_values"]
)
def test_a_broken_reference_is_told_apart(build: Build, fault: str) -> None:
    """Were these to agree, the tests above could not fail."""
    bundle, folder = build("llama")
    session, _ = watched(bundle)
    session.feed(tokens())
    faults: dict[str, Any] = {fault: True}
    wanted = reference(load(folder), **faults).read(tokens().tolist())
    assert difference(session.logits(), wanted) > 100 * tolerances.PAST


def test_generating_past_the_pot_compresses_and_equals_the_reference(build: Build) -> None:
    bundle, folder = build("llama")
    session, kept = watched(bundle)
    oracle = reference(load(folder))
    generate_alike(session, oracle)
    assert len(kept) == len(oracle.kept) >= 2


@pytest.mark.parametrize("to_come", [0, 5, 40])
def test_keep_adapts_to_what_is_still_to_come(build: Build, to_come: int) -> None:
    bundle, folder = build("llama")
    session, kept = watched(bundle)
    session.feed(tokens(101), to_come=to_come)
    oracle = reference(load(folder))
    wanted = oracle.read(tokens(101).tolist(), to_come=to_come)
    _, sizes = session.logits(), [each[0].shape[-1] for each in kept]
    assert sizes == [each[0].shape[-1] for each in oracle.kept]
    assert difference(session._last, wanted) <= tolerances.PAST
    assert (max(sizes) > POT["keep"]) == (to_come < 40)


@pytest.mark.parametrize("cuts", [[1, 2, 50], [8, 16, 24], [399], [130, 131, 132, 133]])
def test_feeding_in_pieces_equals_feeding_at_once(build: Build, cuts: list[int]) -> None:
    bundle, _ = build("llama")
    session, kept = watched(bundle)
    session.feed(tokens())
    at_once = session.logits().copy()
    pieces, kept_in_pieces = watched(bundle)
    for piece in np.split(tokens(), cuts):
        pieces.feed(piece)
    assert np.array_equal(pieces.logits(), at_once)
    assert alike(kept, kept_in_pieces)


def test_the_runtimes_agree_with_each_other(builds: Build) -> None:
    """Slot for slot, and to the last bits of a logit: what one read, the other could go on with."""
    sides = []
    for runtime in RUNTIMES:
        session, kept = watched(builds("llama", runtime=runtime)[0])
        session.feed(tokens())
        sides.append((session.logits(), kept, session.backend.pot))
    (mine, kept, pot), (other, also_kept, other_pot) = sides
    assert alike(kept, also_kept)
    assert difference(mine, other) <= tolerances.PAST
    for one, two in zip(pot.values, other_pot.values, strict=True):
        assert difference(one[:, :, : pot.fill], two[:, :, : pot.fill]) <= tolerances.PAST


@pytest.mark.parametrize("build", ["onnxruntime"], indirect=True)
def test_half_precision_stays_near_the_reference(build: Build) -> None:
    """fp16 graphs on the CPU: the same model, but rounding decides near ties among slots."""
    bundle, folder = build("llama", precision="fp16")
    session, _ = watched(bundle)
    assert session.backend.pot.keys[0].dtype == np.float16
    session.feed(tokens(40))
    wanted = reference(load(folder)).read(tokens(40).tolist())
    assert difference(session.logits(), wanted) < 0.02

"""Coded pots in each runtime against eager PyTorch with the same codes, and against floats."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potexport import bundle, pipeline
from potexport.errors import PotexportError
from potexport.following import Oracle
from potexport.runtime.coded_pot import KeyFacts
from potexport.runtime.session import Session
from tests import tiny
from tests.parity import tolerances
from tests.parity.conftest import POT, RUNTIMES, Build
from tests.parity.going_on import goes_on_alike
from tests.parity.test_loop import CATALYST, difference, load, tokens, watched
from tests.thorough import cases

LEAST = POT["pot"] + POT["chunk"]  # positions: with so few, each compression is a reset
# Each kind of what a coded pot must bring into the order of slots: attention of the catalyst, of
# the last tokens and of all tokens; values.
POLICIES = ["infinipot", "tova", "h2o", "vatp"]


def eager(folder: Path, model: Path, **changes: Any) -> tuple[Session, list[Any]]:
    """The bundle's loop in PyTorch, its manifest changed."""
    manifest = replace(bundle.read(folder), **changes)
    text = Session.open(folder, threads=1).text
    session = Oracle.of(folder, manifest, load(model), text).session()
    if "mass" in manifest.policy.needs:
        session.set_catalyst(CATALYST)
    kept: list[Any] = []
    _record(session, kept)
    return session, kept


def _record(session: Session, kept: list[Any]) -> None:
    """As one row a compression: layers may have different sizes."""
    session.on_compress = lambda slots: kept.append(np.concatenate([s.ravel() for s in slots]))


@torch.no_grad()
def logits(session: Session, pinned: int = 0) -> Any:
    session.feed(tokens()[:pinned])
    session.pin()
    session.feed(tokens()[pinned:])
    return session.logits().copy()


# ExecuTorch's slow builds: one with 4 bits, one with 8 that holds another policy; what each needs
# is what the others do.
DTYPES = list(itertools.product(RUNTIMES, ("fp16", "int8", "int4")))
RARE = [("executorch", "fp16"), ("executorch", "int8")]
SCORES = [("onnxruntime", policy) for policy in POLICIES[1:]] + [("executorch", "vatp")]
on_both = pytest.mark.parametrize("build", cases(RUNTIMES, rare=["executorch"]), indirect=True)
with_every_dtype = pytest.mark.parametrize(
    ("build", "pot_dtype"), cases(DTYPES, rare=RARE), indirect=["build"]
)
with_codes = pytest.mark.parametrize(
    ("build", "pot_dtype"),
    cases([each for each in DTYPES if each[1] != "fp16"], rare=RARE),
    indirect=["build"],
)


@with_every_dtype
def test_the_loop_equals_eager_pytorch(build: Build, pot_dtype: str) -> None:
    _same(build, pot_dtype=pot_dtype)


@pytest.mark.parametrize(("build", "policy"), SCORES, indirect=["build"])
def test_every_kind_of_score_finds_its_slot(build: Build, policy: str) -> None:
    _same(build, pot_dtype="int8", policy=policy, catalyst_width=32)


@on_both
def test_pinned_slots_become_codes_and_stay(build: Build) -> None:
    _same(build, pinned=15, pot_dtype="int4")


@on_both
def test_a_reset_at_every_compression(build: Build) -> None:
    _same(build, pot_dtype="int4", positions=LEAST)


@on_both
def test_layers_of_different_sizes(build: Build) -> None:
    _same(build, pot_dtype="int4", pot_shape="pyramid", policy="h2o")


def _same(build: Build, pinned: int = 0, **options: Any) -> None:
    """Kept slots are the same ones, and logits are, but for codes that lie between two."""
    folder, model = build("llama", **{"policy": "infinipot", **options})
    session, kept = watched(folder)
    _record(session, kept)
    oracle, wanted = eager(folder, model)
    mine, theirs = logits(session, pinned), logits(oracle, pinned)
    assert len(kept) == len(wanted) >= 10
    same = [np.mean(one == other) for one, other in zip(kept, wanted, strict=True)]
    assert min(same) >= 1 - tolerances.CODED_KEPT
    assert difference(mine, theirs) <= tolerances.CODED


@with_codes
def test_a_broken_reference_is_told_apart(build: Build, pot_dtype: str) -> None:
    """Were channels mixed up, or a pot of floats the same, the tests above could not fail."""
    folder, model = build("llama", pot_dtype=pot_dtype, policy="infinipot")
    mine = logits(watched(folder)[0])
    floats, _ = eager(folder, model, pot_dtype="")
    assert difference(mine, logits(floats)) > 2 * tolerances.CODED
    manifest = bundle.read(folder)
    text = Session.open(folder, threads=1).text
    oracle = Oracle.of(folder, manifest, load(model), text)
    assert oracle.key_facts is not None
    mixed = KeyFacts(oracle.key_facts.channels[:, :, ::-1].copy(), oracle.key_facts.turn[::-1])
    session = replace(oracle, key_facts=mixed).session()
    session.set_catalyst(CATALYST)
    assert difference(mine, logits(session)) > 2 * tolerances.CODED


def test_a_context_of_sinks_and_newest_alone_is_exact(build: Build) -> None:
    """No slot is a code yet."""
    folder, model = build("llama", pot_dtype="int4", policy="infinipot")
    session, _ = watched(folder)
    floats, _ = eager(folder, model, pot_dtype="")
    for each in (session, floats):
        each.feed(tokens(20))
    with torch.no_grad():
        assert difference(session.logits(), floats.logits()) <= tolerances.FITS


@with_codes
def test_a_saved_session_goes_on_bit_for_bit(build: Build, pot_dtype: str, tmp_path: Path) -> None:
    goes_on_alike(build("llama", pot_dtype=pot_dtype, policy="infinipot")[0], tmp_path)


@on_both
def test_the_pot_is_as_small_as_the_manifest_says(build: Build) -> None:
    sizes = []
    for pot_dtype in (None, "int8", "int4"):
        folder, _ = build("llama", pot_dtype=pot_dtype, policy="infinipot")
        session = Session.open(folder, threads=1)
        pot = session.manifest.layout.memory()["pot"]
        assert session.backend.pot.bytes == pot
        sizes.append(pot)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model")))


def plan(model: str, **options: Any) -> pipeline.Plan:
    return pipeline.plan(pipeline.Options(model=model, **{**POT, **options}))


def test_a_pot_without_room_for_codes_is_refused(model: str) -> None:
    with pytest.raises(PotexportError, match="leaves none for --pot-dtype int8; give --pot at lea"):
        plan(model, pot=21, keep=10, keep_max=13, pot_dtype="int8")


def test_other_precisions_refuse_it(model: str) -> None:
    with pytest.raises(PotexportError, match="takes no --pot-dtype int4 with --precision fp16"):
        plan(model, precision="fp16", pot_dtype="int4")
    assert plan(model, precision="fp16", pot_dtype="fp16").layout.pot_dtype == ""


def test_other_targets_refuse_it(model: str) -> None:
    with pytest.raises(PotexportError, match="takes no --pot-dtype int8 with"):
        plan(model, target="ios", runtime="executorch", pot_dtype="int8")


def test_a_broken_file_of_channels_is_refused(build: Build, tmp_path: Path) -> None:
    import shutil

    folder, _ = build("llama", pot_dtype="int4", policy="infinipot")
    copy = tmp_path / "bundle"
    shutil.copytree(folder, copy)
    np.save(copy / "key_channels.npy", np.zeros(3, np.float32))
    with pytest.raises(PotexportError, match=r"key_channels\.npy is"):
        Session.open(copy, threads=1)

"""The real model: SmolLM2-135M-Instruct from its GGUF, with a real novel. Some two minutes.

For ExecuTorch its first layers, at their full width; all thirty are `make verify-executorch`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potexport import loader, pipeline
from potexport.runtime.session import Session
from tests import smollm2
from tests.families import genai
from tests.parity import tolerances
from tests.parity.conftest import RUNTIMES
from tests.reference import Reference
from tests.smollm2 import GGUF, ROOT

BLEND = "blend:keydiff(pool=9,rotated=false) + 0.5*vnorm(pool=9) + 2*catalyst(pool=13)"
QUESTION = "\n\nWhat is said of Mr. Darcy's pride?"

pytestmark = smollm2.needed
MORE = pytest.param("blend", 4, marks=pytest.mark.thorough)


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is built: the whole model, or its first layers."""
    if runtime == "onnxruntime":
        return GGUF
    return smollm2.cut(tmp_path_factory.mktemp("cut") / "model", layers=3)


@pytest.fixture(scope="module")
def bundle(source: Path, runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "bundle"
    asked = pipeline.Options(
        model=str(source),
        pot=512,
        keep=256,
        runtime=runtime,
        policy=("infinipot", BLEND),
        positions=1024,
    )
    pipeline.build(asked, folder)
    return folder


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    where = loader.resolve(str(source))
    return loader.load_model(where, dtype=torch.float32, attn_implementation="sdpa")


@pytest.fixture
def session(bundle: Path) -> Session:
    return Session.open(bundle, threads=2, policy=["infinipot", "blend"])


def novel(session: Session, count: int) -> np.ndarray[Any, Any]:
    text = (ROOT / "data" / "pride-and-prejudice.txt").read_text()
    return session.text.encode(text[: count * 8])[:count]


@torch.no_grad()
def test_context_that_fits_equals_transformers(session: Session, model: Any) -> None:
    """64 greedy steps: the same tokens, and every logit."""
    prompt = novel(session, 400)
    wanted = model.generate(
        torch.from_numpy(prompt[None].astype(np.int64)),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    session.feed(prompt)
    for step, logits in enumerate(wanted.logits):
        mine = session.logits()
        assert np.abs(mine - logits[0].numpy()).max() <= tolerances.REAL_FITS, f"step {step}"
        assert mine.argmax() == wanted.sequences[0, prompt.size + step]
        session.accept(int(mine.argmax()))


def test_onnxruntime_genai_generates_the_same(session: Session, bundle: Path) -> None:
    """Up to the last slot of the pot, which is where it stops."""
    if session.manifest.runtime != "onnxruntime":
        pytest.skip("it runs ONNX graphs")
    prompt = novel(session, 488)
    stock = genai.generator(bundle, min_length=session.manifest.pot.slots)
    stock.append_tokens(prompt.astype(np.int32))
    while not stock.is_done():
        stock.generate_next_token()
    theirs = stock.get_sequence(0)[prompt.size :].tolist()
    assert len(theirs) == session.manifest.pot.slots - prompt.size
    session.feed(prompt)
    for token in theirs:
        logits = session.logits()
        logits[list(session.manifest.eos_token_ids)] = -np.inf  # as `min_length` has it
        assert logits.argmax() == token
        session.accept(token)
    assert session.stats.compressions == 0


@torch.no_grad()
@pytest.mark.parametrize(("policy", "compressions"), [("infinipot", 10), MORE])
def test_past_the_pot_equals_the_independent_reference(
    session: Session, model: Any, policy: str, compressions: int
) -> None:
    """All layers and heads: the same slots, and the logits after them."""
    ids = novel(session, 512 + compressions * 256 + 1)
    session.policy = policy
    session.set_catalyst(QUESTION)
    kept: list[np.ndarray[Any, Any]] = []
    session.on_compress = lambda slots: kept.append(np.stack([each.copy() for each in slots]))
    session.feed(ids)
    mine = session.logits()
    pot = session.manifest.pot
    oracle = Reference(
        model,
        slots=pot.slots,
        chunk=pot.chunk,
        keep=pot.keep,
        keep_max=pot.keep_max,
        sink=pot.sink,
        recent=pot.recent,
        policy=policy,
        settings=session.manifest.policy_of(policy).settings,
        positions=pot.positions,
        widest=pot.widest,
        catalyst=session.catalyst.tolist(),
    )
    wanted = oracle.read(ids.tolist())
    assert len(kept) == len(oracle.kept) >= compressions
    for number, (one, other) in enumerate(zip(kept, oracle.kept, strict=True)):
        assert np.array_equal(one, torch.stack(other).numpy()), f"compression {number}"
    assert set(oracle.resets) == {False, True}
    assert np.abs(mine - wanted.numpy()).max() <= tolerances.REAL_PAST

"""Each peer reads as our own session does: the same model, the same tokens, the same next one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potexport import peers
from potexport.benching.forms import Forms
from potexport.benching.ours import Ours, party
from potexport.bundle import read
from potexport.peers import Reader
from potexport.runtime.ids import Ids
from tests import tiny
from tests.e2e.helpers import Cli
from tests.unit.checkpoints import TOKENS, byte_level_facts, write_gguf

FITS = 30  # tokens: nothing is compressed


def _then(reader: Reader, ids: Ids) -> list[int]:
    """The next token, after a prompt, after more, after going back, and after a new beginning."""
    reader.reset()
    reader.read(ids[:20])
    found = [reader.following()]
    reader.mark()
    found += [reader.step(int(token)) for token in ids[20:25]]
    reader.back()
    found += [reader.step(int(token)) for token in ids[25:FITS]]
    reader.reset()
    reader.read(ids[FITS : FITS + 10])
    reader.read(ids[FITS + 10 : FITS + 20])
    return [*found, reader.following()]


@pytest.fixture(scope="module")
def ids() -> Ids:
    return np.random.default_rng(1).integers(3, len(TOKENS), 2 * FITS).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of float32, with sizes that every peer takes."""
    sizes = {"vocab_size": len(TOKENS), "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    made = tiny.model("llama-tied", **sizes, intermediate_size=96, num_hidden_layers=2)
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_gguf(path, byte_level_facts(), made)
    return path


@pytest.fixture(scope="module")
def bundle(cli: Cli, model: Path, pot_options: list[str]) -> Path:
    folder = model.with_name("tiny.bundle")
    result = cli("build", model, "-o", folder, *pot_options, "--policy", "infinipot")
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def forms(model: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(str(model), tmp_path_factory.mktemp("cache"), read(bundle).model)


@pytest.mark.parametrize("name", ["transformers", "onnxruntime-genai-fp32", "llama-cpp"])
def test_a_peer_says_the_same_tokens(name: str, forms: Forms, bundle: Path, ids: Ids) -> None:
    peer = peers.load(name)
    if peers.version(name) is None:
        pytest.skip(f"pip install {peer.package}")
    prepared = peer.prepare(forms, context=FITS)
    theirs = peer.open(prepared, threads=1, context=FITS)
    assert _then(theirs, ids) == _then(Ours(bundle, 1), ids)
    ours = party(bundle)
    # The same weights, of which each token reads the same, and the same products but the head's.
    assert prepared.weights == pytest.approx(ours.weights, rel=0.05)
    assert ours.work is not None
    assert prepared.work <= ours.work

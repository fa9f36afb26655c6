"""Pots that the graphs write in place, by ONNX Runtime's fused attention: heads of 16, which it
takes, where the other tests of families have odd ones.

Each has something else between its projections and that attention.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from potexport import bundle
from potexport.runtime.session import Session
from tests.families import genai
from tests.families.proof import Proof
from tests.parity import tolerances
from tests.parity.test_loop import tokens
from tests.thorough import cases
from tests.tiny import FULL

HEADS = {"head_dim": 16}
BY_WIDTH = {"hidden_size": 96}  # of families that divide it among six heads
ALL = {"layer_types": [FULL, FULL]}
# What of the attention of a decode step is one operator: "packed" takes the joined product.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (HEADS, "packed"),
    "llama-bias": (HEADS, "packed"),
    "llama3-rope": (HEADS, "packed"),
    "qwen2": (HEADS, "packed"),
    "mixtral": ({**BY_WIDTH, **HEADS}, "packed"),
    "qwen3": (HEADS, "attention"),  # norms of each head
    "smollm3": ({**BY_WIDTH, "no_rope_layers": [1, 0]}, "packed"),
    "cohere": (BY_WIDTH, "attention"),  # turns neighbours
    "phi": (BY_WIDTH, "attention"),  # turns a part
    "gemma": (HEADS, "packed"),
    "gemma2": ({**HEADS, **ALL}, "packed"),  # a soft cap
    "gpt-oss": ({**HEADS, **ALL}, "attention"),  # sinks; turns halves in words of its own
}


# What they have of their own, another family of these has too.
MORE = ("llama-bias", "qwen2", "gemma", "cohere")


@pytest.mark.parametrize("family", cases(CASES, rare=MORE))
def test_a_family_with_heads_of_16(family: str, tmp_path: Path) -> None:
    sizes, fused = CASES[family]
    proof = Proof.build(family, tmp_path, layers=2, sizes=sizes)
    assert bundle.read(proof.bundle).in_place
    fits = proof.fits()
    past, compressions = proof.past()
    assert compressions >= 10
    assert fits <= tolerances.FAMILY
    assert past <= tolerances.FAMILY
    assert "RotaryEmbedding" in {node.op_type for node in nodes_of(proof.bundle / "compress.onnx")}
    nodes = nodes_of(proof.bundle / "decode.onnx")
    assert Counter(node.op_type for node in nodes)["GroupQueryAttention"] == 2
    packed = [node.op_type == "GroupQueryAttention" and node.input[1] == "" for node in nodes]
    assert any(packed) == (fused == "packed")
    assert genai.worst(proof.bundle) <= tolerances.FAMILY


def nodes_of(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path, load_external_data=False).graph.node)


def test_saved_and_forked_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Over compressions with resets and without."""
    sizes, _ = CASES["llama"]
    proof = Proof.build("llama", tmp_path, layers=2, sizes=sizes)
    first = Session.open(proof.bundle, threads=1)
    first.feed(tokens(100))
    first.save(tmp_path / "it.pot")
    second = Session.open(proof.bundle, threads=1)
    second.load(tmp_path / "it.pot")
    fork = first.fork()
    wanted = read_on(first)
    assert read_on(second) == wanted
    assert read_on(fork) == wanted


def test_pinned_tokens_stay_as_sinks_do(tmp_path: Path) -> None:
    sizes, _ = CASES["llama"]
    proof = Proof.build("llama", tmp_path, layers=2, sizes=sizes)
    worst, compressions = proof.past(pinned=11)
    assert worst <= tolerances.FAMILY
    assert compressions >= 10


def read_on(session: Session) -> tuple[list[int], bytes, int]:
    session.feed(tokens(250))
    generated = [token.id for token in session.generate(max_new_tokens=20)]
    keys = session.backend.pot.keys[1][..., : session.backend.pot.fill]
    return generated, np.ascontiguousarray(keys).tobytes(), session.stats.compressions

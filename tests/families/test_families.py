"""Every family, on both runtimes and on the NPU's emulator, against transformers and the oracle.

Attention sinks do not exist in random weights: this proves plumbing, not quality. What is measured
here goes into docs/models.md (`make models`); for every commit a part of it runs, `RARE` left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potexport import coverage
from potexport.runtime.session import Session
from potexport.targets import android_npu
from tests import tiny
from tests.families.proof import Proof
from tests.parity import tolerances
from tests.parity.conftest import RUNTIMES
from tests.parity.test_loop import CATALYST, difference, tokens
from tests.reference_families import Turning

# Told from others by numbers and names alone; and what takes an approximation on ExecuTorch.
RARE = {"llama-tied", "llama-bias", "qwen2-windows", "olmoe", "seed_oss", "arcee", "apertus"}
RARE |= {"ministral", "helium", "ernie4_5", "exaone4", "glm"}
Record = Callable[[str, object], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" not in metafunc.fixturenames:
        return
    every = metafunc.config.getoption("--all-families")
    families = [name for name in tiny.FAMILIES if every or name not in RARE]
    metafunc.parametrize("family", families)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_family(family: str, runtime: str, tmp_path: Path, record_property: Record) -> None:
    proof = Proof.build(family, tmp_path, runtime=runtime)
    fits = proof.fits()
    past, compressions = proof.past()
    found: dict[str, Any] = {"fits": fits, "past": past, "compressions": compressions}
    if runtime == "onnxruntime":
        found |= {"traits": proof.traits(), "npu": _on_npu(proof)}
    record_property("family", {"family": family, "runtime": runtime, **found})
    within = tolerances.FAMILY if _is_exact(family, runtime) else tolerances.GELU
    assert compressions >= 10
    assert fits <= within
    assert past <= within
    if "npu" in found and found["npu"] is not None:
        assert not any(found["npu"]["refused"].values()), found["npu"]
        assert found["npu"]["error"] <= tolerances.FAMILY_NPU


def _is_exact(family: str, runtime: str) -> bool:
    return runtime == "onnxruntime" or "gelu" not in _activation(family)


def _activation(family: str) -> str:
    config: Any = tiny.FAMILIES[family].make(vocab_size=300).config
    names = ("hidden_activation", "hidden_act", "activation")
    return next(str(value) for name in names if (value := getattr(config, name, None)))


def _on_npu(proof: Proof) -> dict[str, Any] | None:
    """What the HTP's compiler said to the four graphs; None where it is not installed."""
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        return None
    (soc,) = android_npu.TARGET.chips(["sm8650"])
    found = coverage.report(proof.bundle, soc)
    return {
        "soc": soc.name,
        "refused": {each.graph: [str(node) for node in each.refused] for each in found.placements},
        "error": max(layer.error for depth in found.depths for layer in depth.layers),
    }


def test_a_broken_oracle_is_told_apart(tmp_path: Path) -> None:
    """Were these to agree, the test above could not fail."""
    proof = Proof.build("gemma3", tmp_path)
    session = Session.open(proof.bundle, threads=1)
    session.set_catalyst(CATALYST)
    session.feed(tokens())
    mine = session.logits()
    assert difference(mine, proof.oracle().read(tokens().tolist())) <= tolerances.FAMILY
    wrong: list[dict[str, Any]] = [
        {"mask_off_by_one": True},
        {"no_reset": True},
        {"swap_keys_values": True},
        {"turning": Turning("interleaved", by_type=True)},
    ]
    for change in wrong:
        wanted = proof.oracle(**change).read(tokens().tolist())
        assert difference(mine, wanted) > 100 * tolerances.FAMILY, change

"""Every family, on both runtimes and on the NPU's emulator, against transformers and the oracle.

Attention sinks do not exist in random weights: this proves plumbing, not quality. What is measured
here goes into docs/models.md (`make models`); of every commit COMMON are run, with two layers and
without what each gives on the emulator.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potexport import bundle, coverage, htp
from potexport.runtime.session import Session
from potexport.targets import android_npu
from tests import tiny
from tests.families.proof import Proof
from tests.parity import tolerances
from tests.parity.conftest import RUNTIMES
from tests.parity.test_loop import CATALYST, difference, tokens
from tests.reference_families import Turning
from tests.thorough import cases

# Of every commit's tests: each has something that none before it has.
COMMON = {"llama", "llama3-rope", "mistral", "mixtral", "qwen2", "qwen3", "smollm3", "gemma2",
          "gemma3", "phi3", "phi4-mini", "granite", "olmo2", "stablelm", "gpt-neox", "glm4",
          "cohere", "falcon"}  # fmt: skip
# Of those, in ExecuTorch, whose builds are slow: where a graph differs most from Llama's, which
# tests/parity has in both runtimes; the others by `make test-all`.
OFTEN = {"mixtral", "gemma3", "glm4", "gpt-neox"}
Record = Callable[[str, object], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "family" not in names:
        return
    every = metafunc.config.getoption("--all-families")
    families = [name for name in tiny.FAMILIES if every or name in COMMON]
    if "runtime" not in names:
        metafunc.parametrize("family", families)
        return
    rare = [] if every else [(each, "executorch") for each in families if each not in OFTEN]
    metafunc.parametrize(
        ("family", "runtime"), cases(itertools.product(families, RUNTIMES), rare=rare)
    )


def test_a_family(
    family: str,
    runtime: str,
    tmp_path: Path,
    record_property: Record,
    pytestconfig: pytest.Config,
) -> None:
    deep = pytestconfig.getoption("--all-families")
    proof = Proof.build(family, tmp_path, layers=3 if deep else 2, runtime=runtime)
    fits = proof.fits()
    past, compressions = proof.past()
    found: dict[str, Any] = {"fits": fits, "past": past, "compressions": compressions}
    if runtime == "onnxruntime":
        found |= {"traits": proof.traits(), "npu": _on_npu(proof, deep=deep)}
    record_property("family", {"family": family, "runtime": runtime, **found})
    within = tolerances.FAMILY if _is_exact(family, runtime) else tolerances.GELU
    assert compressions >= 10
    assert fits <= within
    assert past <= within
    if found.get("npu"):
        assert not any(found["npu"]["refused"].values()), found["npu"]
        assert found["npu"]["error"] <= tolerances.FAMILY_NPU


def _is_exact(family: str, runtime: str) -> bool:
    return runtime == "onnxruntime" or "gelu" not in _activation(family)


def _activation(family: str) -> str:
    config: Any = tiny.FAMILIES[family].make(vocab_size=300).config
    names = ("hidden_activation", "hidden_act", "activation")
    return next(str(value) for name in names if (value := getattr(config, name, None)))


def _on_npu(proof: Proof, *, deep: bool) -> dict[str, Any] | None:
    """What the HTP's compiler said to the four graphs, a PotexportError if it refused a node; None
    where it is not installed. deep: also what each layer gives on its emulator."""
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        return None
    (soc,) = android_npu.TARGET.chips(["sm8650"])
    if not deep:
        graphs = list(bundle.read(proof.bundle).graphs)
        htp.compile_graphs(proof.bundle, graphs, soc, proof.bundle.parent / "htp", shared=True)
        return None
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

"""Tiny models, built and compiled once for the HTP, for the tests on its emulator.

Everything of Qualcomm's runs in child processes (`potexport.htp`); nothing here imports it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potexport import bundle, htp, loader, pipeline
from potexport.following import FollowingBackend
from potexport.graphs.model import PotModel
from potexport.graphs.policies._find import make_policy
from potexport.recording import Recording, record
from potexport.runtime.session import Session
from potexport.runtime.text import Text
from potexport.spec import Layout
from potexport.targets.android_npu import SOCS
from tests import tiny
from tests.parity.conftest import POT

SOC = SOCS[1]
CATALYST = [5, 9, 200, 33, 41]
READ, FORCED = 180, 120  # tokens: at least five compressions while reading, four while decoding


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("onnxruntime_qnn") is not None:
        return
    reason = "no NPU compiler here: pip install 'potexport[qnn]'"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True)
class Case:
    """A model folder, and the fp16 bundle of it that is compiled."""

    model: Path
    half: Path

    @property
    def graphs(self) -> list[str]:
        return list(bundle.read(self.half).graphs)

    @property
    def contexts(self) -> dict[str, Path]:
        return htp.contexts(self.half.parent / "contexts", self.graphs, SOC)

    def on_emulator(self) -> Recording:
        ids = tokens()
        return htp.read(self.half, self.contexts, ids[:READ], forced=ids[READ:], catalyst=CATALYST)

    @torch.no_grad()
    def follow(self, leader: Recording) -> Recording:
        """The same in fp32 PyTorch, which goes on with what the leader kept."""
        manifest = bundle.read(self.half)
        facts, pot, needs = manifest.model, manifest.pot, frozenset(manifest.policy.needs)
        model = loader.load_model(
            loader.resolve(str(self.model)), dtype=torch.float32, attn_implementation="sdpa"
        )
        policy = make_policy(manifest.policy.name, manifest.policy.settings)
        layout = Layout(facts, pot, needs)
        backend = FollowingBackend(PotModel(model, pot), policy, layout, leader)
        session = Session(manifest, backend, Text.open(str(self.half)))
        ids = tokens()
        return record(session, ids[:READ], forced=ids[READ:], catalyst=CATALYST)


def tokens() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(3, 280, READ + FORCED).astype(np.int32)


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    """`case(family, policy)`, built and compiled for SOC; the same arguments do it once."""
    made: dict[tuple[str, str], Case] = {}

    def maker(family: str, policy: str) -> Case:
        if (family, policy) not in made:
            folder = tmp_path_factory.mktemp("npu")
            new = Case(folder / "model", folder / "half")
            tiny.save(new.model, family)
            asked = pipeline.Options(model=str(new.model), policy=policy, precision="fp16", **POT)
            pipeline.build(asked, new.half)
            htp.compile_graphs(new.half, new.graphs, SOC, folder / "contexts", shared=False)
            made[family, policy] = new
        return made[family, policy]

    return maker

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
from potexport.bundle import Manifest
from potexport.following import Oracle
from potexport.recording import Recording, record
from potexport.runtime.text import Text
from potexport.targets import android_npu
from tests import tiny

(SOC,) = android_npu.TARGET.chips(["sm8650"])
# More than eight tokens a chunk: the HTP lays tensors out in blocks of eight rows.
POT: dict[str, Any] = {
    "pot": 112,
    "chunk": 12,
    "keep": 56,
    "keep_max": 90,
    "catalyst_width": 10,
    "sink": 2,
    "recent": 5,
    "positions": 250,  # some compressions leave all in place, some move it to the front
}
# Pooling makes one near tie exchange a window of slots: 13 would be a quarter of these pots.
SETTINGS: dict[str, dict[str, Any]] = {"infinipot": {"pool": 3}}
CATALYST = [5, 9, 200, 33, 41]
READ, FORCED = 300, 120  # tokens: five compressions and more


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("onnxruntime_qnn") is not None:
        return
    reason = "no NPU compiler here: pip install 'potexport[qnn]'"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True)
class Case:
    """A model folder, the bundle of it for the NPU, and unshared contexts of the same graphs."""

    model: Path
    bundle: Path
    contexts: dict[str, Path]

    @property
    def manifest(self) -> Manifest:
        return bundle.read(self.bundle)

    def on_emulator(self) -> Recording:
        ids, (npu,) = tokens(), self.manifest.npu
        return htp.read(
            self.bundle,
            self.contexts,
            ids[:READ],
            embedding=npu.embedding,
            forced=ids[READ:],
            catalyst=CATALYST,
        )

    @property
    def oracle(self) -> Oracle:
        """The loop in fp32 PyTorch."""
        model = loader.load_model(
            loader.resolve(str(self.model)), dtype=torch.float32, attn_implementation="sdpa"
        )
        return Oracle.of(self.bundle, self.manifest, model, Text.open(str(self.bundle)))

    @torch.no_grad()
    def follow(self, leader: Recording) -> Recording:
        ids = tokens()
        return record(self.oracle.session(leader), ids[:READ], forced=ids[READ:], catalyst=CATALYST)


def tokens() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(3, 280, READ + FORCED).astype(np.int32)


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    """`case(family, policy)`, built and compiled for SOC; the same arguments do it once."""
    made: dict[tuple[str, str], Case] = {}

    def maker(family: str, policy: str) -> Case:
        if (family, policy) not in made:
            folder = tmp_path_factory.mktemp("npu")
            model = tiny.save(folder / "model", family)
            options = pipeline.Options(
                model=str(model),
                target="android-npu",
                soc=(SOC.name,),
                policy=policy,
                settings=SETTINGS.get(policy, {}),
                **POT,
            )
            graphs = list(pipeline.build(options, folder / "bundle").graphs)
            htp.compile_graphs(folder / "bundle", graphs, SOC, folder / "apart", shared=False)
            apart = htp.contexts(folder / "apart", graphs, SOC)
            made[family, policy] = Case(model, folder / "bundle", apart)
        return made[family, policy]

    return maker

"""Quantized bundles: what they share, what they keep exactly, and how near the loop stays to fp32.

All on the CPU, on the graphs as they are written; tests/npu holds the HTP against them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from potexport import bundle, loader, n_bit, pipeline, quantize
from potexport.errors import PotexportError
from potexport.following import Oracle
from potexport.graphs.model import PotModel
from potexport.graphs.policies._find import make_policy
from potexport.graphs.rope import turn_back
from potexport.quantize import MIDDLE
from potexport.recording import Comparison, Recording, compare, record
from potexport.runtime.session import Session
from potexport.store_onnx import layout as stored_layout
from tests import tiny
from tests.families import genai
from tests.parity.conftest import POT

WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16}  # w4's blocks
READ, FORCED = 150, 60
# Smallest of 60 positions' logits: measured 0.9996.
COSINE, COSINE_EIGHT, COSINE_BY_CHUNK = 0.999, 0.99, 0.8


@dataclass(frozen=True)
class Case:
    """A model folder and a quantized bundle of it."""

    model: Path
    folder: Path

    @property
    def weights(self) -> set[str]:
        return set(stored_layout(self.folder / "weights.safetensors"))

    def graph(self, name: str) -> onnx.GraphProto:
        return onnx.load(self.folder / f"{name}.onnx", load_external_data=False).graph

    def core(self) -> PotModel:
        model = loader.load_model(
            loader.resolve(str(self.model)), dtype=torch.float32, attn_implementation="eager"
        )
        manifest = bundle.read(self.folder)
        return PotModel(model, manifest.model, manifest.pot)

    def recorded(self) -> Recording:
        return _record(Session.open(self.folder))

    @torch.no_grad()
    def against(self, core: PotModel) -> Comparison:
        """The loop past some compressions, and PyTorch in fp32 that keeps the same slots."""
        mine, manifest = self.recorded(), bundle.read(self.folder)
        facts = manifest.policy
        policies = ((facts, make_policy(facts.name, facts.settings)),)
        oracle = Oracle(manifest, core, policies, Session.open(self.folder).text)
        return compare(mine, _record(oracle.session(mine)))


def _record(session: Session) -> Recording:
    ids = np.random.default_rng(1).integers(3, 280, READ + FORCED).astype(np.int32)
    return record(session, ids[:READ], forced=ids[READ:])


def build(
    folder: Path, family: str, precision: str, policy: str, *, soc: str | None = None, **sizes: Any
) -> None:
    """A tiny model in folder/model, calibrated on folder/text.txt, and folder/bundle of it.

    soc: for this chip's NPU, in place of a CPU.
    """
    (folder / "text.txt").write_text(tiny.TEXT * 3)
    tiny.save(folder / "model", family, **sizes)
    asked = pipeline.Options(
        model=str(folder / "model"),
        policy=policy,
        precision=precision,
        target="android-npu" if soc else "cpu",
        soc=(soc,) if soc else (),
        calibration=folder / "text.txt",
        **POT,
    )
    pipeline.build(asked, folder / "bundle")


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """`case(family, precision, policy, **sizes)`, built once."""
    made: dict[str, Case] = {}

    def maker(family: str, precision: str, policy: str = "infinipot", **sizes: Any) -> Case:
        key = repr((family, precision, policy, sizes))
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized")
            build(folder, family, precision, policy, **sizes)
            made[key] = Case(folder / "model", folder / "bundle")
        return made[key]

    return maker


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("llama", "infinipot"),
        ("llama-tied", "infinipot"),
        ("gemma3", "infinipot"),
        ("qwen3", "keydiff"),
        ("llama", "streaming"),
    ],
)
def test_the_loop_stays_near_fp32(case: Callable[..., Case], family: str, policy: str) -> None:
    here = case(family, "a16w8", policy)
    seen = here.against(here.core())
    assert seen.compressions >= 5
    assert seen.cosine >= COSINE, seen


def round_weights(model: nn.Module, bits_of_layers: int) -> None:
    """Give every linear layer the numbers that its codes stand for; the embedding keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bits = 8 if module.weight.shape[0] > 200 else bits_of_layers
            blocks = (n_bit.eight if bits == 8 else n_bit.four)(module.weight.numpy())
            module.weight = nn.Parameter(torch.from_numpy(n_bit.decoded(blocks, bits)))


@pytest.mark.parametrize(("precision", "bits"), [("w4", 4), ("w8", 8)])
def test_blocks_run_the_loop_too(precision: str, bits: int, case: Callable[..., Case]) -> None:
    """Against fp32 with the same rounded weights: what is left is activations in 8 bits."""
    here = case("llama-tied", precision, **WIDE)
    core = here.core()
    round_weights(core.model, bits)
    seen = here.against(core)
    assert seen.compressions >= 5
    assert seen.cosine >= COSINE_EIGHT, seen
    kinds = {node.op_type for node in here.graph("decode").node}
    assert "MatMulNBits" in kinds
    assert "Gemm" not in kinds  # the tied head too


def test_a_text_is_read_with_other_weights_than_it_is_generated_with(
    case: Callable[..., Case],
) -> None:
    """One scale for all tokens of a chunk is coarse where tiny models' weights are exaggerated."""
    here = case("llama-tied", "w4-w8", **WIDE)
    seen = here.against(here.core())
    assert seen.compressions >= 5
    assert seen.cosine >= COSINE_BY_CHUNK, seen
    products = {
        name: Counter(node.op_type for node in here.graph(name).node if "MatMul" in node.op_type)
        for name in ("prefill", "observe", "decode")
    }
    layers = 3
    assert (
        products["prefill"]["DynamicQuantizeMatMul"] == layers * 4 + 1
    )  # qkv, o, gate, up; the head
    assert products["prefill"]["MatMulNBits"] == layers  # down
    assert products["decode"]["DynamicQuantizeMatMul"] == 0


@pytest.mark.parametrize("precision", ["w4", "w4-w8"])
def test_onnxruntime_genai_has_the_weights_that_generate(
    precision: str, case: Callable[..., Case]
) -> None:
    """Token by token, bit for bit; a text that it reads in chunks is rounded otherwise."""
    folder = case("llama-tied", precision, **WIDE).folder
    assert genai.worst(folder, chunks=False) == 0
    assert not [name for name in Case(folder, folder).weights if name.startswith("genai")]


def test_weights_lie_in_the_bundle_once(case: Callable[..., Case]) -> None:
    """Each product's codes have one place, which all three graphs point to."""
    here = case("llama", "a16w8")
    places: dict[str, set[str]] = {}
    for name in ("prefill", "decode", "observe"):
        for tensor in here.graph(name).initializer:
            if tensor.name.endswith(".int8"):
                assert tensor.data_type == TensorProto.INT8
                place = {entry.key: entry.value for entry in tensor.external_data}
                places.setdefault(tensor.name, set()).add(json.dumps(place))
    assert len(places) == 3 * 7 + 1  # q, k, v, o, gate, up, down of each layer; the head
    assert all(len(found) == 1 for found in places.values())
    assert not [name for name in here.weights if "/" in name and ".int8" in name]
    assert not [name for name in here.weights if name.endswith(".weight.T")]


def test_one_scale_for_a_slots_whole_life(case: Callable[..., Case]) -> None:
    here = case("llama", "a16w8")
    found = [
        {
            tensor.name: float(numpy_helper.to_array(tensor))
            for tensor in here.graph(name).initializer
            if tensor.name.startswith("pot.")
        }
        for name in ("prefill", "decode", "compress")
    ]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2 * 3
    assert {spec.dtype for spec in bundle.read(here.folder).layout.past()} == {"uint16"}


def test_a_compression_moves_values_exactly_and_turns_keys_to_half_a_step(
    case: Callable[..., Case],
) -> None:
    here = case("llama", "a16w8", "streaming")
    session, turn = Session.open(here.folder), here.core().turn
    pot, chance = session.backend.pot, np.random.default_rng(0)
    for array in (*pot.keys, *pot.values):  # codes that no rotation takes out of the range
        array[:] = chance.integers(MIDDLE - 20000, MIDDLE + 20000, array.shape)
    pot.fill = pot.slots
    keys, values = ([array.copy() for array in each] for each in (pot.keys, pot.values))
    kept = session.backend.compress(session.manifest.pot.keep)
    for layer, slots in enumerate(kept):
        for head, chosen in enumerate(slots):
            count = chosen.size
            assert np.array_equal(
                pot.values[layer][0, head, :count], values[layer][0, head, chosen]
            )
            old = torch.from_numpy(keys[layer][0, head][:, chosen].astype(np.float32) - MIDDLE).T
            back = torch.from_numpy(chosen - np.arange(count))
            wanted = turn_back(old, turn[back]).numpy().T
            turned = pot.keys[layer][0, head, :, :count].astype(np.float32) - MIDDLE
            assert np.abs(turned - wanted).max() <= 0.51


def test_float_products_still_run(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "COARSE", 0.0)  # every product is too coarse, then
    here = case("mistral", "a16w8")
    assert not [name for name in here.weights if name.endswith(".int8")]
    assert here.against(here.core()).cosine >= 0.9999


def test_calibration_wants_a_text_and_enough_of_it(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model")
    asked: dict[str, Any] = {"model": str(model), "precision": "a16w8", **POT}
    with pytest.raises(PotexportError, match="give --calibration FILE"):
        pipeline.build(pipeline.Options(**asked), tmp_path / "bundle")
    text = tmp_path / "text.txt"
    with pytest.raises(PotexportError, match="cannot be read"):
        pipeline.build(pipeline.Options(**asked, calibration=text), tmp_path / "bundle")
    text.write_text("too short")
    with pytest.raises(PotexportError, match=r"has \d+ tokens; this pot needs 110"):
        pipeline.build(pipeline.Options(**asked, calibration=text), tmp_path / "bundle")
    with pytest.raises(PotexportError, match="needs --opset 21 or higher"):
        pipeline.build(pipeline.Options(**asked, calibration=text, opset=18), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()

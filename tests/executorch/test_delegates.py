"""Other delegates of ExecuTorch: what each takes of the graphs, and the loop where one runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from potexport import bundle as bundles
from potexport import pipeline, programs, targets
from potexport.errors import PotexportError
from potexport.graphs.compress import Compress
from potexport.graphs.model import PotModel
from potexport.graphs.policies.infinipot import InfiniPot
from potexport.runtime.executorch_backend import open_program
from potexport.runtime.session import Session
from tests import tiny
from tests.parity import tolerances
from tests.parity.conftest import POT
from tests.parity.test_loop import alike, difference, load, reference, tokens, watched

Runtime = pytest.importorskip("executorch.runtime", reason="it needs potexport[executorch]").Runtime

# Target -> the share of operators that its delegate takes of each model graph; measured 1.0.
FLOORS = {"intel": 1.0, "ios": 1.0, "android-gpu": 1.0}
# Vulkan's build is the slowest of all, and what cannot run here is Core ML's as well.
SLOW = pytest.param("android-gpu", marks=pytest.mark.thorough)
FOREIGN = ["ios", SLOW]  # compiled here, and nothing here can run them
READ = 200  # tokens, of which 48 fit: some 7 compressions
Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("delegates") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def built(model: Path) -> Built:
    """`built(target)` -> its bundle; each is built once, and skipped where its package is not."""
    made: dict[str, Path] = {}

    def builder(name: str) -> Path:
        target = targets.load(name, "executorch")
        if importlib.util.find_spec(str(target.package)) is None:
            pytest.skip(f"{target.package} is not installed")
        if name not in made:
            asked = pipeline.Options(
                model=str(model), target=name, runtime="executorch", policy="infinipot", **POT
            )
            made[name] = model.parent / name
            pipeline.build(asked, made[name])
        return made[name]

    return builder


@pytest.mark.parametrize("name", ["intel", "ios", SLOW])
def test_a_delegate_takes_the_model_graphs_in_one_piece(built: Built, name: str) -> None:
    bundle = built(name)
    manifest, delegate = bundles.read(bundle), targets.load(name, "executorch").delegate
    assert manifest.program is not None
    assert delegate is not None
    assert (bundle / manifest.weights).stat().st_size > 100_000
    assert manifest.program.delegate == delegate.name
    shares = dict(manifest.program.methods)
    assert shares.pop("compress").delegated == 0
    for graph, share in shares.items():
        assert share.pieces == 1, graph
        assert share.delegated >= FLOORS[name] * share.operators > 50, graph


def test_openvino_past_the_pot_equals_the_independent_reference(built: Built, model: Path) -> None:
    session, kept = watched(built("intel"))
    session.feed(tokens(READ))
    oracle = reference(load(model))
    wanted = oracle.read(tokens(READ).tolist())
    assert difference(session.logits(), wanted) <= tolerances.PAST
    assert len(kept) >= 5
    assert alike(kept, oracle.kept)
    assert set(oracle.resets) == {False, True}


def test_openvino_is_told_apart_from_a_broken_reference(built: Built, model: Path) -> None:
    session, _ = watched(built("intel"))
    session.feed(tokens(READ))
    wanted = reference(load(model), no_reset=True).read(tokens(READ).tolist())
    assert difference(session.logits(), wanted) > 100 * tolerances.PAST


@pytest.mark.parametrize("name", FOREIGN)
def test_what_cannot_run_here_says_where_it_can(built: Built, name: str) -> None:
    bundle = built(name)
    delegate = targets.load(name, "executorch").delegate
    assert delegate is not None
    with pytest.raises(PotexportError, match=f"no {delegate.name}, which the bundle for {name}"):
        Session.open(bundle)


def test_executorchs_own_kernels_compress_in_half_precision(built: Built, model: Path) -> None:
    """What runs beside Core ML, as it would there: the same slots and the same bits as PyTorch."""
    bundle = built("ios")
    layout = bundles.read(bundle).layout
    spec, core = layout.graphs()["compress"], PotModel(load(model), layout.facts, layout.pot)
    random = torch.Generator().manual_seed(0)
    given = []
    for tensor in spec.inputs:
        whole = torch.rand(tensor.shape, generator=random).to(programs.DTYPES[tensor.dtype])
        numbers = {"past_seq_len": POT["pot"] - 3, "keep": POT["keep"]}
        fixed = numbers.get(tensor.name)
        given.append(whole if fixed is None else torch.full_like(whole, fixed))
    squeeze = Compress(InfiniPot(), layout.pot, core.turns)
    wanted = programs.trace(squeeze, spec).module()(*given)
    method = open_program(bundle / "model.pte").load_method("compress")
    for tensor, one, other in zip(spec.outputs, method.execute(given), wanted, strict=True):
        assert torch.equal(one, other), tensor


def test_a_bundle_for_openvino_without_it_is_one_line(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, registry = built("intel"), type(Runtime.get().backend_registry)
    monkeypatch.setattr(registry, "is_available", lambda _self, _name: False)
    with pytest.raises(
        PotexportError, match=r"needs the package openvino; .*potexport\[openvino\]"
    ):
        Session.open(bundle)


@pytest.mark.parametrize("root", [None, "nowhere"])
def test_qualcomm_without_its_sdk_is_one_line(model: Path, root: str | None) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "QNN_SDK_ROOT"}
    options = ["--target", "android-npu", "--runtime", "executorch", "--soc", "sm8650"]
    done = subprocess.run(
        [sys.executable, "-m", "potexport", "build", model, "-o", model.parent / "x", *options],
        env=clean if root is None else {**clean, "QNN_SDK_ROOT": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("potexport:")]
    assert "needs Qualcomm's QAIRT SDK 2.37" in line
    assert "Traceback" not in done.stderr
    assert not (model.parent / "x").exists()


def test_a_program_is_for_one_chip(model: Path) -> None:
    """Said before anything is looked for that may not be installed."""
    asked = pipeline.Options(
        model=str(model), target="android-npu", runtime="executorch", soc=("sm8550", "sm8650")
    )
    with pytest.raises(PotexportError, match="one chip; give one --soc"):
        pipeline.build(asked, model.parent / "x")


def test_a_delegate_without_its_package_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else found(name)
    )
    asked = pipeline.Options(model=str(model), target="intel", runtime="executorch")
    with pytest.raises(
        PotexportError, match=r"needs the package openvino; .*potexport\[openvino\]"
    ):
        pipeline.build(asked, model.parent / "x")

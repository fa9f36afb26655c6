"""One program: what it tells ExecuTorch's tools, what it stores once, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from potexport import bundle, folders, pipeline, store_executorch
from potexport.errors import PotexportError
from potexport.quantize_torchao import GROUP, PackedEmbedding, w4
from potexport.reference import TorchBackend
from potexport.runtime import executorch_backend
from potexport.runtime.session import Session
from tests import tiny

POT: dict[str, Any] = {"pot": 48, "chunk": 8, "keep": 23, "catalyst_width": 7, "sink": 2}
POT["policy"] = "infinipot"


def build(folder: Path, *, family: str = "llama-tied", **options: Any) -> Path:
    sizes = options.pop("sizes", {})
    tiny.save(folder / "model", family, num_hidden_layers=2, **sizes)
    asked = pipeline.Options(
        model=str(folder / "model"), runtime="executorch", **{**POT, **options}
    )
    pipeline.build(asked, folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing tied, and a policy that scores by nothing: no observe."""
    return build(tmp_path_factory.mktemp("plain"), family="llama", policy="streaming")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def resealed(folder: Path, **changes: Any) -> Path:
    """The bundle with another manifest, and digests that fit."""
    manifest = replace(bundle.read(folder), **changes)
    (folder / bundle.MANIFEST).unlink()
    folders.seal(folder, manifest)
    return folder


def test_constant_methods_say_what_the_manifest_says(made: Path) -> None:
    program = executorch_backend.open_program(made / "model.pte")
    pot = bundle.read(made).pot

    def told(name: str) -> Any:
        return program.load_method(name).execute(())

    assert told("get_max_context_len") == [pot.slots]
    assert told("get_max_seq_len") == [pot.chunk]
    assert told("get_vocab_size") == [bundle.read(made).model.vocab_size]
    assert (told("get_bos_id"), told("get_eos_ids")) == ([1], [2])
    assert (told("use_kv_cache"), told("enable_dynamic_shape")) == ([True], [False])
    geometry = ("keep", "keep_max", "catalyst_width", "sink", "recent")
    assert [told(f"get_pot_{name}") for name in geometry] == [[getattr(pot, n)] for n in geometry]


def test_a_tied_embedding_is_stored_once(made: Path) -> None:
    manifest = bundle.read(made)
    assert manifest.program is not None
    table = manifest.model.vocab_size * tiny.SIZES["hidden_size"] * 4
    assert manifest.program.shared == table
    rows = np.fromfile(made / "model.pte", np.uint8).tobytes()
    model = tiny.model("llama-tied", num_hidden_layers=2)
    embedding: Any = model.get_input_embeddings()
    assert rows.count(embedding.weight.numpy().tobytes()) == 1


def test_nothing_is_shared_where_nothing_is_tied(plain: Path, tmp_path: Path) -> None:
    program = Path(shutil.copy(plain / "model.pte", tmp_path / "model.pte"))
    before = program.read_bytes()
    assert store_executorch.share_bytes(program) == 0
    assert program.read_bytes() == before


def test_every_product_of_the_model_graphs_is_the_delegates(made: Path) -> None:
    program = bundle.read(made).program
    assert program is not None
    assert program.delegate == "XnnpackBackend"
    for name in ("prefill", "decode", "observe"):
        method = program.methods[name]
        assert method.delegated / method.operators > 0.7, name  # of two layers; 0.9 of thirty
        assert method.pieces <= 3, name


def test_the_pot_is_not_copied_into_the_program(made: Path) -> None:
    """Its inputs are not part of the program's planned memory."""
    program = executorch_backend.open_program(made / "model.pte")
    meta = program.metadata("decode")
    assert not any(meta.input_tensor_meta(i).is_memory_planned() for i in range(meta.num_inputs()))


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), odd=st.booleans(), seed=st.integers(0, 99))
def test_a_packed_embedding_holds_the_nearest_of_its_steps(
    rows: int, groups: int, odd: bool, seed: int
) -> None:
    columns = groups * GROUP + (2 if odd else 0)
    torch.manual_seed(seed)
    table = nn.Embedding(rows, columns, _weight=torch.randn(rows, columns))
    packed = PackedEmbedding(table)
    found = packed(torch.arange(rows, dtype=torch.int32)[None])[0]
    size = GROUP if columns % GROUP == 0 else columns
    step = packed.scales.repeat_interleave(size, dim=1)
    error = (found - table.weight).abs()
    # The largest positive number may be a whole step off: 4 bits go from -8 to 7.
    assert bool((error <= step * 1.001).all())
    assert float((error <= step * 0.501).float().mean()) > 0.9
    assert packed.packed.shape == (rows, columns // 2)


# Rows of 96 and 128 all, and some of 60.
@pytest.mark.parametrize("head_size", [pytest.param(16, marks=pytest.mark.thorough), 10])
def test_8da4w_is_torchaos_own_arithmetic(tmp_path: Path, head_size: int) -> None:
    """The program against the same quantized modules in PyTorch, and both against fp32."""
    sizes = {"hidden_size": 96, "intermediate_size": 128, "head_dim": head_size}
    folder = build(tmp_path, precision="w4", sizes=sizes)
    session = Session.open(folder, threads=1)
    ids = np.random.default_rng(1).integers(3, 280, 40).astype(np.int32)

    def logits(quantize: bool) -> Any:
        from potexport.graphs.model import PotModel
        from potexport.graphs.policies._find import make_policy

        model = tiny.model("llama-tied", num_hidden_layers=2, **sizes)
        manifest = session.manifest
        core = PotModel(model, manifest.model, manifest.pot)
        if quantize:
            w4(model)
        facts = manifest.policy
        policies = [(facts, make_policy(facts.name, facts.settings))]
        backend = TorchBackend(core, policies, manifest.layout)
        eager = Session(manifest, backend, session.text)
        eager.feed(ids)
        return eager.logits()

    session.feed(ids)
    mine, own, exact = session.logits(), logits(quantize=True), logits(quantize=False)

    def off(one: Any, other: Any) -> float:
        return float(np.abs(one - other).max() / np.abs(exact).max())

    assert off(mine, own) < off(own, exact) / 5


def test_a_missing_package_is_one_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch_backend, "_BINDING", [])
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(PotexportError, match=r"pip install 'potexport\[executorch\]'"):
        Session.open(made)


def test_behind_qualcomms_library_it_is_refused_and_does_not_crash(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch_backend, "_BINDING", [])
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", ModuleType("onnxruntime_qnn"))
    monkeypatch.delitem(sys.modules, "executorch")
    with pytest.raises(PotexportError, match=r"comes second.*process of its own"):
        Session.open(made)


def test_an_older_executorch_than_the_bundles_is_refused(copy: Path) -> None:
    tools = {**bundle.read(copy).tools, "executorch": "99.1.0"}
    with pytest.raises(PotexportError, match=r"built with ExecuTorch 99\.1\.0 .*==99\.1\.0"):
        Session.open(resealed(copy, tools=tools))


def test_a_delegate_that_this_runtime_lacks_is_refused(copy: Path) -> None:
    program = bundle.read(copy).program
    assert program is not None
    with pytest.raises(PotexportError, match=r"has no CoreMLBackend.*XnnpackBackend.*--target cpu"):
        Session.open(resealed(copy, program=replace(program, delegate="CoreMLBackend")))


def test_a_program_without_a_method_is_refused(copy: Path, plain: Path) -> None:
    shutil.copy(plain / "model.pte", copy / "model.pte")
    with pytest.raises(PotexportError, match=r"prefill has|lacks the method observe"):
        Session.open(resealed(copy))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _other(path: Path) -> None:
    path.write_bytes(b"no program" * 100)


@pytest.mark.parametrize("damage", [_cut, _other])
def test_a_damaged_program_is_refused(copy: Path, damage: Callable[[Path], None]) -> None:
    damage(copy / "model.pte")
    with pytest.raises(PotexportError, match=r"not a program that ExecuTorch .* reads"):
        Session.open(resealed(copy))


def test_there_is_no_other_processor(made: Path) -> None:
    asked: list[dict[str, Any]] = [{"backend": "npu"}, {"soc": "sm8650"}]
    for options in asked:
        opening = partial(Session.open, made, **options)
        with pytest.raises(PotexportError, match="for ExecuTorch and XnnpackBackend"):
            opening()


def test_the_manifest_names_the_file_of_every_graph(made: Path) -> None:
    document = json.loads((made / bundle.MANIFEST).read_text())
    assert {graph["file"] for graph in document["graphs"].values()} == {"model.pte"}
    document["graphs"]["decode"]["file"] = "decode.onnx"
    (made.parent / "wrong").mkdir()
    (made.parent / "wrong" / bundle.MANIFEST).write_text(json.dumps(document))
    with pytest.raises(PotexportError, match=r"not in model\.pte"):
        bundle.read(made.parent / "wrong")

"""The compiler and its process: every chip, shared weights, and every way in which it can end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from potexport import htp, npu_graphs
from potexport.errors import PotexportError
from potexport.parity import Report
from potexport.targets import Soc, android_npu, windows_npu
from tests.npu.conftest import CATALYST, SOC, Case, tokens

Make = Callable[[str, str], Case]
CHIPS = [*android_npu.TARGET.socs, *windows_npu.TARGET.socs]


@pytest.mark.parametrize("soc", CHIPS, ids=lambda soc: soc.name)
@torch.no_grad()
def test_each_graph_on_every_chip(case: Make, soc: Soc, tmp_path: Path) -> None:
    """Compiled with no node left over, and near PyTorch on that chip's emulator."""
    here = case("qwen3", "infinipot")
    graphs = list(here.manifest.graphs)
    done = htp.compile_graphs(here.bundle, graphs, soc, tmp_path, shared=False)
    assert [each.graph for each in done] == graphs
    for each in done:
        assert each.bytes == sum(
            (tmp_path / name).stat().st_size
            for name in (f"{each.graph}.{soc.name}.onnx", f"{each.graph}.{soc.name}_qnn.bin")
        )
        assert each.nodes["TopK" if each.graph == "compress" else "MatMul"] > 0
    # Three layers: two norms and two of heads each, and the last; observe ends with its mass.
    assert [each.rewrites["RMS norms fused"] for each in done] == [13, 13, 11, 0]
    assert [each.rewrites["norms of heads as rows"] for each in done] == [6, 6, 6, 0]
    assert [each.rewrites["embeddings left to the host"] for each in done] == [1, 1, 1, 0]
    report = Report("", "", "fp16")
    (npu,), files = here.manifest.npu, htp.contexts(tmp_path, graphs, soc)
    npu_graphs.check(
        report, here.bundle, npu, files, here.oracle.session(), tokens(), np.array(CATALYST)
    )
    assert [check.name for check in report.checks] == [
        "npu prefill: new rows",
        "npu prefill: novelty",
        "npu decode: new rows",
        "npu decode: logits",
        "npu observe: mass",
        "npu compress: kept",
    ]
    assert report.passed, report.checks


@torch.no_grad()
def test_a_wrong_graph_is_found(case: Make, tmp_path: Path) -> None:
    """The mask of decode taken off: free slots are attended to, and only its checks fail."""
    here = case("qwen3", "infinipot")
    broken = Path(shutil.copytree(here.bundle, tmp_path / "broken"))
    model = onnx.load(broken / "decode.onnx", load_external_data=False)
    hidden = float(np.finfo(np.float16).min) / 4
    for constant in model.graph.initializer:
        if constant.data_location != onnx.TensorProto.EXTERNAL:
            array = onnx.numpy_helper.to_array(constant)
            if array.size == 1 and float(array.reshape(-1)[0]) == hidden:
                constant.CopyFrom(onnx.numpy_helper.from_array(array * 0, constant.name))
    onnx.save(model, broken / "decode.onnx")
    htp.compile_graphs(broken, ["prefill", "decode", "compress"], SOC, tmp_path, shared=False)
    files = htp.contexts(tmp_path, ["prefill", "decode", "compress"], SOC)
    report = Report("", "", "fp16")
    (npu,) = here.manifest.npu
    npu_graphs.check(
        report, broken, npu, files, here.oracle.session(), tokens(), np.array(CATALYST)
    )
    failed = {check.name for check in report.checks if not check.passed}
    assert failed == {"npu decode: new rows", "npu decode: logits"}


def test_a_second_compile_replaces_what_was_there(case: Make, tmp_path: Path) -> None:
    """A stale context must neither stop the compiler nor survive it."""
    here = case("llama", "infinipot")
    stale = tmp_path / htp.context_file("compress", SOC)
    stale.write_bytes(b"stale")
    stale.with_name(f"{stale.stem}_qnn.bin").write_bytes(b"stale")
    htp.compile_graphs(here.bundle, ["compress"], SOC, tmp_path, shared=False)
    assert b"EPContext" in stale.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        stale.name,
        f"{stale.stem}_qnn.bin",
    ]


def with_an_erf(folder: Path) -> Path:
    """Give a bundle's decode graph an operator that the HTP does not take."""
    model = onnx.load(folder / "decode.onnx", load_external_data=False)
    logits = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == logits else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Erf", ["before"], [logits], name="culprit"))
    onnx.save(model, folder / "decode.onnx")
    return folder


def test_a_refused_node_is_named_and_nothing_changes(case: Make, tmp_path: Path) -> None:
    here = case("llama", "infinipot")
    broken = with_an_erf(Path(shutil.copytree(here.bundle, tmp_path / "broken")))
    output = tmp_path / "out"
    output.mkdir()
    (output / htp.context_file("decode", SOC)).write_bytes(b"older")
    before = sorted(path.name for path in broken.iterdir())
    with pytest.raises(PotexportError, match=r"refuses 1 nodes of graph decode: Erf culprit"):
        htp.compile_graphs(broken, ["compress", "decode"], SOC, output, shared=False)
    assert [path.name for path in output.iterdir()] == [htp.context_file("decode", SOC)]
    assert (output / htp.context_file("decode", SOC)).read_bytes() == b"older"
    assert sorted(path.name for path in broken.iterdir()) == before


def test_a_compile_that_takes_too_long_is_stopped(case: Make, tmp_path: Path) -> None:
    here = case("llama", "infinipot")
    with pytest.raises(PotexportError, match="compiling graph decode for sm8650 took more"):
        htp.compile_graphs(here.bundle, ["decode"], SOC, tmp_path, shared=False, timeout=0.01)
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_cannot_take_the_chip_is_a_sentence(case: Make, tmp_path: Path) -> None:
    here, unknown = case("llama", "infinipot"), replace(SOC, soc_model=65000)
    with pytest.raises(PotexportError, match="graph compress"):
        htp.compile_graphs(here.bundle, ["compress"], unknown, tmp_path, shared=False)
    assert not list(tmp_path.iterdir())


def test_a_crash_is_a_sentence(case: Make) -> None:
    """Loading contexts that share weights crashes the emulator: the surest crash there is."""
    here = case("llama", "infinipot")
    (npu,) = here.manifest.npu
    files = htp.contexts(here.bundle, list(npu.contexts), SOC)
    ids = np.array([5, 6, 7], np.int32)
    with pytest.raises(PotexportError, match="the loop crashed the process"):
        htp.read(here.bundle, files, ids, embedding=npu.embedding, forced=ids)


def test_a_stale_context_is_a_sentence(case: Make, tmp_path: Path) -> None:
    here = case("llama", "infinipot")
    files = {}
    for graph, path in here.contexts.items():
        files[graph] = Path(shutil.copy(path, tmp_path))
        binary = path.with_name(f"{path.stem}_qnn.bin").read_bytes()
        (tmp_path / f"{path.stem}_qnn.bin").write_bytes(binary[:100] + bytes(len(binary) - 100))
    with pytest.raises(PotexportError, match=r"cannot load .*build the bundle again|crashed"):
        htp.run(files, {graph: {} for graph in files})

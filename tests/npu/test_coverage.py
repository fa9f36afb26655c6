"""The coverage report on the emulator: sound bundles are marked nowhere, planted faults named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from potexport import bundle, coverage, folders, pipeline
from potexport.cli import cli
from potexport.errors import PotexportError
from potexport.targets import Soc
from tests import tiny
from tests.npu.conftest import POT, SOC, Case

Make = Callable[[str, str], Case]
LAYER = 1  # of three: the fault is neither in the first nor in the last
LOUD = 2000.0  # makes residuals of some thousands, whose squares leave fp16


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose residuals are above 255 behind every layer, as those of real models are."""
    folder = tmp_path_factory.mktemp("loud")
    made = tiny.model("llama")
    for name, weight in made.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(LOUD)
    made.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    asked = pipeline.Options(
        model=str(folder / "model"), precision="fp16", policy="infinipot", **POT
    )
    pipeline.build(asked, folder / "half")
    return folder / "half"


def _edited(source: Path, folder: Path, edit: Callable[[onnx.GraphProto], None]) -> Path:
    """A copy of a bundle, sealed again, whose `prefill` is changed."""
    copy = Path(shutil.copytree(source, folder / "edited"))
    model = onnx.load(copy / "prefill.onnx", load_external_data=False)
    edit(model.graph)
    model = onnx.shape_inference.infer_shapes(model)  # for the types of what is new
    onnx.save(model, copy / "prefill.onnx")
    manifest = bundle.read(source)
    (copy / bundle.MANIFEST).unlink()
    folders.seal(copy, manifest)
    return copy


def _square_by_product(graph: onnx.GraphProto) -> None:
    """x * x for x^2 in the first norm of LAYER: the same in fp32, and no norm to `lower_htp`, so
    that its squares are computed in fp16. (Two norms a layer.)"""
    norm = [node for node in graph.node if node.op_type == "Pow"][2 * LAYER]
    norm.op_type, norm.name = "Mul", "planted"
    norm.input[1] = norm.input[0]


def test_a_sound_bundle_is_marked_nowhere(case: Make) -> None:
    found = coverage.report(case("qwen3", "infinipot").bundle, SOC)
    assert found.passed
    graphs = ["prefill", "decode", "observe", "compress"]
    assert [each.graph for each in found.placements] == graphs
    for placement in found.placements:
        assert placement.refused == ()
        assert placement.became["TopK" if placement.graph == "compress" else "MatMul"]
    assert found.placements[0].became["RMSNormalization"] == {"RmsNorm": 13}
    for depth in found.depths:
        parts = [each.part for each in depth.layers]
        assert parts[:3] == ["layer 0", "layer 1", "layer 2"]
        assert parts[3:] == (["novelty"] if depth.graph == "prefill" else ["logits"])
        assert depth.broken is None
        assert depth.inside == ()
        assert all(0 < each.error < coverage.FLOOR for each in depth.layers)
        assert all(each.cosine > 0.9995 for each in depth.layers)
        assert len(depth.rows) == 3
        assert all(0 < error < coverage.FLOOR for error in depth.rows)
        assert depth.fill > POT["keep"]  # compressed once, and read on


def test_large_residuals_alone_are_no_fault(loud: Path) -> None:
    found = coverage.report(loud, SOC, graphs=["prefill"])
    assert found.passed
    assert found.depths[0].layers[0].largest > 255


@pytest.fixture(scope="module")
def planted(loud: Path, tmp_path_factory: pytest.TempPathFactory) -> coverage.Coverage:
    """Of a bundle with the fault in `prefill` alone."""
    broken = _edited(loud, tmp_path_factory.mktemp("planted"), _square_by_product)
    return coverage.report(broken, SOC, graphs=["prefill", "decode"])


def test_a_planted_overflow_is_named_layer_and_place(planted: coverage.Coverage) -> None:
    prefill, decode = planted.depths
    assert not planted.passed
    assert decode.broken is None
    assert prefill.broken == LAYER
    assert prefill.broken_inside is not None
    first = prefill.inside[prefill.broken_inside]
    assert (first.operator, first.part) == ("Mul", "to input_layernorm")
    assert first.largest > coverage.FP16_MAX
    parts = {each.part for each in prefill.inside}
    modules = {"input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"}
    assert {*modules, "post_attention_layernorm", "present.1.key", "residual"} <= parts


def test_keys_that_are_wrong_by_themselves_are_found(loud: Path, tmp_path: Path) -> None:
    """What leaves the graph may be wrong where no residual is."""
    key = "present.2.key"

    def through_a_square(graph: onnx.GraphProto) -> None:
        """|key|, as (900 key)^2 that leaves fp16, its root, and back."""
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["before" if name == key else name for name in names]
        for name, number in (("far", 900.0), ("back", 1 / 900)):
            graph.initializer.append(numpy_helper.from_array(np.array(number, np.float16), name))
        node = helper.make_node
        graph.node.append(node("Mul", ["before", "far"], ["off"], name="planted_off"))
        graph.node.append(node("Mul", ["off", "off"], ["square"], name="planted_square"))
        graph.node.append(node("Sqrt", ["square"], ["root"], name="planted_root"))
        graph.node.append(node("Mul", ["root", "back"], [key], name="planted_back"))

    broken = _edited(loud, tmp_path, through_a_square)
    (prefill,) = coverage.report(broken, SOC, graphs=["prefill"]).depths
    assert prefill.broken == 2
    assert prefill.layers[2].error < coverage.FLOOR < prefill.rows[2]
    assert prefill.broken_inside is not None
    assert prefill.inside[prefill.broken_inside].value == "square"


def test_a_refused_node_is_reported_by_name(loud: Path, tmp_path: Path) -> None:
    """It runs on the CPU then, and the rest is compared all the same."""

    def with_an_erf(graph: onnx.GraphProto) -> None:
        novelty = graph.output[-1].name
        for node in graph.node:
            node.output[:] = ["before" if name == novelty else name for name in node.output]
        graph.node.append(onnx.helper.make_node("Erf", ["before"], [novelty], name="culprit"))

    copy = _edited(loud, tmp_path, with_an_erf)
    found = coverage.report(copy, SOC, graphs=["prefill"])
    assert found.placements[0].refused == (("culprit", "Erf"),)
    assert "Erf" not in found.placements[0].became
    assert not found.passed
    assert [depth.broken for depth in found.depths] == [None]
    assert not list(copy.glob(".htp-*"))


def test_the_command_prints_tables_or_json(
    planted: coverage.Coverage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, object]] = []

    def known(folder: Path, soc: Soc, **given: object) -> coverage.Coverage:
        asked.append((soc.name, given["graphs"]))
        return planted

    monkeypatch.setattr(coverage, "report", known)
    shown = CliRunner().invoke(cli, ["coverage", "b", "--soc", "sm8650"])
    assert shown.exit_code == 1
    assert "prefill: the error jumps first in layer 1, to input_layernorm: Mul" in shown.stdout
    assert "decode: the error jumps nowhere; it is largest at" in shown.stdout
    assert "FullyConnected" in shown.stdout
    options = ["--soc", "SM8550", "--graph", "prefill", "--json"]
    as_json = CliRunner().invoke(cli, ["coverage", "b", *options])
    assert as_json.exit_code == 1
    assert as_json.stderr == ""
    assert json.loads(as_json.stdout)["depths"][0]["broken"] == LAYER
    assert asked == [("sm8650", ()), ("sm8550", ("prefill",))]


def test_a_text_that_is_too_short_says_how_long_it_must_be(loud: Path) -> None:
    with pytest.raises(PotexportError, match=r"the text has \d+ tokens; .* takes 165"):
        coverage.report(loud, SOC, text="too short", graphs=["decode"])


def test_the_rule_of_a_jump() -> None:
    """The first that is not finite, or above the floor and four times the largest before."""
    sound = [(error, True) for error in (0.001, 0.019, 0.03, 0.1)]
    assert coverage.jump(sound) is None
    assert coverage.jump([]) is None
    assert coverage.jump([(0.03, True)]) == 0
    assert coverage.jump([*sound, (0.401, True), (1.0, True)]) == 4
    assert coverage.jump([(0.001, True), (0.001, False)]) == 1
    assert coverage.jump([(0.001, True), (float("nan"), True)]) == 1


def test_numbers_of_one_value() -> None:
    from potexport.taps import Place

    place = Place("x", "part", "Mul")
    same = coverage.seen(place, np.array([3.0, 4.0], np.float16), np.array([[3.0, 4.0]]))
    assert (same.error, same.cosine, same.largest, same.finite) == (0.0, 1.0, 4.0, True)
    off = coverage.seen(place, np.array([3.0, 0.0]), np.array([3.0, 4.0]))
    assert (off.error, off.cosine) == (0.8, 0.6)
    assert not coverage.seen(place, np.array([np.inf, 0.0]), np.array([3.0, 4.0])).finite
    empty = coverage.seen(place, np.zeros(2), np.zeros(2))
    assert (empty.error, empty.cosine) == (0.0, 1.0)


def test_a_graph_that_is_not_there(loud: Path) -> None:
    with pytest.raises(PotexportError, match=r"'nope'; choose: prefill, decode, observe, compress"):
        coverage.report(loud, SOC, graphs=["nope"])

"""Shortcuts of the export give what the long way gives."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from potexport import beside, export, lower_onnx, pipeline
from potexport.compressions import compressions
from potexport.graphs.compress import Compress
from potexport.graphs.model import PotModel
from potexport.spec import GraphSpec
from tests import tiny

OPSET = 23
POLICIES = ("infinipot", "keydiff", "h2o")
POT: dict[str, Any] = {
    "pot": 48,
    "chunk": 8,
    "keep": 23,
    "catalyst_width": 8,
    "sink": 2,
    "recent": 3,
}


class Mixed(nn.Module):
    """Types that must be promoted, slices of each kind, and a width that is not constant."""

    def forward(self, x: Tensor, counts: Tensor, on: Tensor) -> tuple[Tensor, ...]:
        width = counts.shape[0]
        scaled = x * counts[:, None] + on[:, None]
        shifted = scaled[:, 2:] ** 2 + counts[:, None] / 3
        half = x.half() * 0.3 + counts[:, None]  # computed in float32, and rounded back
        return shifted, scaled[:width, :-1], half[..., ::2], scaled[1:] * 0.5, counts * 2 + 1.5


def exported() -> ir.Model:
    width = torch.export.Dim("width", min=2, max=99)
    args = (torch.ones(7, 6), torch.arange(7, dtype=torch.int32), torch.ones(7, dtype=torch.bool))
    dims = ({0: width}, {0: width}, {0: width})
    return lower_onnx.simplify(export._translate(Mixed(), args, opset=OPSET, dims=dims))


def nodes(model: ir.Model) -> list[str]:
    """What is computed, whatever values are called."""
    names: dict[Any, str] = {}

    def of(value: ir.Value | None) -> str:
        if value is None or value.const_value is None:
            return names.get(value, str(value and value.name))
        return str(value.const_value.numpy().tolist())

    told = []
    for number, node in enumerate(model.graph):
        names |= {value: f"{number}.{place}" for place, value in enumerate(node.outputs)}
        attributes = {name: str(each) for name, each in sorted(node.attributes.items())}
        told.append(f"{node.op_type}({', '.join(map(of, node.inputs))}) {attributes}")
    return [*told, *map(of, model.graph.outputs)]


def test_known_values_and_short_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the exporter, which runs every node again, and its own translation of slices."""
    quick = exported()
    assert {"Cast", "Slice", "Pow"} <= {node.op_type for node in quick.graph}  # promoted, and cut
    real = torch.onnx.export

    def plain(*args: Any, custom_translation_table: Any, **options: Any) -> Any:
        assert custom_translation_table
        monkeypatch.setattr(torch.fx.Interpreter, "run_node", own)
        return real(*args, **options)

    own = torch.fx.Interpreter.run_node
    monkeypatch.setattr(torch.onnx, "export", plain)
    assert nodes(exported()) == nodes(quick)


@dataclass(frozen=True)
class Case:
    """Compressions, their specs, and the graphs as this process makes them."""

    graphs: dict[str, Compress]
    specs: dict[str, GraphSpec]
    wanted: dict[str, bytes]

    def order(self, place: Path) -> beside.Order:
        """As the process finds it in its folder."""
        made = [(name, graph, self.specs[name]) for name, graph in self.graphs.items()]
        (place / "order").write_bytes(pickle.dumps((made, OPSET)))
        return made


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder, num_hidden_layers=2)
    decided = pipeline.plan(pipeline.Options(model=str(folder), policy=POLICIES, **POT))
    model, tokenizer = pipeline.load(decided)
    core = PotModel(model, decided.layout.facts, decided.layout.pot)
    made = compressions(decided, core, tokenizer, folder, lambda _: None)
    specs = decided.layout.graphs()
    wanted = {name: data(beside.make(graph, specs[name], OPSET)) for name, graph in made.items()}
    assert len(wanted) == len(POLICIES)
    return Case(made, specs, wanted)


def data(model: ir.Model) -> bytes:
    made: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return made


def test_a_process_beside_makes_the_same_graphs(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = case.order(tmp_path)
    (tmp_path / "potexport").mkdir()  # where the command is given, and not ours
    (tmp_path / "potexport" / "__init__.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    process = beside._started(tmp_path)
    assert process.wait() == 0
    monkeypatch.setattr(beside, "make", None)  # nothing is left to be made here
    made = beside._gathered(tmp_path, process, order, OPSET)
    assert {name: data(model) for name, model in made.items()} == case.wanted


def test_the_two_share_the_work(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the process came."""
    monkeypatch.setattr(beside, "cores", lambda: 2)
    with beside.compressing(case.graphs, case.specs, opset=OPSET, layers=beside.WORTH) as made:
        found = made()
    assert {name: data(model) for name, model in found.items()} == case.wanted
    assert list(found) == list(case.wanted)


def test_what_a_process_did_not_finish_is_made_here(case: Case, tmp_path: Path) -> None:
    order = case.order(tmp_path)
    (tmp_path / "order").write_bytes(b"damaged")
    process = beside._started(tmp_path)
    assert beside._claim(tmp_path, order[0][0])  # begun, as it were
    made = beside._gathered(tmp_path, process, order, OPSET)
    assert process.returncode == 1
    assert {name: data(model) for name, model in made.items()} == case.wanted

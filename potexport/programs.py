"""The graphs as PyTorch modules with the tensors of the contract, and traced at their fixed widths.

What ExecuTorch lowers. (ONNX's model graphs come from one trace of symbolic width, `export`: its
exporter is slow and cutting a graph is quick; here tracing is the smallest part.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from potexport.graphs.codes import KINDS, Codes, Stored
from potexport.graphs.compress import Compress, Given
from potexport.spec import SCORES, GraphSpec, TensorSpec

if TYPE_CHECKING:
    from potexport.graphs.model import PotModel

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int32": torch.int32,
    "int8": torch.int8,
}
Named = dict[str, Tensor]


class Graph(nn.Module):
    """One graph, its tensors in the order of the contract.

    run: from inputs to outputs, both by name, with what `core` computes; more outputs than the
        contract's do no harm.
    """

    def __init__(self, core: nn.Module, run: Callable[[Named], Named], spec: GraphSpec) -> None:
        super().__init__()
        self.core, self.run, self.spec = core, run, spec

    @classmethod
    def compression(cls, core: Compress, spec: GraphSpec) -> Graph:
        def run(given: Named) -> Named:
            keys: Sequence[Tensor] = _of_layers(given, "past_key_values.{}.key", core.chosen)
            values: Sequence[Tensor] = _of_layers(given, "past_key_values.{}.value", core.chosen)
            stored = None
            codes = Codes.of(given, core.geometry.sink, core.turns.common)
            if codes is not None:
                stored = Stored(codes, keys, values, given["keep_coded"])
                keys, values = stored.in_order()
            asked = Given(
                given["past_seq_len"],
                given["keep"],
                given["pinned"],
                given["reset"],
                _of_layers(given, "positions.{}", core.chosen),
                keys,
                values,
                {
                    name: _of_layers(given, name + ".{}", core.chosen)
                    for name in SCORES
                    if f"{name}.{core.chosen[0]}" in given
                },
                given.get("position"),
                stored,
                _of_layers(given, "past_key_values.{}.key", core.windowed),
                given.get("back"),
            )
            out = core.run(asked)
            return (
                _named("present.{}.key", out.keys, core.chosen)
                | _named("present.{}.key", out.last, core.windowed)
                | _named("present.{}.value", out.values, core.chosen)
                | _named("kept.{}", out.kept, core.chosen)
                | {
                    f"present_{kind.format(layer)}": tensor
                    for layer, each in enumerate(out.coded)
                    for kind, tensor in zip(KINDS, each, strict=True)
                }
            )

        return cls(core, run, spec)

    @classmethod
    def step(cls, core: PotModel, spec: GraphSpec) -> Graph:
        """prefill, decode or observe."""

        layers = range(core.facts.layers)
        chosen = core.geometry.chosen(core.facts.layers)

        def run(given: Named) -> Named:
            out = core.run(
                given["input_ids"],
                given["past_seq_len"],
                given["position"],
                _of_layers(given, "past_key_values.{}.key", layers),
                _of_layers(given, "past_key_values.{}.value", layers),
                given.get("query_weights"),
                codes=Codes.of(given, core.geometry.sink, core.turn, in_turns=True),
            )
            made = {"logits": out.logits}
            if "next_ids" in given:
                made["novelty"] = core.novelty(out.logits, given["next_ids"])
            return (
                made
                | _named("present.{}.key", out.keys, layers)
                | _named("present.{}.value", out.values, layers)
                | _named("mass.{}", out.mass, chosen)
                | _named("new_mass.{}", out.new_mass, chosen)
            )

        return cls(core, run, spec)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip((spec.name for spec in self.spec.inputs), tensors, strict=True))
        made = self.run(given)
        return tuple(made[spec.name] for spec in self.spec.outputs)

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace it with: zeros, but ones where a count of 0 makes no sense."""
        return tuple(example(tensor) for tensor in self.spec.inputs)


def _of_layers(given: Named, name: str, layers: Iterable[int]) -> list[Tensor]:
    """The tensors of this name, with `{}` for the layer."""
    return [given[name.format(layer)] for layer in layers]


def _named(name: str, tensors: list[Tensor], layers: Iterable[int]) -> Named:
    """None, or one for each layer."""
    return {name.format(layer): tensor for layer, tensor in zip(layers, tensors, strict=False)}


def trace(core: PotModel | Compress, spec: GraphSpec) -> torch.export.ExportedProgram:
    """A graph of the contract: its inputs and outputs, in its order."""
    graph = Graph.compression(core, spec) if isinstance(core, Compress) else Graph.step(core, spec)
    with torch.no_grad():
        return torch.export.export(graph.eval(), graph.example(), strict=False)


def example(spec: TensorSpec) -> Tensor:
    fill = 1 if spec.name in ("keep", "past_seq_len") else 0
    return torch.full(spec.shape, fill, dtype=DTYPES[spec.dtype])

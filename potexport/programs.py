"""PyTorch modules to traced programs, one for each graph, at their fixed widths.

What ExecuTorch lowers. (ONNX graphs come from one trace of symbolic width, `export`: its exporter
is slow and cutting a graph is quick; here tracing is the smallest part.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from potexport.graphs.compress import Compress
from potexport.graphs.model import PotModel
from potexport.graphs.policies import Policy
from potexport.spec import GraphSpec, Layout, TensorSpec

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int32": torch.int32}
Named = dict[str, Tensor]


class _Graph(nn.Module):
    """One graph, with its tensors in the order of the contract."""

    def __init__(self, spec: GraphSpec, layers: int) -> None:
        super().__init__()
        self.spec, self.layers = spec, layers

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip((spec.name for spec in self.spec.inputs), tensors, strict=True))
        made = self.run(given)
        return tuple(made[spec.name] for spec in self.spec.outputs)

    def run(self, given: Named) -> Named:
        """Outputs by name; more than the contract's do no harm."""
        raise NotImplementedError

    def of_layers(self, given: Named, name: str) -> list[Tensor]:
        """The tensors of this name, with `{}` for the layer; none where there are none."""
        names = (name.format(layer) for layer in range(self.layers))
        return [given[each] for each in names if each in given]


class _Step(_Graph):
    """prefill, decode or observe."""

    def __init__(self, core: PotModel, spec: GraphSpec, layers: int) -> None:
        super().__init__(spec, layers)
        self.core = core

    def run(self, given: Named) -> Named:
        out = self.core.run(
            given["input_ids"],
            given["past_seq_len"],
            self.of_layers(given, "past_key_values.{}.key"),
            self.of_layers(given, "past_key_values.{}.value"),
            given.get("query_weights"),
        )
        made = {"logits": out.logits}
        if "next_ids" in given:
            made["novelty"] = self.core.novelty(out.logits, given["next_ids"])
        return (
            made
            | _named("present.{}.key", out.keys)
            | _named("present.{}.value", out.values)
            | _named("mass.{}", out.mass)
        )


class _Compression(_Graph):
    def __init__(self, core: Compress, spec: GraphSpec, layers: int) -> None:
        super().__init__(spec, layers)
        self.core = core

    def run(self, given: Named) -> Named:
        out = self.core.run(
            given["past_seq_len"],
            given["keep"],
            self.of_layers(given, "past_key_values.{}.key"),
            self.of_layers(given, "past_key_values.{}.value"),
            self.of_layers(given, "mass.{}") or None,
            self.of_layers(given, "novelty.{}") or None,
        )
        return (
            _named("present.{}.key", out.keys)
            | _named("present.{}.value", out.values)
            | _named("present.{}.novelty", out.novelty)
            | _named("kept.{}", out.kept)
        )


def _named(name: str, tensors: list[Tensor]) -> Named:
    return {name.format(layer): tensor for layer, tensor in enumerate(tensors)}


def trace(
    name: str, core: PotModel, policy: Policy, layout: Layout
) -> torch.export.ExportedProgram:
    """The graph of this name: its inputs and outputs are those of the contract, in its order."""
    spec, layers = layout.graphs()[name], layout.facts.layers
    module: _Graph
    if name == "compress":
        module = _Compression(Compress(policy, layout.pot, core.turn), spec, layers)
    else:
        module = _Step(core, spec, layers)
    with torch.no_grad():
        return torch.export.export(
            module.eval(), tuple(example(tensor) for tensor in spec.inputs), strict=False
        )


def example(spec: TensorSpec) -> Tensor:
    """Zeros of this shape, but ones where a count of 0 makes no sense."""
    fill = 1 if spec.name in ("keep", "past_seq_len") else 0
    return torch.full(spec.shape, fill, dtype=DTYPES[spec.dtype])

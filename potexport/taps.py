"""Where to look into a graph: the values behind each decoder layer, and those inside one.

Found from how values flow, never from the kind of model: what every path from the tokens to the
graph's deepest output goes through is the residual stream; the keys that leave layer N
(`present.N.key`) say where that layer begins. Inside a layer, the names of weights say what a value
belongs to, for they carry the checkpoint's module paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import onnx_ir as ir

# They move elements and compute none: a tap behind them would say what the one before said.
MOVES = frozenset(
    ("Reshape", "Transpose", "Slice", "Unsqueeze", "Squeeze", "Expand", "Identity", "Cast")
)
IDS = "input_ids"


@dataclass(frozen=True)
class Place:
    """One value to look at. name: of the value in the graph; part: what it is, for a person."""

    name: str
    part: str
    operator: str


class Flow:
    """How values of one graph depend on its tokens."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes = list(graph)
        self._ids = next((value for value in graph.inputs if value.name == IDS), None)
        outputs = {str(value.name): value for value in graph.outputs}
        self._keys = [
            outputs[name]
            for name in (f"present.{layer}.key" for layer in range(len(outputs)))
            if name in outputs
        ]
        self.cuts = self._cuts()

    @property
    def embedded(self) -> ir.Value | None:
        """What the tokens are looked up to, if one node alone reads them."""
        readers = [] if self._ids is None else list(self._ids.consumers())
        return readers[0].outputs[0] if len(readers) == 1 else None

    def layers(self) -> list[ir.Value]:
        """The value behind each layer; a layer's keys where the graph ends before its end.

        All of them are keys if the residual stream is not found: if a layer has no value of its own
        that every path goes through.
        """
        order = {value: place for place, value in enumerate(self.cuts)}
        if not self._keys:
            return []
        begins = []
        for key in self._keys:
            above = self._ancestors(key)
            begins.append(max((place for cut, place in order.items() if cut in above), default=-1))
        if len(begins) > 2:  # where the graph ends with these keys, their norm is no detour
            begins[-1] = min(begins[-1], 2 * begins[-2] - begins[-3])
        if any(later <= earlier for earlier, later in pairwise(begins)):
            return list(self._keys)
        ends = begins[1:]
        if len(begins) > 1:  # the last layer is as long as the one before
            last = begins[-1] + begins[-1] - begins[-2]
        else:
            last = max((order[cut] for cut in self.cuts if self._joins(cut)), default=-1)
        found = [self.cuts[place] for place in ends]
        # Nothing that the last keys are made of is behind their layer.
        there = begins[-1] < last < len(self.cuts) and self.cuts[last] not in above
        return [*found, self.cuts[last] if there else self._keys[-1]]

    def inside(self, layer: int) -> list[Place]:
        """All that a layer computes, in order, its last value included."""
        behind = self.layers()
        end = behind[layer]
        above = self._ancestors(end) | {end}
        # What leaves the graph belongs to its layer, and is no ancestor of a residual.
        above |= {v for key in self._keys[layer : layer + 1] for v in (*self._ancestors(key), key)}
        before = self._ancestors(behind[layer - 1]) | {behind[layer - 1]} if layer else set()
        below = self._below(behind[layer - 1] if layer else self._ids)
        values = [
            value
            for node in self.nodes
            for value in node.outputs[:1]
            if node.op_type not in MOVES or value.is_graph_output()
            if value in above and value in below and value not in before and _is_float(value)
        ]
        towards = self._towards(layer)
        return [
            Place(
                str(value.name),
                "residual" if value in (*self.cuts, end) else towards[value],
                _operator(value),
            )
            for value in values
        ]

    def _towards(self, layer: int) -> dict[ir.Value, str]:
        """What each value belongs to: the module whose weight made it, or the first on its way."""
        order = {node: place for place, node in enumerate(self.nodes)}
        found: dict[ir.Value, str] = {}
        for node in reversed(self.nodes):
            for value in node.outputs:
                readers = sorted(value.consumers(), key=lambda each: order[each])
                goals = [found[out] for reader in readers for out in reader.outputs]
                goal = goals[0].removeprefix("to ") if goals else "the end"
                found[value] = _part(value, layer) or f"to {goal}"
        return found

    def _cuts(self) -> list[ir.Value]:
        """The float values that every path from the tokens to the deepest output goes through."""
        if self._ids is None:
            return []
        down: dict[ir.Value, int] = {self._ids: 1}  # paths from the tokens to a value
        for node in self.nodes:
            if count := sum(down.get(value, 0) for value in node.inputs if value is not None):
                down |= dict.fromkeys(node.outputs, count)
        # The deepest output: nodes may stand in any order that computes.
        target = max(self.graph.outputs, key=lambda value: down.get(value, 0))
        up: dict[ir.Value, int] = {target: 1}  # paths from a value to that output
        for node in reversed(self.nodes):
            if count := sum(up.get(value, 0) for value in node.outputs):
                for value in node.inputs:
                    if value is not None:
                        up[value] = up.get(value, 0) + count
        total = down.get(target, 0)
        made = [value for node in self.nodes for value in node.outputs]
        return [
            value
            for value in made
            if total and down.get(value, 0) * up.get(value, 0) == total and _is_float(value)
        ]

    def _ancestors(self, value: ir.Value) -> set[ir.Value]:
        found: set[ir.Value] = set()
        waiting = [value]
        while waiting:
            node = waiting.pop().producer()
            for each in node.inputs if node else ():
                if each is not None and each not in found:
                    found.add(each)
                    waiting.append(each)
        return found

    def _below(self, value: ir.Value | None) -> set[ir.Value]:
        found: set[ir.Value] = set() if value is None else {value}
        for node in self.nodes:
            if any(each in found for each in node.inputs):
                found |= set(node.outputs)
        return found - {value}

    def _joins(self, value: ir.Value) -> bool:
        """Whether two things that depend on the tokens meet in it, as in a residual."""
        node, below = value.producer(), self._below(self._ids)
        return node is not None and sum(each in below for each in node.inputs) > 1


def single(model: ir.Model) -> None:
    """Make every fp16 value and constant of a model fp32, in place."""
    half, whole = ir.DataType.FLOAT16, ir.DataType.FLOAT
    graph = model.graph
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == half:
            value.const_value = ir.Tensor(tensor.numpy().astype("float32"), name=value.name)
    made = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        if value.dtype == half:
            value.dtype = whole
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
            node.attributes["to"] = ir.AttrInt64("to", int(whole))


def tap(model: ir.Model, names: Sequence[str]) -> list[str]:
    """Add values to the outputs of a model; the names of those that it has."""
    graph = model.graph
    outputs = {str(value.name) for value in graph.outputs}
    made = {str(value.name): value for node in graph for value in node.outputs}
    found = [name for name in dict.fromkeys(names) if name in made]
    graph.outputs.extend(made[name] for name in found if name not in outputs)
    return found


def save(model: ir.Model, path: Path) -> None:
    """Write a model and, in a file beside it, its large constants."""
    ir.save(model, path, external_data=f"{path.stem}.data", size_threshold_bytes=1024)


def _part(value: ir.Value, layer: int) -> str:
    """The module whose weight made it: `self_attn.q_proj`; an output of the graph by its name."""
    if value.is_graph_output():
        return str(value.name)
    node = value.producer()
    for each in node.inputs if node else ():
        if each is not None and each.is_initializer() and "." in str(each.name):
            *path, _ = str(each.name).removesuffix(".T").split(".")
            if str(layer) in path[:-1]:
                return ".".join(path[path.index(str(layer)) + 1 :])
    return ""


def _operator(value: ir.Value) -> str:
    node = value.producer()
    return node.op_type if node else ""


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)

"""What every rewrite of a graph does: add constants, swap values, find products with weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators


class Weights:
    """Constants by name, each made once and then given to every graph that asks."""

    def __init__(self) -> None:
        self._tensors: dict[str, ir.Tensor[Any]] = {}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape.numpy()

    def array(self, name: str) -> np.ndarray:
        return self._tensors[name].numpy()

    def put(self, name: str, array: np.ndarray) -> None:
        self._tensors[name] = ir.Tensor(array, name=name)

    def value(self, graph: ir.Graph, name: str) -> ir.Value:
        return initializer(graph, self._tensors[name])


def is_weight(value: ir.Value | None) -> bool:
    """Whether it is one of the model's, and not a constant of the graph."""
    return value is not None and value.is_initializer() and ".weight" in str(value.name)


def products(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Every product with a weight of the model, and that weight."""
    for node in graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is not None and is_weight(weight):
            yield node, weight


def products_in_blocks(graph: ir.Graph, block: int) -> list[tuple[ir.Node, ir.Value]]:
    """Those whose weights are whole blocks deep; the others stay float."""
    found = []
    for node, weight in products(graph):
        assert weight.shape is not None
        if weight.shape.numpy()[1 if node.op_type == "Gemm" else 0] % block == 0:
            found.append((node, weight))
    return found


def initializer(graph: ir.Graph, tensor: ir.Tensor[Any]) -> ir.Value:
    name = str(tensor.name)
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new constant of the graph."""
    return initializer(graph, ir.Tensor(array, name=name))


def replace(graph: ir.Graph, old: ir.Value, nodes: list[ir.Node], *, before: ir.Node) -> None:
    """Insert nodes; the last one's output takes the place of `old`, its name included."""
    graph.insert_before(before, nodes)
    new = typed(nodes[-1].outputs[0], old)
    if old.is_graph_output():
        take_output(graph, old, new)
    else:
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new)


def typed(value: ir.Value, like: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
    value.shape = like.shape
    value.type = like.type if dtype is None else ir.TensorType(dtype)
    return value


def take_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let `new` be the graph's output in the place of `old`, under its name."""
    new.name, old.name = old.name, None
    graph.outputs[list(graph.outputs).index(old)] = new

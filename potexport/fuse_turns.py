"""A turn of keys from one position to another as one operator, in the graphs that compress.

`graphs.rope.turn_back` is ten nodes and as many copies of the pot's keys; ONNX Runtime's rotary
embedding, given the sines of the way back, is one. For its CPU kernels, as `fuse_onnx`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from potexport.fuse_onnx import made_by
from potexport.surgery import CONTRIB, Weights, constant, replace

Halves = tuple[ir.Value, ir.Value]


def fuse_turns(models: Iterable[ir.Model]) -> None:
    """In place; what is not recognized stays as it is."""
    weights = Weights()
    for model in models:
        graph = model.graph
        for node in list(graph):
            if node.op_type == "Concat" and len(node.inputs) == 2:
                _turn(graph, node, weights)
        passes.RemoveUnusedNodesPass()(model)
        model.opset_imports[CONTRIB] = 1


def _turn(graph: ir.Graph, joined: ir.Node, weights: Weights) -> None:
    """[a*cos + b*sin, b*cos - a*sin] of the halves a, b of keys (N, D), and rows cos, sin of one
    table (positions, D) -> RotaryEmbedding."""
    sum_, difference = (made_by(each, op) for each, op in zip(joined.inputs, ("Add", "Sub"),
                                                              strict=True))  # fmt: skip
    if sum_ is None or difference is None:
        return
    factors = [_factors(each) for node in (sum_, difference) for each in node.inputs]
    (a, cos), (b, sin) = factors[0], factors[1]
    if None in (a, b, cos, sin) or factors[2:] != [(b, cos), (a, sin)]:
        return
    keys, by = _whole(a, b), _whole(cos, sin)
    gather = made_by(by, "Gather")
    table, rows = gather.inputs if gather else (None, None)
    if keys is None or keys.shape is None or len(keys.shape) != 2 or table is None or rows is None:
        return
    if table.const_value is None or rows.dtype != ir.DataType.INT64:
        return
    count, size = keys.shape.numpy()
    tables = [_put(graph, weights, table, name, half) for name, half in (("cos", 0), ("sin", 1))]
    one_each = constant(graph, f"rows.{count}.{size}", np.array([count, 1, size]))
    places = constant(graph, f"rows.{count}", np.array([count, 1]))
    whole = constant(graph, f"keys.{count}.{size}", np.array([count, size]))
    given = ir.node("Reshape", [keys, one_each])
    stands = ir.node("Reshape", [rows, places])
    turned = ir.node(
        "RotaryEmbedding",
        [given.outputs[0], stands.outputs[0], *tables],
        attributes={"interleaved": 0},
        domain=CONTRIB,
    )
    for node, shape, like in ((given, [count, 1, size], keys), (stands, [count, 1], rows),
                              (turned, [count, 1, size], keys)):  # fmt: skip
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), like.type
    back = ir.node("Reshape", [turned.outputs[0], whole])
    replace(graph, joined.outputs[0], [given, stands, turned, back], before=joined)


def _factors(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    product = made_by(value, "Mul")
    return (product.inputs[0], product.inputs[1]) if product else (None, None)


def _whole(first: ir.Value | None, second: ir.Value | None) -> ir.Value | None:
    """What two values are the halves of, columns [0, n) and [n, 2n)."""
    parts = made_by(first, "Slice"), made_by(second, "Slice")
    if parts[0] is None or parts[1] is None or parts[0].inputs[0] is not parts[1].inputs[0]:
        return None
    whole = parts[0].inputs[0]
    if whole is None or whole.shape is None:
        return None
    begins = [_integer(part.inputs[1]) for part in parts if part]
    axes = {_integer(part.inputs[3]) for part in parts if part}
    last = len(whole.shape) - 1
    half = whole.shape.numpy()[last] // 2
    fits = begins == [0, half] and axes <= {last, -1} and _integer(parts[0].inputs[2]) == half
    return whole if fits else None


def _integer(value: ir.Value | None) -> int | None:
    tensor = None if value is None else value.const_value
    return int(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def _put(graph: ir.Graph, weights: Weights, table: ir.Value, name: str, half: int) -> ir.Value:
    """Cosines (positions, D/2), or sines of the other way round."""
    whole = f"{table.name}.{name}"
    if not weights.has(whole):
        assert table.const_value is not None
        array = table.const_value.numpy()
        width = array.shape[1] // 2
        part = array[:, half * width : (half + 1) * width]
        weights.put(whole, np.ascontiguousarray(-part if half else part))
    return weights.value(graph, whole)

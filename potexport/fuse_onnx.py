"""Fewer and larger operators, of ONNX Runtime's own domain: for its CPU kernels, not for NPUs.

Each rule looks for what transformers' code becomes and leaves alone what it does not recognize, so
a family that computes otherwise is slower and not wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from potexport.surgery import CONTRIB, Weights, constant, is_weight, replace, typed

SWAP = [0, 2, 1, 3]  # heads and tokens


def fuse(models: Iterable[ir.Model]) -> None:
    """Fuse norms, rotations and the products before attention, in place. Weights that become one
    are shared by all models."""
    weights, groups = Weights(), []
    for model in models:
        graph = model.graph
        for node in list(graph):
            if node.op_type == "Reciprocal":
                _norm(graph, node)
        for node in list(graph):
            if node.op_type == "SimplifiedLayerNormalization":
                _skip(graph, node)
        for node in list(graph):
            if node.op_type == "GroupQueryAttention":
                _rotation(graph, node, weights)
                _plain_inputs(node)
        _drop_moves(graph)
        passes.RemoveUnusedNodesPass()(model)
        for node in list(graph):
            if node.op_type == "GroupQueryAttention":
                groups += _one_product(graph, node, weights)
        for group in groups:
            _one_product_and_split(graph, group, weights)
        passes.CommonSubexpressionEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
        model.opset_imports[CONTRIB] = 1


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that made a value, if it is such a one."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _number(value: ir.Value | None) -> float | None:
    """A constant of one element."""
    tensor = None if value is None else value.const_value
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = value.consumers()
    alone = len(users) == 1 and not value.is_graph_output()
    return users[0] if alone and users[0].op_type == op_type else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The second input of a node of two."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _norm(graph: ir.Graph, inverse: ir.Node) -> None:
    """x * 1/sqrt(mean(x^2) + eps) [* weight] -> SimplifiedLayerNormalization(x, weight)."""
    root = made_by(inverse.inputs[0], "Sqrt")
    sum_ = made_by(root.inputs[0], "Add") if root else None
    mean = made_by(sum_.inputs[0], "ReduceMean") if sum_ else None
    power = made_by(mean.inputs[0], "Pow") if mean else None
    scaled = _only_user(inverse.outputs[0], "Mul")
    if sum_ is None or mean is None or power is None or scaled is None:
        return
    x, epsilon = power.inputs[0], _number(sum_.inputs[1])
    last = _number(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if x is None or x.shape is None or last not in (-1, len(x.shape) - 1):
        return
    if epsilon is None or _number(power.inputs[1]) != 2 or x not in scaled.inputs:
        return
    size = x.shape.numpy()[-1]
    weighted = _only_user(scaled.outputs[0], "Mul")
    weight = _other(weighted, scaled.outputs[0]) if weighted else None
    if weight is None or not weight.is_initializer() or weight.shape != (size,):
        weighted, weight = scaled, constant(graph, f"ones.{size}", np.ones(size, np.float32))
    assert weighted is not None
    node = ir.node(
        "SimplifiedLayerNormalization",
        [x, weight],
        attributes={"axis": -1, "epsilon": epsilon, "stash_type": 1},
    )
    replace(graph, weighted.outputs[0], [node], before=weighted)


def _skip(graph: ir.Graph, norm: ir.Node) -> None:
    """norm(a + b) -> SkipSimplifiedLayerNormalization(a, b), which gives the sum too."""
    x, weight = norm.inputs
    sum_ = made_by(x, "Add")
    if x is None or weight is None or sum_ is None or x.is_graph_output():
        return
    a, b = sum_.inputs
    if a is None or b is None or a.shape != x.shape or b.shape != x.shape:
        return
    if len(x.shape or ()) != 3 or not (a.producer() and b.producer()):
        return  # a constant is no residual stream
    node = ir.node(
        "SkipSimplifiedLayerNormalization",
        [a, b, weight],
        attributes={"epsilon": norm.attributes["epsilon"].as_float()},
        domain=CONTRIB,
        num_outputs=4,
    )
    out, mean, deviation, total = node.outputs
    mean.name = deviation.name = ""
    graph.insert_after(sum_, node)
    typed(total, x)
    x.replace_all_uses_with(total)
    typed(out, norm.outputs[0])
    norm.outputs[0].replace_all_uses_with(out)


def _rotation(graph: ir.Graph, attention: ir.Node, weights: Weights) -> None:
    """Let the attention rotate queries and keys, if both are by the halves of one table."""
    found = [_rotated(attention.inputs[n]) for n in (0, 1)]
    if found[0] is None or found[1] is None or found[0][1:] != found[1][1:]:
        return
    (query, cos, sin, rows), (key, *_) = found[0], found[1]
    tables = [_half(graph, table, weights) for table in (cos, sin)]
    if rows.shape is None or rows.dtype != ir.DataType.INT64 or None in tables:
        return
    width = rows.shape.numpy()[0]
    shape = constant(graph, "one.row", np.array([1, width]))
    positions = ir.node("Reshape", [rows, shape])
    positions.outputs[0].shape, positions.outputs[0].type = ir.Shape([1, width]), rows.type
    graph.insert_before(attention, positions)
    attention.resize_inputs(max(10, len(attention.inputs)))
    for index, value in ((0, query), (1, key), (7, tables[0]), (8, tables[1])):
        attention.replace_input_with(index, value)
    attention.replace_input_with(9, positions.outputs[0])
    attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


Rotated = tuple[ir.Value, ir.Value, ir.Value, ir.Value]


def _rotated(value: ir.Value | None) -> Rotated | None:
    """x, tables of cos and sin, and their rows, of x rotated and then moved from (1, H, T, D) to
    (1, T, H*D)."""
    flat = made_by(value, "Reshape")
    moved = made_by(flat.inputs[0], "Transpose") if flat else None
    sum_ = made_by(moved.inputs[0], "Add") if moved else None
    if moved is None or sum_ is None or list(moved.attributes["perm"].as_ints()) != SWAP:
        return None
    by_cos, by_sin = (made_by(each, "Mul") for each in sum_.inputs)
    if by_cos is None or by_sin is None:
        return None
    x, cos = by_cos.inputs
    turned, sin = by_sin.inputs
    tables = [_looked_up(each) for each in (cos, sin)]
    plain = None if x is None or value is None else _unmoved(x, value)
    if plain is None or tables[0] is None or tables[1] is None or not _half_turned(turned, x):
        return None
    (cos_table, rows), (sin_table, same) = tables[0], tables[1]
    return (plain, cos_table, sin_table, rows) if rows is same else None


def _looked_up(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The table and the rows of it, behind any number of Unsqueeze."""
    while (node := made_by(value, "Unsqueeze")) is not None:
        value = node.inputs[0]
    gather = made_by(value, "Gather")
    table, rows = gather.inputs if gather else (None, None)
    known = table is not None and rows is not None and table.is_initializer()
    return (table, rows) if known else None  # type: ignore[return-value]


def _half_turned(value: ir.Value | None, x: ir.Value | None) -> bool:
    """Whether it is x's second half, negated, and its first."""
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or x is None or x.shape is None:
        return False
    negated = made_by(joined.inputs[0], "Neg")
    parts = (negated.inputs[0] if negated else None, joined.inputs[1])
    second, first = (made_by(part, "Slice") for part in parts)
    half = x.shape.numpy()[-1] // 2
    begins = [_number(part.inputs[1]) if part else None for part in (first, second)]
    ends = _number(first.inputs[2]) if first else None
    same = all(part is not None and part.inputs[0] is x for part in (first, second))
    return same and begins == [0, half] and ends == half


def _half(graph: ir.Graph, table: ir.Value, weights: Weights) -> ir.Value | None:
    """(positions, D/2) of a table (positions, D) whose halves are equal; else None."""
    name = f"{table.name}.half"
    if not weights.has(name):
        assert table.const_value is not None
        array = table.const_value.numpy()
        half = array.shape[1] // 2
        if not np.array_equal(array[:, :half], array[:, half:]):
            return None
        weights.put(name, np.ascontiguousarray(array[:, :half]))
    return weights.value(graph, name)


def _unmoved(moved: ir.Value, like: ir.Value) -> ir.Value | None:
    """What became (1, H, T, D) by Reshape and Transpose, if it has the shape of `like`."""
    swap = made_by(moved, "Transpose")
    split = made_by(swap.inputs[0], "Reshape") if swap else None
    plain = split.inputs[0] if split else None
    return plain if plain is not None and plain.shape == like.shape else None


def _plain_inputs(attention: ir.Node) -> None:
    """Undo moves to (1, H, T, D) and back."""
    for index in range(3):
        value = attention.inputs[index]
        flat = made_by(value, "Reshape")
        back = made_by(flat.inputs[0], "Transpose") if flat else None
        there = back.inputs[0] if back else None
        plain = None if there is None or value is None else _unmoved(there, value)
        if plain is not None:
            attention.replace_input_with(index, plain)


def _drop_moves(graph: ir.Graph) -> None:
    """Reshape(Reshape(x)) -> Reshape(x), and none where the shape stays."""
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        before = made_by(node.inputs[0], "Reshape")
        if before is not None:
            node.replace_input_with(0, before.inputs[0])
        x, y = node.inputs[0], node.outputs[0]
        if x is not None and x.shape == y.shape and x.shape is not None and not y.is_graph_output():
            y.replace_all_uses_with(x)


def _one_product(graph: ir.Graph, attention: ir.Node, weights: Weights) -> list[list[str]]:
    """The products that make query, key and value of one input become one; the names of their
    weights."""
    found = [_product(value) for value in attention.inputs[:3]]
    made = [each for each in found if each is not None]
    if len(made) < 3 or len({id(x) for x, *_ in made}) != 1:
        return []
    if len({bias is None for *_, bias in made}) != 1:
        return []
    x = made[0][0]
    packed = _join(graph, x, [(w, b) for _, w, b in made], weights, before=attention)
    attention.replace_input_with(0, packed)
    for index in (1, 2):
        attention.replace_input_with(index, None)
    return [[str(weight.name) for _, weight, _ in made]]


def _one_product_and_split(graph: ir.Graph, group: list[str], weights: Weights) -> None:
    """The same where attention is in the open: all graphs share weights."""
    parts = [graph.initializers.get(name) for name in group]
    users = [part.consumers() for part in parts if part is not None]
    nodes = [each[0] for each in users if len(each) == 1 and each[0].op_type == "MatMul"]
    x = nodes[0].inputs[0] if nodes else None
    if x is None or len(nodes) < len(group) or any(node.inputs[0] is not x for node in nodes):
        return
    known = [(part, None) for part in parts if part is not None]
    packed = _join(graph, x, known, weights, before=nodes[0])
    widths = [_columns(node.outputs[0]) for node in nodes]
    name = "columns." + ".".join(map(str, widths))
    split = ir.node(
        "Split",
        [packed, constant(graph, name, np.array(widths))],
        attributes={"axis": -1},
        num_outputs=len(nodes),
    )
    graph.insert_before(nodes[0], split)
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        typed(part, old)
        old.replace_all_uses_with(part)


def _columns(value: ir.Value) -> int:
    assert value.shape is not None
    return value.shape.numpy()[-1]


Product = tuple[ir.Value, ir.Value, "ir.Value | None"]


def _product(value: ir.Value | None) -> Product | None:
    """x, weight and bias of what made a value; it must be used for nothing else."""
    if value is None or len(value.consumers()) != 1:
        return None
    bias = None
    if (sum_ := made_by(value, "Add")) is not None:
        bias = next((each for each in sum_.inputs if each and each.is_initializer()), None)
        value = _other(sum_, bias) if bias is not None else value
    node = made_by(value, "MatMul")
    if node is None:
        return None
    x, weight = node.inputs
    if x is None or weight is None or not is_weight(weight):
        return None
    return x, weight, bias


def _join(
    graph: ir.Graph,
    x: ir.Value,
    parts: Sequence[tuple[ir.Value, ir.Value | None]],
    weights: Weights,
    *,
    before: ir.Node,
) -> ir.Value:
    """x @ [W W W] [+ b]."""
    joined = [_joined(graph, [weight for weight, _ in parts], weights)]
    if parts[0][1] is not None:
        joined.append(_joined(graph, [bias for _, bias in parts if bias is not None], weights))
    nodes = [ir.node("MatMul", [x, joined[0]])]
    if len(joined) > 1:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], joined[1]]))
    assert x.shape is not None
    assert joined[0].shape is not None
    shape = ir.Shape([*x.shape.numpy()[:-1], joined[0].shape.numpy()[-1]])
    for node in nodes:
        node.outputs[0].shape, node.outputs[0].type = shape, x.type
    graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]


def _joined(graph: ir.Graph, parts: list[ir.Value], weights: Weights) -> ir.Value:
    """Constants side by side, made once for all graphs."""
    names = [str(part.name) for part in parts]
    name = _together(names)
    if not weights.has(name):
        arrays = [part.const_value.numpy() for part in parts if part.const_value is not None]
        weights.put(name, np.concatenate(arrays, axis=-1))
    return weights.value(graph, name)


def _together(names: list[str]) -> str:
    """layers.0.q_proj.weight.T, layers.0.k_proj.weight.T -> layers.0.q_proj+k_proj.weight.T"""
    parts = [name.split(".") for name in names]
    columns = zip(*parts, strict=True)
    return ".".join("+".join(dict.fromkeys(column)) for column in columns)

"""Graphs that were changed as graphs: well-formed files that mean something else."""

from __future__ import annotations

import random
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz.values import damaged

OPERATORS = (
    "Add", "Expand", "Tile", "MatMul", "Concat", "Pad", "Gather", "Reshape", "Transpose", "Where",
    "ConstantOfShape", "Range", "Loop", "If", "Scan", "NonZero", "Resize", "Einsum", "Softmax",
    "TopK", "CumSum", "MatMulNBits", "GroupQueryAttention", "GatherBlockQuantized", "Nope",
)  # fmt: skip
SIZES = (0, -1, 1, 7, 1000, 100_000, 1 << 31, 1 << 40, -(1 << 62))
DOMAINS = ("", "com.microsoft", "ai.onnx.ml", "com.example", "ai.onnx.contrib")


def changed(data: bytes, chance: random.Random) -> bytes:
    """The file with one to three changes, or none where that would make no file."""
    model = onnx.load_model_from_string(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        pick: Any = chance.choice(CHANGES)
        pick(model, chance)
    return bytes(model.SerializeToString())


def _node(model: Any, chance: random.Random) -> Any:
    return chance.choice(model.graph.node)


def operator(model: Any, chance: random.Random) -> None:
    node = _node(model, chance)
    node.op_type = chance.choice(OPERATORS)
    if chance.random() < 0.5:
        node.domain = chance.choice(DOMAINS)


def inputs(model: Any, chance: random.Random) -> None:
    node = _node(model, chance)
    names = list(node.input)
    others = [name for each in model.graph.node for name in (*each.input, *each.output)]
    pick = chance.randrange(4)
    if pick == 0 and names:
        names.pop(chance.randrange(len(names)))
    elif pick == 1:
        chance.shuffle(names)
    elif pick == 2 and names:
        names[chance.randrange(len(names))] = chance.choice(others)
    else:
        names.append(chance.choice((*others[:50], "nowhere", "")))
    node.ClearField("input")
    node.input.extend(names)


def outputs(model: Any, chance: random.Random) -> None:
    node, other = _node(model, chance), _node(model, chance)
    if chance.random() < 0.5:
        node.output[0], other.output[0] = other.output[0], node.output[0]
    else:
        node.output.append(chance.choice(("more", node.output[0])))


def attribute(model: Any, chance: random.Random) -> None:
    nodes = [each for each in model.graph.node if each.attribute]
    if not nodes:
        return
    found = chance.choice(chance.choice(nodes).attribute)
    if found.type == onnx.AttributeProto.INT:
        found.i = chance.choice((*SIZES, found.i + 1, -found.i))
    elif found.type == onnx.AttributeProto.INTS and found.ints:
        found.ints[chance.randrange(len(found.ints))] = chance.choice(SIZES)
    elif chance.random() < 0.3:
        found.g.name = "within"
        found.type = onnx.AttributeProto.GRAPH
    else:
        found.name = chance.choice(("axis", "to", "value", "body", "nope"))


def _initializer(model: Any, chance: random.Random) -> Any:
    return chance.choice(model.graph.initializer)


def dimensions(model: Any, chance: random.Random) -> None:
    weight = _initializer(model, chance)
    if weight.dims and chance.random() < 0.7:
        weight.dims[chance.randrange(len(weight.dims))] = chance.choice(SIZES)
    else:
        weight.dims.append(chance.choice(SIZES))


def external(model: Any, chance: random.Random) -> None:
    weights = [each for each in model.graph.initializer if each.external_data]
    if not weights:
        return
    entry = chance.choice(chance.choice(weights).external_data)
    places = ("/etc/passwd", "../weights.safetensors", "./weights.safetensors", "tokenizer.json",
              "", "*/_ORT_MEM_ADDR_/*", "weights.safetensors/")  # fmt: skip
    entry.value = chance.choice(places if entry.key == "location" else tuple(map(str, SIZES)))


def numbers(model: Any, chance: random.Random) -> None:
    """Another value in a small constant, such as a shape."""
    small = [each for each in model.graph.initializer if each.raw_data and len(each.raw_data) < 200]
    if not small:
        return
    weight = chance.choice(small)
    if weight.data_type == TensorProto.INT64:
        values = numpy_helper.to_array(weight).copy()
        if values.size:
            values.flat[chance.randrange(values.size)] = chance.choice(SIZES)
            weight.raw_data = values.tobytes()
    else:
        weight.raw_data = damaged(weight.raw_data, chance)


def data_type(model: Any, chance: random.Random) -> None:
    _initializer(model, chance).data_type = chance.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 16, 21, 99))


def declared(model: Any, chance: random.Random) -> None:
    values = chance.choice((model.graph.input, model.graph.output, model.graph.value_info))
    if not values:
        return
    kind = chance.choice(values).type.tensor_type
    if kind.shape.dim and chance.random() < 0.7:
        chance.choice(kind.shape.dim).dim_value = chance.choice(SIZES)
    else:
        kind.elem_type = chance.choice((0, 1, 7, 8, 10, 99))


def bomb(model: Any, chance: random.Random) -> None:
    """A node in front of another's input, which makes much of it."""
    node = _node(model, chance)
    if not node.input:
        return
    name, size = node.input[0], chance.choice((100, 10_000, 1_000_000))
    shape = helper.make_tensor("bomb_shape", TensorProto.INT64, [2], [size, size])
    model.graph.initializer.append(shape)
    pick = chance.randrange(4)
    if pick == 0:
        made = [helper.make_node("ConstantOfShape", ["bomb_shape"], ["bombed"])]
    elif pick == 1:
        one = helper.make_tensor("bomb_one", TensorProto.FLOAT, [1], [1.0])
        model.graph.initializer.append(one)
        made = [helper.make_node("Expand", ["bomb_one", "bomb_shape"], ["bombed"])]
    elif pick == 2:
        flat = helper.make_tensor("bomb_flat", TensorProto.INT64, [1], [-1])
        tile = helper.make_tensor("bomb_tile", TensorProto.INT64, [1], [size])
        model.graph.initializer.extend([flat, tile])
        made = [
            helper.make_node("Reshape", [name, "bomb_flat"], ["bomb_row"]),
            helper.make_node("Tile", ["bomb_row", "bomb_tile"], ["bombed"]),
        ]
    else:
        tall = helper.make_tensor("bomb_tall", TensorProto.INT64, [2], [-1, 1])
        wide = helper.make_tensor("bomb_wide", TensorProto.INT64, [2], [1, -1])
        model.graph.initializer.extend([tall, wide])
        made = [
            helper.make_node("Reshape", [name, "bomb_tall"], ["bomb_a"]),
            helper.make_node("Reshape", [name, "bomb_wide"], ["bomb_b"]),
            helper.make_node("Add", ["bomb_a", "bomb_b"], ["bombed"]),
        ]
    made.append(helper.make_node("ReduceMax", ["bombed"], ["defused"], keepdims=0))
    made.append(helper.make_node("Add", [name, "defused"], ["bomb_in"]))
    node.input[0] = "bomb_in"
    place = list(model.graph.node).index(node)
    nodes = list(model.graph.node)
    model.graph.ClearField("node")
    model.graph.node.extend([*nodes[:place], *made, *nodes[place:]])


def opset(model: Any, chance: random.Random) -> None:
    entry = chance.choice(model.opset_import)
    entry.version = chance.choice((1, 7, 13, 18, 22, 99, -1, 1 << 62))
    if chance.random() < 0.3:
        entry.domain = chance.choice(DOMAINS)


CHANGES = (
    operator, inputs, inputs, outputs, attribute, attribute, dimensions, external, numbers, numbers,
    data_type, declared, bomb, bomb, opset,
)  # fmt: skip

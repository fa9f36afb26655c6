"""What a bundle carries so that stock onnxruntime-genai runs it, up to the pot's size: one more
graph over the same weights, and its config.

The graph is cut from the trace that the others come from, at a width that no number of the model
comes near. So every constant that speaks of the width is known by its value, and is read off the
inputs instead; whatever else there is stays as it was. No pot is compressed there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from potexport.lower_onnx import cut
from potexport.spec import Layout
from potexport.surgery import constant

GRAPH = "genai"
CONFIG = "genai_config.json"
# Primes; a number is near one that is a multiple of it, or one more or less.
WIDTHS = (7919, 6007, 8807, 9973)
MULTIPLES = 64
# For padding, which there is none of. With the end token in its place, as genai's own builder has
# it, a prompt that ends in one gets the logits of the token before.
NO_TOKEN = -1


class UnfitError(Exception):
    """A graph whose width cannot be left open; says why."""


def begin(whole: ir.Model, layout: Layout) -> dict[str, ir.Model]:
    """The model graph with the logits of every token, at a width that `finish` leaves open; none
    for a model whose sizes leave no such width."""
    constants = (value.const_value for value in whole.graph.initializers.values())
    sizes = [d for tensor in constants if tensor is not None for d in tensor.shape.numpy()]
    sizes += [d for spec in layout.past() for d in spec.shape]
    for width in WIDTHS:
        if not any(_near(size, width) for size in sizes):
            spec = replace(layout.graphs()["decode"], name=GRAPH)
            return {GRAPH: cut(whole, spec, width=width)}
    return {}


def finish(models: dict[str, ir.Model]) -> None:
    """Open what `begin` made, when it is fused and quantized; leave it out where that cannot be."""
    if GRAPH in models:
        try:
            loosen(models[GRAPH])
        except UnfitError:
            del models[GRAPH]


def loosen(model: ir.Model) -> None:
    """Leave the width and the length of the cache open, in place; UnfitError where it cannot be.

    Inputs become `input_ids` (1, N) int64, `attention_mask` (1, past + N) int64, of which the shape
    alone is read, and the cache, (1, Hkv, longest, D) float32 for keys and values of each layer.
    Outputs are `logits` (1, N, V) float32 and the cache, in the same memory.
    """
    inside = model.graph
    given = {str(value.name): value for value in inside.inputs}
    ids, mask = given.pop("input_ids"), ir.Value(name="attention_mask")
    assert ids.shape is not None
    _, width = ids.shape.numpy()
    for value, dim in ((ids, "sequence_length"), (mask, "total_sequence_length")):
        value.shape, value.type = ir.Shape([1, dim]), ir.TensorType(ir.DataType.INT64)
    tokens, total = _length(ids), _length(mask)
    past = ir.node("Sub", [total[-1].outputs[0], tokens[-1].outputs[0]])
    count = tokens[-1].outputs[0]
    before = next(iter(inside))
    _open_constants(inside, width, count, before)
    for name in ("past_seq_len", "position"):  # the same until the first compression
        given.pop(name).replace_all_uses_with(past.outputs[0])
    inside.insert_before(next(iter(inside)), [*tokens, *total, past])
    inside.inputs[:] = [ids, mask, *given.values()]
    _open_shapes(inside, width)


def _length(value: ir.Value) -> list[ir.Node]:
    """(1,) int32, the second dimension of an input."""
    size = ir.node("Shape", [value], attributes={"start": 1, "end": 2})
    return [size, ir.node("Cast", [size.outputs[0]], attributes={"to": ir.DataType.INT32})]


def _near(number: int, width: int) -> tuple[int, int] | None:
    """(count, rest) of count * width + rest, if that is what the number says of the width."""
    count = (number + 1) // width
    rest = number - count * width
    return (count, rest) if 1 <= count <= MULTIPLES and -1 <= rest <= 1 else None


def _dims(value: ir.Value) -> Iterable[int]:
    tensor = value.const_value
    return () if tensor is None else tensor.shape.numpy()


def _open_constants(inside: ir.Graph, width: int, count: ir.Value, before: ir.Node) -> None:
    for value in list(inside.initializers.values()):
        tensor = value.const_value
        if tensor is None or not value.uses():
            continue
        wide = any(_near(d, width) for d in _dims(value))
        whole = tensor.dtype in (ir.DataType.INT32, ir.DataType.INT64)
        if wide and not whole:
            raise UnfitError(f"{value.name} is a constant of as many rows as tokens are read")
        if not whole or (tensor.size > MULTIPLES and not wide):
            continue
        array = tensor.numpy()
        numbers = [_near(int(number), width) for number in array.reshape(-1)]
        if wide:
            _open_range(inside, value, array, count, before)
        elif any(numbers) and not _open_reshape(inside, value, array, numbers):
            _computed(inside, value, array, numbers, count, before)


def _open_range(
    inside: ir.Graph, value: ir.Value, array: np.ndarray, count: ir.Value, before: ir.Node
) -> None:
    """0, 1, 2, … as far as tokens are read."""
    if array.ndim != 1 or not np.array_equal(array, np.arange(array.size)):
        raise UnfitError(f"{value.name} has a number for each token that is read")
    none = constant(inside, "none", np.zeros((), np.int32))
    one = constant(inside, "one", np.ones((), np.int32))
    scalar = constant(inside, "scalar", np.zeros(0, np.int64))
    end = ir.node("Reshape", [count, scalar])
    numbers = ir.node("Range", [none, end.outputs[0], one])
    _instead(inside, value, [end, numbers], before)


def _open_reshape(inside: ir.Graph, value: ir.Value, array: np.ndarray, numbers: list[Any]) -> bool:
    """Let a Reshape find the dimension by itself, where it is the only one."""
    shapes = all(use.node.op_type == "Reshape" and use.idx == 1 for use in value.uses())
    if not shapes or array.ndim != 1 or sum(map(bool, numbers)) > 1 or -1 in array:
        return False
    found = np.where([each is not None for each in numbers], -1, array)
    value.replace_all_uses_with(constant(inside, f"{value.name}.open", found))
    return True


def _computed(
    inside: ir.Graph,
    value: ir.Value,
    array: np.ndarray,
    numbers: list[Any],
    count: ir.Value,
    before: ir.Node,
) -> None:
    """times * tokens + rest, number by number."""
    kind = np.int32
    times = np.array([each[0] if each else 0 for each in numbers], kind).reshape(array.shape)
    plain = array.reshape(-1)
    rest = [each[1] if each else number for each, number in zip(numbers, plain, strict=True)]
    names = [constant(inside, f"{value.name}.times", times)]
    names.append(constant(inside, f"{value.name}.rest", np.array(rest, kind).reshape(array.shape)))
    nodes = [ir.node("Mul", [names[0], count])]
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], names[1]]))
    if array.ndim == 0:
        shape = constant(inside, "scalar", np.zeros(0, np.int64))
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape]))
    _instead(inside, value, nodes, before)


def _instead(inside: ir.Graph, value: ir.Value, nodes: list[ir.Node], before: ir.Node) -> None:
    """What the nodes compute, in int32, in the place of a constant."""
    assert value.const_value is not None
    if value.const_value.dtype != ir.DataType.INT32:
        kind = {"to": value.const_value.dtype}
        nodes = [*nodes, ir.node("Cast", [nodes[-1].outputs[0]], attributes=kind)]
    inside.insert_before(before, nodes)
    value.replace_all_uses_with(nodes[-1].outputs[0])


def _open_shapes(inside: ir.Graph, width: int) -> None:
    """Forget the shapes of the width; UnfitError where one is left in an attribute."""
    for node in inside:
        for attribute in node.attributes.values():
            numbers = attribute.value if isinstance(attribute.value, (tuple, list)) else ()
            if any(isinstance(n, int) and _near(n, width) for n in numbers):
                raise UnfitError(f"{node.op_type} has the number of tokens in {attribute.name}")
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    for value in (*inside.inputs, *inside.outputs):
        name = str(value.name)
        if name == "logits":
            assert value.shape is not None
            value.shape = ir.Shape([1, "sequence_length", value.shape[2]])
        elif name.startswith(("past_key_values.", "present.")):
            assert value.shape is not None
            _, heads, _, size = value.shape
            value.shape = ir.Shape([1, heads, "max_length", size])
    for value in list(inside.initializers.values()):
        if not value.uses():
            inside.initializers.pop(str(value.name))


def config(layout: Layout, first: int | None, ends: Sequence[int]) -> str:
    """`genai_config.json`: greedy, and read in chunks as the bundle is, up to the pot's slots.

    first: the token that begins a text; ends: those that end an answer.
    """
    facts, pot = layout.facts, layout.pot
    decoder = {
        "filename": f"{GRAPH}.onnx",
        "session_options": {"provider_options": []},
        "num_hidden_layers": facts.layers,
        "head_size": facts.head_size,
        "num_attention_heads": facts.query_heads,
        "num_key_value_heads": facts.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder",
        "vocab_size": facts.vocab_size,
        "context_length": pot.positions,
        **({} if first is None else {"bos_token_id": first}),
        "eos_token_id": list(ends),
        "pad_token_id": NO_TOKEN,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "max_length": pot.slots,
        "chunk_size": pot.chunk,
        "past_present_share_buffer": True,
    }
    return json.dumps({"model": model, "search": search}, indent=1) + "\n"
